"""Loading one volume of any supported file type: here is decided what a file is, and whether it can be trusted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from pgl_ext.files import pointer_problem
from pgl_ext.transforms.checks import BadVolumeError, check_affine
from pgl_ext.transforms.dicom import read_dicom, series_files
from pgl_ext.transforms.formats import (
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    SUPPORTED,
    SUPPORTED_SUFFIXES,
    file_suffix,
    is_dicom_file,
)
from pgl_ext.transforms.itk_files import read_itk
from pgl_ext.transforms.nifti import nifti_grid, read_nifti

__all__ = ["LoadVolumed", "read_grid", "series_files"]


class LoadVolumed(MapTransform):
    """Load single-channel 3D volumes from NIfTI, NRRD, MetaImage or DICOM.

    Each key's path becomes a float32 :class:`monai.data.MetaTensor` of shape ``(1, X, Y, Z)``. Its ``affine`` maps
    voxel indices to RAS+ millimetres, whatever the file's axes and units; ``meta["filename_or_obj"]`` keeps the path,
    so that ``SaveImaged`` names its outputs after it. Trailing dimensions of size 1 are dropped.

    A folder is read as a DICOM series: the one named by the item's ``"series_uid"``, or the only one in the folder. Its
    slices, or the frames of a file, must lie at even steps along their normal. Files that do not say how their axes lie
    are read only with the item's ``"orientation"``, such as ``"LAS"``.

    Args:
        keys: keys of the items whose values are paths.
        allow_missing_keys: don't raise if a key is absent.

    Raises:
        FileNotFoundError: a path does not exist.
        BadVolumeError: a file is of an unsupported type, damaged, or leaves its grid or values open, or does not hold a
            single-channel 3D volume; a ``ValueError``.
        ImportError: ``itk`` or ``pydicom`` is needed and not installed.
    """

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = _load(str(out[key]), out)
        return out


def read_grid(item: Mapping[str, Any]) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape in voxels, and affine (4, 4), voxel index to RAS mm, of an item's image.

    They are as :class:`LoadVolumed` has them, which raises the same errors; of NIfTI only the header is read.
    """
    path = str(item["image"])
    if file_suffix(path) not in NIFTI_SUFFIXES or not os.path.isfile(path):
        image = LoadVolumed("image")(dict(item))["image"]
        return image.shape[1:], image.affine.numpy()
    with _named_errors(path, path):
        shape, affine = nifti_grid(path, item.get("orientation"))
    check_affine(affine, path)
    return shape, affine


def _load(path: str, item: Mapping[str, Any]) -> MetaTensor:
    series_uid, orientation = item.get("series_uid"), item.get("orientation")
    name = f"{path} (series {series_uid})" if series_uid else path
    suffix = file_suffix(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"Volume {path} does not exist: check the data list and the dataset folder.")
    if os.path.isfile(path) and suffix not in SUPPORTED_SUFFIXES and not is_dicom_file(path):
        raise BadVolumeError(
            f"{path} is of an unsupported type {suffix!r}: {SUPPORTED}. Convert the file or remove it."
        )
    with _named_errors(path, name):
        if os.path.isdir(path):
            array, affine = read_dicom(series_files(path, series_uid), name)
        elif suffix in NIFTI_SUFFIXES:
            array, affine = read_nifti(path, orientation)
        elif suffix in ITK_SUFFIXES:
            array, affine = read_itk(path, orientation)
        else:
            array, affine = read_dicom([path], name)
    array = _as_volume(array, name)
    check_affine(affine, name)
    # As MONAI's readers have it; NaN stands for "no channel".
    meta = {"filename_or_obj": path, "original_affine": affine, "spatial_shape": np.array(array.shape), "space": "RAS"}
    meta["original_channel_dim"] = float("nan")
    return MetaTensor(torch.from_numpy(array)[None], affine=torch.from_numpy(affine), meta=meta)


@contextlib.contextmanager
def _named_errors(path: str, name: str) -> Iterator[None]:
    """Name the file where a reader fails, which does not say what to do."""
    try:
        yield
    except (ImportError, MemoryError, BadVolumeError):
        raise
    except Exception as error:  # what damaged files make of the readers has no bounds
        if pointer := pointer_problem(path):
            raise BadVolumeError(f"{name} {pointer}") from error
        raise BadVolumeError(
            f"Cannot read {name}: {_first_line(error)}. The file may be truncated, damaged or of another type than its "
            "name says: restore or convert it, or remove it from the data."
        ) from error


def _as_volume(array: np.ndarray, name: str) -> np.ndarray:
    """``array`` as float32 (X, Y, Z), without trailing dimensions of size 1."""
    # NIfTI stores colour as a compound type.
    shape = (*array.shape, len(array.dtype.names)) if array.dtype.names else array.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise BadVolumeError(
            f"{name} has shape {tuple(shape)}: only single-channel 3D volumes are supported. Extract one channel or "
            "time point into a file of its own."
        )
    if np.iscomplexobj(array):
        raise BadVolumeError(f"{name} has complex values: convert it to their magnitude.")
    return np.asarray(array, dtype=np.float32).reshape(shape)


def _first_line(error: Exception) -> str:
    """A reader's message without the C++ source locations and type lists that ITK adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "/ITK/" not in line]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
