"""From the network's grid back to that of the scan's file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

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

_TOLERANCE = 1e-2  # voxels by which the farthest sample may be off where rotation and shear are taken for rounding
_SLAB_VALUES = 2**24  # of all channels, held at the size of the file at a time


class RestoreOrgansd(MapTransform):
    """Turn probabilities on the preprocessed grid into masks of organs on the grid of the scan's file.

    Probabilities are resampled linearly, with the border repeated, and only then compared, so that the surfaces of
    organs are not stepped as those of a resampled label map. Orientation and spacing keep the axes of the voxels:
    resampling is then exact, axis by axis. Where a file's axes are not at right angles, which MONAI's ``Spacing`` does
    not keep, ``SpatialResample`` does it. Slabs bound the memory.

    Args:
        keys: keys of the probabilities (out_channels, x, y, z).
        task: what the channels mean.
        image_key: key of the preprocessed scan (C, x, y, z), a ``MetaTensor`` whose meta has the file's
            ``original_affine`` and ``spatial_shape``, as MONAI's readers record them.
        probabilities: whether to add ``KEY_probabilities`` (out_channels, X, Y, Z), float32.
        uncertainty: whether to add ``KEY_uncertainty`` (1, X, Y, Z), float32: see :func:`predictive_entropy`.

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
    ) -> None:
        super().__init__(keys)
        self.task = task
        self.image_key = image_key
        self.outputs = {"": task.masks_of_probabilities}  # functions of slabs by suffix of the key
        if parse_bool(probabilities, "probabilities"):
            self.outputs["_probabilities"] = torch.Tensor.cpu
        if parse_bool(uncertainty, "uncertainty"):
            self.outputs["_uncertainty"] = partial(predictive_entropy, task=task)

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        image = out[self.image_key]
        shape, affine = _file_grid(image)
        meta = {**image.meta, "affine": torch.from_numpy(affine), "spatial_shape": np.array(shape)}
        for key in self.key_iterator(out):
            scores = convert_to_tensor(out[key])
            expected = (self.task.out_channels, *image.shape[-3:])
            if tuple(scores.shape) != expected:
                raise ValueError(
                    f"probabilities have shape {tuple(scores.shape)}, but a task of {len(self.task.names)} organs on "
                    f"the preprocessed scan needs {expected}: they must come from a network of this task, unchanged."
                )
            to_scores = np.linalg.solve(np.asarray(image.affine.cpu(), dtype=np.float64), affine)
            for rows, slab in _resampled_slabs(scores, to_scores, shape):
                for suffix, function in self.outputs.items():
                    value = function(slab).cpu()
                    if rows.start == 0:
                        out[f"{key}{suffix}"] = MetaTensor(value.new_empty(len(value), *shape), meta=dict(meta))
                    out[f"{key}{suffix}"].as_tensor()[:, rows] = value
        return out


def predictive_entropy(probabilities: torch.Tensor, task: SegmentationTask) -> torch.Tensor:
    """Uncertainty of a prediction per voxel: 0 where it is certain, 1 where all classes are equally probable.

    For a multi-class task the entropy of the classes over its greatest value, -sum_c p_c log p_c / log C; for a
    multi-label task the largest entropy of an organ's binary decision, over log 2.

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


def _file_grid(image: MetaTensor) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (X, Y, Z) and affine of the file that a scan was loaded from."""
    meta = getattr(image, "meta", {})
    missing = [name for name in ("original_affine", "spatial_shape") if name not in meta]
    if missing:
        raise ValueError(
            f"the scan {meta.get('filename_or_obj', '')} lacks {missing} in its meta: load it with "
            "pgl_ext.transforms.LoadVolumed, and keep its meta, so that the grid of the file is known."
        )
    shape = tuple(map(int, meta["spatial_shape"]))[:3]
    return shape, np.asarray(torch.as_tensor(meta["original_affine"]).cpu(), dtype=np.float64)


