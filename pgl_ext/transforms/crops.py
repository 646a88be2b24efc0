"""Crops of volumes that may lie on disk: drawn, read, padded where they hang over, and resized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.utils import convert_to_tensor, ensure_tuple_rep

from pgl_ext.geometry import resample_axes

__all__ = [
    "check_factors",
    "check_probability",
    "checked_size",
    "cut_view",
    "draw_crop_sizes",
    "pad_crop",
    "pad_to_minimum",
    "read_crop",
    "resize_crop",
    "resize_crop_nearest",
    "start_limits",
]


def check_factors(name: str, factors: Sequence[float]) -> None:
    """Raise a ValueError unless ``factors`` are two increasing positive numbers."""
    if len(factors) != 2 or not 0 < factors[0] <= factors[1]:
        raise ValueError(f"{name} must be two increasing positive factors, got {tuple(factors)}.")


def check_probability(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}.")


def checked_size(name: str, size: Sequence[int] | int) -> tuple[int, int, int]:
    """Three positive numbers of voxels; raises a ValueError otherwise."""
    size = ensure_tuple_rep(size, 3)
    if min(size) < 1:
        raise ValueError(f"{name} must be positive, got {size}.")
    return size


def draw_crop_sizes(
    random: np.random.RandomState, count: int, size: Sequence[int], scale_range: Sequence[float]
) -> np.ndarray:
    """Sizes of crops (count, 3) in voxels: ``size`` times a factor per crop and axis."""
    scale = random.uniform(*scale_range, size=(count, 3))
    return np.maximum(1, np.round(size * scale).astype(np.int64))


def start_limits(volume_size: Sequence[int], crop_size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest first voxel of crops (..., 3); one larger than the volume hangs over it on both sides."""
    room = volume_size - crop_size
    return np.minimum(room, 0), np.maximum(room, 0)


def read_crop(volume: Any, start: Sequence[int], size: Sequence[int]) -> tuple[torch.Tensor, np.ndarray]:
    """Read the part of a crop that lies in the volume, and nothing else of it.

    Args:
        volume: (C, X, Y, Z) array or tensor with ``shape`` and slicing.
        start: first voxel of the crop per axis; may be negative.
        size: of the crop, in voxels.

    Returns:
        the part as float32 (C, x, y, z), and how many voxels of the crop lie before and after the volume (3, 2).
    """
    stop = np.add(start, size)
    first, last = np.maximum(start, 0), np.minimum(stop, volume.shape[1:])
    crop = volume[(slice(None), *map(slice, first, last))]
    if isinstance(crop, np.ndarray):
        # PyTorch refuses negative strides and warns of read-only memory, such as a memory map's.
        crop = np.require(crop, requirements="CW")
    return convert_to_tensor(crop, track_meta=False).float(), np.stack([first - start, stop - last], axis=1)


def pad_crop(crop: torch.Tensor, margins: np.ndarray, value: float) -> torch.Tensor:
    """Pad (C, X, Y, Z) with a value by so many voxels before and after it on each axis, (3, 2)."""
    return torch.nn.functional.pad(crop, margins[::-1].flatten().tolist(), value=value)


def pad_to_minimum(crop: torch.Tensor, margins: np.ndarray) -> torch.Tensor:
    """Pad each channel of (C, X, Y, Z) with its own smallest value; see :func:`pad_crop`."""
    return torch.cat([pad_crop(channel[None], margins, float(channel.min())) for channel in crop])


def cut_view(
    volume: Any, start: np.ndarray, size: np.ndarray, flip: np.ndarray, view_size: Sequence[int]
) -> torch.Tensor:
    """One view (C, X, Y, Z) of a volume: a crop, padded with its smallest values, resized and flipped."""
    crop, margins = read_crop(volume, start, size)
    return resize_crop(pad_to_minimum(crop, margins), view_size, flip)


def resize_crop(crop: torch.Tensor, new_size: Sequence[int], flip: Sequence[bool]) -> torch.Tensor:
    """Resize (C, X, Y, Z) linearly, half-pixel as MONAI's ``Resized(mode="trilinear")``, and flip it."""
    matrices = [_linear_matrix(*axis) for axis in zip(crop.shape[1:], new_size, flip, strict=True)]
    return resample_axes(crop[None], matrices)[0]


def _linear_matrix(size: int, new_size: int, flip: bool) -> torch.Tensor:
    """Matrix (1, new_size, size) that resizes an axis linearly: what resizing makes of each voxel alone."""
    columns = torch.nn.functional.interpolate(torch.eye(size)[None], size=new_size, mode="linear")
    return (columns.flip(-1) if flip else columns).mT


def resize_crop_nearest(crop: torch.Tensor, new_size: Sequence[int], flip: Sequence[bool]) -> torch.Tensor:
    """Resize and flip a crop (C, X, Y, Z) of a label map by nearest values, half-pixel as ``mode="nearest-exact"``."""
    for axis, (size, new, flipped) in enumerate(zip(crop.shape[1:], new_size, flip, strict=True), start=1):
        nearest = ((torch.arange(new, dtype=torch.float64) + 0.5) * size / new).long()
        crop = crop.index_select(axis, nearest.flip(0) if flipped else nearest)
    return crop
