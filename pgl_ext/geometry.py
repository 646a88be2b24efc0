"""Where views lie in their volume, and separable linear resampling.

A view's affine (4, 4) maps view voxel indices to source voxel indices. Crop, scale and flip act per axis, so it is
diagonal plus translation, and every resampling is one small matrix per axis. Voxel centres have integer coordinates; a
view of size P covers [-0.5, P - 0.5].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = [
    "axis_scale_and_offset",
    "cell_samples",
    "derive_stride",
    "linear_interpolation_matrix",
    "overlap_extent",
    "resample_axes",
    "roi_align_3d",
    "shared_extent",
    "upsample_features",
]


def axis_scale_and_offset(affines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split axis-aligned affines into ``source = scale * view + offset``, per axis.

    Args:
        affines: view voxel index to source voxel index, (..., 4, 4).

    Returns:
        scale and offset, each (..., 3), in source voxels per view voxel and source voxels.

    Raises:
        ValueError: where an affine has the wrong shape, rotates, shears, or is singular.
    """
    if affines.shape[-2:] != (4, 4):
        raise ValueError(f"affines must have shape (..., 4, 4), got {tuple(affines.shape)}.")
    linear = affines[..., :3, :3]
    scale = torch.diagonal(linear, dim1=-2, dim2=-1)
    off_diagonal = linear - torch.diag_embed(scale)
    bad = (off_diagonal.abs().amax((-2, -1)) > 1e-5) | (scale.abs().amin(-1) < 1e-8)
    if bad.any():
        raise ValueError(
            "the aligner needs axis-aligned affines (crop, scale, flip: diagonal plus translation), but got "
            f"{affines[bad].view(-1, 4, 4)[0].tolist()}. Views must not be rotated or sheared: remove such transforms "
            "from the geometry list."
        )
    return scale, affines[..., :3, 3]


def overlap_extent(affines: torch.Tensor, view_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Extent that all views of a volume share, in source voxel coordinates.

    Args:
        affines: (B, V, 4, 4), view voxel index to source voxel index.
        view_size: (X, Y, Z) in voxels.

    Returns:
        lower and upper edge, each (B, 3), in source voxels.

    Raises:
        ValueError: where the views of a sample do not overlap, or an affine is not axis-aligned.
    """
    edge = torch.full((3,), -0.5)
    lower, upper = shared_extent(affines, edge, torch.as_tensor(view_size) + edge)
    empty = (upper <= lower).any(dim=-1)
    if empty.any():
        sample = int(empty.nonzero()[0])
        raise ValueError(
            f"the views of sample {sample} do not overlap: lower edge {lower[sample].tolist()}, upper edge "
            f"{upper[sample].tolist()} in source voxels. Views of one volume must share a region (min_overlap > 0)."
        )
    return lower, upper


def shared_extent(affines: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What all views show between two of their voxels, (3,) each: lower and upper, (B, 3), in source voxels.

    Where they share nothing, lower is not below upper.
    """
    scale, offset = axis_scale_and_offset(affines)
    first, last = (offset + scale * voxel.to(affines) for voxel in (first, last))
    return torch.minimum(first, last).amax(dim=1), torch.maximum(first, last).amin(dim=1)


def cell_samples(lower: torch.Tensor, upper: torch.Tensor, cells: int, sampling_ratio: int) -> torch.Tensor:
    """Points (..., cells, sampling_ratio) evenly in the cells of intervals with these edges (...), as in RoIAlign."""
    fraction = torch.arange(cells * sampling_ratio, dtype=lower.dtype, device=lower.device)
    fraction = ((fraction + 0.5) / (cells * sampling_ratio)).view(cells, sampling_ratio)
    return lower[..., None, None] + (upper - lower)[..., None, None] * fraction


def linear_interpolation_matrix(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Weights (..., cells, size) of linear interpolation, averaged over the sample points of each cell.

    Args:
        positions: sample points (..., cells, samples) in grid coordinates; clamped to [0, size - 1].
        size: number of grid points.
    """
    positions = positions.clamp(0, size - 1)
    grid = torch.arange(size, dtype=positions.dtype, device=positions.device)
    return (1 - (positions.unsqueeze(-1) - grid).abs()).clamp_min(0).mean(dim=-2)


def resample_axes(features: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Apply one matrix per spatial axis: ``einsum("bcxyz,bix,bjy,bkz->bcijk", features, *weights)``.

    Each product moves the axes one place on, so that none is copied; the result has the channels last in memory.

    Args:
        features: (B, C, X, Y, Z).
        weights: one (B, cells, size) matrix for each of x, y, z.

    Returns:
        (B, C, I, J, K), in the features' dtype (or autocast's).
    """
    batch, channels, *size = features.shape
    weights = [w.to(features.dtype) for w in weights]
    cells = [w.shape[1] for w in weights]
    out = torch.bmm(weights[2], features.reshape(batch, channels * size[0] * size[1], size[2]).mT)
    out = torch.bmm(weights[1], out.view(batch, cells[2] * channels * size[0], size[1]).mT)
    out = torch.bmm(weights[0], out.view(batch, cells[1] * cells[2] * channels, size[0]).mT)
    return out.view(batch, *cells, channels).permute(0, 4, 1, 2, 3)


def upsample_features(features: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """A map (B, C, x, y, z) at every voxel (B, C, X, Y, Z) of a volume: linear, feature j on voxel ``stride * j``."""
    weights = [
        linear_interpolation_matrix(torch.arange(voxels, dtype=torch.float64)[None, :, None] / step, cells).to(features)
        for voxels, step, cells in zip(size, stride, features.shape[2:], strict=True)
    ]
    return resample_axes(features, weights)


def roi_align_3d(
    features: torch.Tensor, boxes: torch.Tensor, output_size: Sequence[int], sampling_ratio: int = 2
) -> torch.Tensor:
    """RoIAlign of one box per sample in 3D.

    Half-pixel convention, as torchvision's 2D ``roi_align(aligned=True)`` inside the map: feature j covers [j, j + 1]
    of the box coordinates. Beyond the outermost feature centres the border value is repeated.

    Args:
        features: (B, C, X, Y, Z).
        boxes: (B, 3, 2), lower and upper edge per axis, in feature coordinates.
        output_size: cells per axis (I, J, K).
        sampling_ratio: sample points per cell and axis, evenly spaced and averaged.

    Returns:
        (B, C, I, J, K).

    Raises:
        ValueError: where the shapes do not fit.
    """
    if features.ndim != 5 or boxes.shape != (features.shape[0], 3, 2):
        raise ValueError(
            "expected features (B, C, X, Y, Z) and boxes (B, 3, 2) with the same B, got "
            f"{tuple(features.shape)} and {tuple(boxes.shape)}."
        )
    weights = [
        linear_interpolation_matrix(cell_samples(*edges.unbind(-1), cells, sampling_ratio), size)
        for edges, cells, size in zip((boxes - 0.5).unbind(1), output_size, features.shape[2:], strict=True)
    ]
    return resample_axes(features, weights)


def derive_stride(view_size: Sequence[int], feature_size: Sequence[int]) -> tuple[int, ...]:
    """Output stride per axis, in view voxels; a ValueError where the feature size does not divide the view size."""
    if any(p % n for p, n in zip(view_size, feature_size, strict=True)):
        raise ValueError(
            f"view size {tuple(view_size)} is not a multiple of the feature map's size {tuple(feature_size)}: choose a "
            "view size that the encoder's stride divides."
        )
    return tuple(p // n for p, n in zip(view_size, feature_size, strict=True))