def _resampled_slabs(
    scores: torch.Tensor, to_scores: np.ndarray, shape: tuple[int, ...]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Resample channels (C, x, y, z) onto the grid of the file.

    Args:
        to_scores: voxel index of the file to that of the scores (4, 4).
        shape: (X, Y, Z) of the file.

    Yields:
        rows of the file's first axis, and the channels there (C, rows, Y, Z).
    """
    axes = _matching_axes(to_scores, shape)
    thickness = max(1, _SLAB_VALUES // (len(scores) * shape[1] * shape[2]))
    for start in range(0, shape[0], thickness):
        rows = slice(start, min(start + thickness, shape[0]))
        if axes is None:
            yield rows, _sheared_slab(scores, to_scores, shape, rows)
        else:
            yield rows, _slab_along_axes(scores, to_scores, axes, shape, rows)


def _matching_axes(to_scores: np.ndarray, shape: tuple[int, ...]) -> list[int] | None:
    """Which axis of the scores each axis of the file runs along; None where the grids are rotated or sheared."""
    voxels = np.abs(to_scores[:3, :3])
    axes = voxels.argmax(axis=0).tolist()
    drift = voxels * (np.array(shape) - 1)
    drift[axes, range(3)] = 0
    return axes if sorted(axes) == [0, 1, 2] and drift.sum(axis=1).max() < _TOLERANCE else None


def _slab_along_axes(
    scores: torch.Tensor, to_scores: np.ndarray, axes: list[int], shape: tuple[int, ...], rows: slice
) -> torch.Tensor:
    order = [0, *(1 + axis for axis in axes)]
    in_file_order = scores.permute(order)
    sizes = in_file_order.shape[1:]
    positions = [
        (to_scores[axis, number] * np.arange(n) + to_scores[axis, 3]).clip(0, size - 1)
        for number, (axis, n, size) in enumerate(zip(axes, shape, sizes, strict=True))
    ]
    same_voxels = all(map(_is_every_voxel, positions, sizes))
    needed, positions[0] = _needed_voxels(positions[0][rows])
    slab = in_file_order[:, needed]
    if same_voxels:
        return slab.flip([1 + number for number, axis in enumerate(axes) if to_scores[axis, number] < 0]).float()
    weights = [_weights(*axis).to(scores.device) for axis in zip(positions, slab.shape[1:], strict=True)]
    back = np.argsort(axes).tolist()
    slab = slab.permute(0, *(1 + axis for axis in back)).float()
    return resample_axes(slab[None], [weights[axis] for axis in back])[0].permute(order)


def _is_every_voxel(positions: np.ndarray, size: int) -> bool:
    """Whether samples lie on all voxels of an axis in turn, forwards or backwards."""
    return len(positions) == size and np.abs(np.sort(positions) - np.arange(size)).max() < 1e-4


def _needed_voxels(positions: np.ndarray) -> tuple[slice, np.ndarray]:
    """The voxels of an axis that samples lie on or between, and the samples' positions among these."""
    # What rounding made of a whole number must not add a voxel, nor lose one.
    low, high = int(np.floor(positions.min() + 1e-4)), int(np.ceil(positions.max() - 1e-4))
    return slice(low, high + 1), positions - low


def _weights(positions: np.ndarray, size: int) -> torch.Tensor:
    """The matrix (1, samples, size) of linear interpolation."""
    return linear_interpolation_matrix(torch.from_numpy(positions)[None, :, None], size).float()


def _sheared_slab(scores: torch.Tensor, to_scores: np.ndarray, shape: tuple[int, ...], rows: slice) -> torch.Tensor:
    first = torch.from_numpy(to_scores).clone()
    first[:, 3] += rows.start * first[:, 0]
    resample = SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float32)
    source = MetaTensor(scores.float(), affine=torch.eye(4, dtype=torch.float64))
    return convert_to_tensor(resample(source, dst_affine=first, spatial_size=(rows.stop - rows.start, *shape[1:])))
