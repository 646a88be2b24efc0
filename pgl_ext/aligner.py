"""The prior-guided aligner (PGL paper, section 3.3): FlipAlign and CSAlign in one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pgl_ext.geometry import (
    axis_scale_and_offset,
    cell_samples,
    derive_stride,
    linear_interpolation_matrix,
    overlap_extent,
    resample_axes,
    shared_extent,
)
from pgl_ext.settings import check_positive

__all__ = ["PriorGuidedAligner"]

_ALIGNMENTS = ("exact", "inside", "paper")


class PriorGuidedAligner(nn.Module):
    """Resample the feature maps of all views of a volume onto one common grid over the region that they share.

    Un-flipping, intersecting, rescaling, RoIAlign and resizing (equations 4 to 7) are linear and act per axis: together
    they are one small matrix per axis. Cell i of the result shows the same part of the volume in every view, in the
    orientation of the volume.

    Args:
        output_size: cells per axis of the common grid; default: the feature map's own size.
        alignment: how view voxel v becomes a feature coordinate, with output stride s. ``"exact"``: v / s, which is
            where the features of convolutions with odd kernels and padding k // 2 are centred. ``"inside"``: the same,
            over what lies between the outermost features of all views, beyond which ``"exact"`` repeats the border; an
            axis where that is nothing keeps the whole overlap. ``"paper"``: (v + 0.5) / s - 0.5, the half-pixel rule of
            plain RoIAlign, off by s - 1 view voxels where one of two views is flipped.
        sampling_ratio: sample points per cell and axis.
        centre: voxel that feature 0 is centred on, per axis or for all, where that is not 0; with it ``"exact"`` is
            (v - centre) / s. See ``networks.base.FeatureNetwork``.

    Example:
        >>> aligner = PriorGuidedAligner()
        >>> affines = torch.eye(4).expand(8, 2, 4, 4)
        >>> aligner(torch.rand(8, 2, 256, 6, 6, 2), affines, (96, 96, 16)).shape
        torch.Size([8, 2, 256, 6, 6, 2])
    """

    def __init__(
        self,
        output_size: Sequence[int] | None = None,
        alignment: str = "exact",
        sampling_ratio: int = 2,
        centre: Sequence[float] | float = 0,
    ) -> None:
        super().__init__()
        if alignment not in _ALIGNMENTS:
            raise ValueError(f"alignment must be one of {_ALIGNMENTS}, got {alignment!r}.")
        self.output_size = output_size
        self.alignment = alignment
        self.sampling_ratio = check_positive(sampling_ratio, "sampling_ratio", "the paper's aligner takes 2")
        self.centre = tuple(centre) if isinstance(centre, Sequence) else (centre,) * 3

    def forward(self, features: torch.Tensor, affines: torch.Tensor, view_size: Sequence[int]) -> torch.Tensor:
        """Align features (B, V, C, x, y, z) to (B, V, C, *output_size).

        Args:
            features: of all views.
            affines: view voxel index to source voxel index, (B, V, 4, 4); best on the CPU, where checking them costs no
                wait for the accelerator.
            view_size: (X, Y, Z) in voxels.

        Raises:
            ValueError: where shapes do not fit, an affine is rotated or sheared, or views do not overlap.
        """
        if features.ndim != 6 or affines.shape != (*features.shape[:2], 4, 4):
            raise ValueError(
                "expected features (B, V, C, x, y, z) and affines (B, V, 4, 4), got "
                f"{tuple(features.shape)} and {tuple(affines.shape)}."
            )
        weights = self.axis_matrices(affines, view_size, features.shape[3:])
        weights = [w.flatten(0, 1).to(features.device, non_blocking=True) for w in weights]
        aligned = resample_axes(features.flatten(0, 1), weights)
        return aligned.unflatten(0, features.shape[:2])

    def axis_matrices(
        self, affines: torch.Tensor, view_size: Sequence[int], feature_size: Sequence[int]
    ) -> list[torch.Tensor]:
        """The three interpolation matrices, each (B, V, cells, feature size), in float32."""
        # Source coordinates reach hundreds of voxels: half precision would move them by a voxel.
        affines = affines.float()
        scale, offset = axis_scale_and_offset(affines)
        lower, upper = overlap_extent(affines, view_size)
        strides = derive_stride(view_size, feature_size)
        if self.alignment == "inside":
            first = torch.tensor(self.centre)
            last = first + (torch.tensor(feature_size) - 1) * torch.tensor(strides)
            inner = shared_extent(affines, first, last)
            is_some = inner[0] < inner[1]
            lower, upper = (torch.where(is_some, *edges) for edges in zip(inner, (lower, upper), strict=True))
        output_size = self.output_size or feature_size
        weights = []
        sizes = zip(output_size, feature_size, strides, self.centre, strict=True)
        for axis, (cells, size, stride, centre) in enumerate(sizes):
            source = cell_samples(lower[:, None, axis], upper[:, None, axis], cells, self.sampling_ratio)
            view = (source - offset[..., axis, None, None]) / scale[..., axis, None, None]
            position = (view - centre) / stride if self.alignment != "paper" else (view + 0.5) / stride - 0.5
            weights.append(linear_interpolation_matrix(position, size))
        return weights
