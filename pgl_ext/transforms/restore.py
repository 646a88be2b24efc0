"""From the network's grid back to that of the scan's file."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample
from monai.utils import convert_to_tensor

from pgl_ext.geometry import linear_interpolation_matrix, resample_axes
from pgl_ext.settings import parse_bool
from pgl_ext.task import SegmentationTask

__all__ = ["RestoreOrgansd", "predictive_entropy"]

# Voxels by which the farthest sample may be off where rotation and shear are taken for rounding.
_TOLERANCE = 1e-2
# Values of all channels that are held at the size of the file at a time.
_SLAB_VALUES = 2**24


class RestoreOrgansd(MapTransform):
    """Turn probabilities on the preprocessed grid into masks of organs on the grid of the scan's file.

    Probabilities are resampled linearly, with the border repeated, and only then compared, so that the surfaces of
    organs are not stepped as those of a resampled label map. Orientation and spacing keep the axes of the voxels,
    whichever way these are rotated: resampling is then exact, axis by axis. Where other preprocessing rotated or
    sheared the grid, MONAI's ``SpatialResample`` does it. Slabs bound the memory: all channels are at the size of the
    file at the same time only if ``probabilities`` asks for them.

    Args:
        keys: keys of the probabilities (out_channels, x, y, z).
        task: what the channels mean.
        image_key: key of the preprocessed scan (C, x, y, z), a ``MetaTensor`` whose meta has the file's
            ``original_affine`` and ``spatial_shape``, as MONAI's readers record them.
        probabilities: whether to add ``KEY_probabilities`` (out_channels, X, Y, Z), float32.
        uncertainty: whether to add ``KEY_uncertainty`` (1, X, Y, Z), float32: see :func:`predictive_entropy`.
        allow_missing_keys: don't raise if a key is absent.

    Returns of a call:
        Under the key the masks (organs, X, Y, Z), bool. All are ``MetaTensor`` on the CPU with the affine of the file
        and the meta of the scan.

    Raises:
        ValueError: probabilities do not fit the scan or the task, or the scan lacks meta information.
    """

    def __init__(
        self,
        keys: KeysCollection,
        task: SegmentationTask,
        image_key: str = "image",
        probabilities: bool = False,
        uncertainty: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.task = task
        self.image_key = image_key
        self.probabilities = parse_bool(probabilities, "probabilities")
        self.uncertainty = parse_bool(uncertainty, "uncertainty")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        image = out[self.image_key]
        for key in self.key_iterator(out):
            for suffix, value in self._restore(convert_to_tensor(out[key]), image).items():
                out[f"{key}{suffix}"] = _on_grid_of_file(value, image)
        return out

    def _restore(self, scores: torch.Tensor, image: MetaTensor) -> dict[str, torch.Tensor]:
        shape, affine = _file_grid(image)
        expected = (self.task.out_channels, *image.shape[-3:])
        if tuple(scores.shape) != expected:
            raise ValueError(
                f"probabilities have shape {tuple(scores.shape)}, but a task of {len(self.task.names)} organs on the "
                f"preprocessed scan needs {expected}: they must come from a network of this task, unchanged."
            )
        results = {"": torch.empty(len(self.task.names), *shape, dtype=torch.bool)}
        if self.probabilities:
            results["_probabilities"] = torch.empty(len(scores), *shape)
        if self.uncertainty:
            results["_uncertainty"] = torch.empty(1, *shape)
        for start, stop, slab in _resampled_slabs(scores, _affine_of(image), affine, shape):
            place = (slice(None), slice(start, stop))
            results[""][place] = self.task.masks_of_probabilities(slab).cpu()
            if self.probabilities:
                results["_probabilities"][place] = slab.cpu()
            if self.uncertainty:
                results["_uncertainty"][place] = predictive_entropy(slab, self.task).cpu()
        return results


def predictive_entropy(probabilities: torch.Tensor, task: SegmentationTask) -> torch.Tensor:
    """How undecided a prediction is, per voxel: 0 where it is certain, 1 where all classes are equally probable.

    For a multi-class task the entropy of the classes over its greatest value, -sum_c p_c log p_c / log C; for a
    multi-label task the largest entropy of an organ's binary decision, over log 2. For the mean of several predictions,
    as of flipped scans, it holds both how undecided each is and how much they disagree.

    Args:
        probabilities: (..., out_channels, X, Y, Z).
        task: what the channels mean.

    Returns:
        (..., 1, X, Y, Z) in [0, 1].
    """
    terms = torch.special.entr(probabilities)
    if task.multi_label:
        binary = terms + torch.special.entr(1 - probabilities)
        return (binary.amax(-4, keepdim=True) / math.log(2)).clamp(0, 1)
    return (terms.sum(-4, keepdim=True) / math.log(task.out_channels)).clamp(0, 1)


def _affine_of(image: MetaTensor) -> np.ndarray:
    return np.asarray(image.affine.cpu(), dtype=np.float64)


def _file_grid(image: MetaTensor) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (X, Y, Z) and affine of the file that a scan was loaded from."""
    meta = getattr(image, "meta", {})
    missing = [name for name in ("original_affine", "spatial_shape") if name not in meta]
    if missing:
        raise ValueError(
            f"the scan {meta.get('filename_or_obj', '')} lacks {missing} in its meta: load it with "
            "pgl_ext.transforms.LoadVolumed, and keep its meta, so that the grid of the file is known."
        )
    shape = tuple(int(n) for n in meta["spatial_shape"])[:3]
    return shape, np.asarray(torch.as_tensor(meta["original_affine"]).cpu(), dtype=np.float64)


