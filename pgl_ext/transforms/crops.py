"""Reading a crop of a volume that may lie on disk, padding it where it hangs over, and resizing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.utils import convert_to_tensor

from pgl_ext.geometry import resample_axes

__all__ = ["pad_crop", "read_crop", "resize_crop", "resize_crop_nearest"]


def read_crop(volume: Any, start: Sequence[int], size: Sequence[int]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Read the part of a crop that lies in the volume, and nothing else of it.

    Args:
        volume: (C, X, Y, Z) array or tensor with ``shape`` and slicing.
        start: first voxel of the crop per axis; may be negative.
        size: of the crop, in voxels.

    Returns:
        the part as float32 (C, x, y, z), and per axis how many voxels of the crop lie before and after the volume.
    """
    inside = [slice(max(0, a), min(n, a + c)) for a, c, n in zip(start, size, volume.shape[1:], strict=True)]
    crop = _as_tensor(volume[(slice(None), *inside)]).float()
    margins = [(int(s.start - a), int(a + c - s.stop)) for s, a, c in zip(inside, start, size, strict=True)]
    return crop, margins


def _as_tensor(crop: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(crop, torch.Tensor):
        return convert_to_tensor(crop, track_meta=False)
    # PyTorch refuses negative strides and warns of read-only memory, such as a memory map's.
    usable = crop.flags.writeable and min(crop.strides) >= 0
    return torch.from_numpy(crop if usable else crop.copy())


def pad_crop(crop: torch.Tensor, margins: Sequence[tuple[int, int]], value: float) -> torch.Tensor:
    """Pad (C, X, Y, Z) with a value by (before, after) voxels per axis."""
    if not any(before or after for before, after in margins):
        return crop
    flat = [width for pair in reversed(margins) for width in pair]
    return torch.nn.functional.pad(crop, flat, value=value)


def resize_crop(crop: torch.Tensor, new_size: Sequence[int], flip: Sequence[bool]) -> torch.Tensor:
    """Resize (C, X, Y, Z) linearly, half-pixel as MONAI's ``Resized(mode="trilinear")``, and flip it."""
    sizes = zip(crop.shape[1:], new_size, flip, strict=True)
    return resample_axes(crop[None], [_linear_matrix(n, p, f) for n, p, f in sizes])[0]


def _linear_matrix(size: int, new_size: int, flip: bool) -> torch.Tensor:
    """Matrix (1, new_size, size) that resizes an axis linearly: what resizing makes of each voxel alone."""
    columns = torch.nn.functional.interpolate(torch.eye(size)[None], size=new_size, mode="linear")
    return (columns.flip(-1) if flip else columns).mT


def resize_crop_nearest(crop: torch.Tensor, new_size: Sequence[int], flip: Sequence[bool]) -> torch.Tensor:
    """Resize and flip a crop (C, X, Y, Z) of a label map by nearest values, half-pixel as ``mode="nearest-exact"``."""
    for axis, (size, new, flipped) in enumerate(zip(crop.shape[1:], new_size, flip, strict=True), start=1):
        nearest = ((torch.arange(new, dtype=torch.float64) + 0.5) * size / new).floor().long()
        crop = crop.index_select(axis, nearest.flip(0) if flipped else nearest)
    return crop
