"""Size and spacing of scans, from their headers where these can be read alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from monai.data.utils import affine_to_spacing

from pgl_ext.transforms.checks import BadVolumeError
from pgl_ext.transforms.formats import NIFTI_SUFFIXES, file_suffix
from pgl_ext.transforms.load import LoadVolumed

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
    """The header of one scan; scans of other formats than NIfTI are loaded for it.

    Args:
        item: with ``"image"``, and ``"series_uid"`` of a DICOM series.

    Raises:
        BadVolumeError, FileNotFoundError: the scan cannot be read.
    """
    path = str(item["image"])
    if os.path.isfile(path) and file_suffix(path) in NIFTI_SUFFIXES:
        try:
            image = nib.load(path)
        except Exception as error:  # what damaged files make of the reader has no bounds
            raise BadVolumeError(f"Cannot read the header of {path}: {error}. Restore or remove the file.") from error
        shape, affine = image.shape[:3], image.affine
    else:
        volume = LoadVolumed("image")(item)["image"]
        shape, affine = volume.shape[1:], volume.affine.numpy()
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