def _on_grid_of_file(value: torch.Tensor, image: MetaTensor) -> MetaTensor:
    shape, affine = _file_grid(image)
    meta = {**image.meta, "affine": torch.from_numpy(affine), "spatial_shape": np.array(shape)}
    return MetaTensor(value, meta=meta)


# --- resampling -----------------------------------------------------------------------------------------------------


def _resampled_slabs(
    scores: torch.Tensor, affine: np.ndarray, file_affine: np.ndarray, shape: tuple[int, ...]
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Channels (C, x, y, z) on the grid of the file, as (start, stop, (C, stop - start, Y, Z)) along its first axis."""
    to_scores = np.linalg.solve(affine, file_affine)
    axes = _matching_axes(to_scores, shape)
    if axes is None:
        slab_of = _free_sampler(scores, affine, file_affine, shape)
    else:
        slab_of = _axis_sampler(scores, to_scores, axes, shape)
    thickness = max(1, _SLAB_VALUES // (len(scores) * shape[1] * shape[2]))
    for start in range(0, shape[0], thickness):
        stop = min(start + thickness, shape[0])
        yield start, stop, slab_of(start, stop)


def _matching_axes(to_scores: np.ndarray, shape: tuple[int, ...]) -> list[int] | None:
    """Which axis of the scores each axis of the file runs along; None where the grids are rotated or sheared."""
    axes = np.abs(to_scores[:3, :3]).argmax(axis=0).tolist()
    drift = np.abs(to_scores[:3, :3]) * (np.array(shape) - 1)
    drift[axes, range(3)] = 0
    return axes if sorted(axes) == [0, 1, 2] and drift.sum(axis=1).max() < _TOLERANCE else None


def _axis_sampler(
    scores: torch.Tensor, to_scores: np.ndarray, axes: list[int], shape: tuple[int, ...]
) -> Callable[[int, int], torch.Tensor]:
    sizes = [scores.shape[1 + axis] for axis in axes]
    positions = [
        (to_scores[axis, own] * np.arange(n) + to_scores[axis, 3]).clip(0, size - 1)
        for own, (axis, n, size) in enumerate(zip(axes, shape, sizes, strict=True))
    ]
    order = [0, *(1 + axis for axis in axes)]
    if all(map(_is_every_voxel, positions, sizes)):
        backward = [1 + own for own, axis in enumerate(axes) if to_scores[axis, own] < 0]

        def turned(start: int, stop: int) -> torch.Tensor:
            rows, _ = _rows(positions[0][start:stop])
            return scores.permute(order)[:, rows].flip(backward).float()

        return turned
    weights: list[torch.Tensor] = [torch.empty(0)] * 3
    for own in (1, 2):
        weights[axes[own]] = _weights(positions[own], sizes[own], scores.device)

    def interpolated(start: int, stop: int) -> torch.Tensor:
        rows, inside = _rows(positions[0][start:stop])
        slab = scores.movedim(order[1], 1)[:, rows].movedim(1, order[1]).float()
        weights[axes[0]] = _weights(inside, rows.stop - rows.start, scores.device)
        return resample_axes(slab[None], weights)[0].permute(order)

    return interpolated


def _is_every_voxel(positions: np.ndarray, size: int) -> bool:
    """Whether samples lie on all voxels of an axis in turn, forwards or backwards."""
    voxels = np.arange(size)
    return (
        len(positions) == size and min(np.abs(positions - voxels).max(), np.abs(positions - voxels[::-1]).max()) < 1e-4
    )


def _rows(positions: np.ndarray) -> tuple[slice, np.ndarray]:
    """The voxels of an axis that samples lie on or between, and the samples' positions among these."""
    # What rounding made of a whole number must not add a voxel, nor lose one.
    low, high = int(np.floor(positions.min() + 1e-4)), int(np.ceil(positions.max() - 1e-4))
    return slice(low, high + 1), positions - low


def _weights(positions: np.ndarray, size: int, device: torch.device) -> torch.Tensor:
    """The matrix (1, samples, size) of linear interpolation."""
    matrix = linear_interpolation_matrix(torch.from_numpy(positions)[None, :, None], size)
    return matrix.to(device, torch.float32)


def _free_sampler(
    scores: torch.Tensor, affine: np.ndarray, file_affine: np.ndarray, shape: tuple[int, ...]
) -> Callable[[int, int], torch.Tensor]:
    resample = SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float32)
    source = MetaTensor(scores.float(), affine=torch.from_numpy(affine))

    def slab_of(start: int, stop: int) -> torch.Tensor:
        shift = np.eye(4)
        shift[0, 3] = start
        target = torch.from_numpy(file_affine @ shift)
        with resample.trace_transform(False):
            return convert_to_tensor(resample(source, dst_affine=target, spatial_size=(stop - start, *shape[1:])))

    return slab_of
