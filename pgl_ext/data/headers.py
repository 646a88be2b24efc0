"""Size and spacing of scans, from their headers where these can be read alone."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from monai.data.utils import affine_to_spacing

from pgl_ext.transforms.checks import BadVolumeError
from pgl_ext.transforms.load import read_grid

__all__ = ["Header", "read_header", "read_headers"]


class Header(NamedTuple):
    """Size and spacing of a scan along x, y and z (right, anterior, superior).

    Args:
        shape: in voxels.
        spacing: in mm.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]


def read_header(item: Mapping[str, Any]) -> Header:
    """The header of one scan, see :func:`~pgl_ext.transforms.load.read_grid`.

    Args:
        item: with ``"image"``, and what else :class:`~pgl_ext.transforms.LoadVolumed` reads it by.

    Raises:
        BadVolumeError, FileNotFoundError: the scan cannot be read.
    """
    path, (shape, affine) = item["image"], read_grid(item)
    shape = shape[:3]
    axes = nib.orientations.io_orientation(affine)[:, 0]
    if len(shape) < 3 or np.isnan(axes).any():
        raise BadVolumeError(f"{path} has the shape {tuple(shape)} or no axes: give scans of three dimensions.")
    order = np.argsort(axes)
    spacing = affine_to_spacing(affine, 3)
    return Header(tuple(int(shape[axis]) for axis in order), tuple(float(spacing[axis]) for axis in order))


def read_headers(items: list[dict[str, Any]]) -> list[Header]:
    """The headers of many scans, in their order; see :func:`read_header`."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read_header, items))
