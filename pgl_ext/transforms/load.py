"""Loading one volume of any supported file type."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from monai.data import ITKReader, MetaTensor, NibabelReader
from monai.transforms import EnsureChannelFirst, MapTransform

from pgl_ext.transforms.checks import BadVolumeError
from pgl_ext.transforms.formats import (
    NIFTI_SUFFIXES,
    SUPPORTED,
    SUPPORTED_SUFFIXES,
    file_suffix,
    is_dicom_file,
    problem_of_series,
)

__all__ = ["LoadVolumed", "series_files"]


class LoadVolumed(MapTransform):
    """Load single-channel 3D volumes from NIfTI, NRRD, MetaImage or DICOM.

    Each key's path becomes a float32 :class:`monai.data.MetaTensor` of shape ``(1, X, Y, Z)``. Its ``affine`` maps
    voxel indices to RAS+ millimetres, as MONAI does for every format; ``meta["filename_or_obj"]`` keeps the path, so
    that ``SaveImaged`` names its outputs after it. Trailing dimensions of size 1 are dropped.

    A folder is read as a DICOM series: the one named by the item's ``"series_uid"``, or the only one in the folder. Its
    slices must lie at even steps along their normal. NRRD goes through ITK too: unlike MONAI's ``NrrdReader`` it reads
    files that lack ``space directions`` and gets every NRRD space right.

    Args:
        keys: keys of the items whose values are paths.
        allow_missing_keys: don't raise if a key is absent.

    Raises:
        FileNotFoundError: a path does not exist.
        BadVolumeError: a file is of an unsupported type, cannot be read, or does not hold a single-channel 3D volume; a
            ``ValueError``.
        ImportError: ``itk``, or ``pydicom`` for a series, is needed and not installed.
    """

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = _load(str(out[key]), out.get("series_uid"))
        return out


def _load(path: str, series_uid: str | None) -> MetaTensor:
    name = f"{path} (series {series_uid})" if series_uid else path
    _check_type(path)
    # MONAI's LoadImage would try all other readers after this one, and lose the error that counts.
    try:
        if os.path.isfile(path) and file_suffix(path) in NIFTI_SUFFIXES:
            reader = NibabelReader()
            array, meta = reader.get_data(reader.read(path))
        else:
            array, meta = _read_with_itk(path, series_uid, name)
    except (ImportError, MemoryError, BadVolumeError):
        raise
    except Exception as error:  # what damaged files make of the readers has no bounds
        raise BadVolumeError(
            f"Cannot read {name}: {_first_line(error)}. The file may be truncated, damaged or of another type than its "
            "name says: restore or convert it, or remove it from the data."
        ) from error
    meta["filename_or_obj"] = path
    image = MetaTensor.ensure_torch_and_prune_meta(_as_volume(array, name), meta)
    return EnsureChannelFirst(channel_dim="no_channel")(image)


def _check_type(path: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"Volume {path} does not exist: check the data list and the dataset folder.")
    suffix = file_suffix(path)
    if os.path.isfile(path) and suffix not in SUPPORTED_SUFFIXES and not is_dicom_file(path):
        raise BadVolumeError(
            f"{path} is of an unsupported type {suffix!r}: {SUPPORTED}. Convert the file or remove it."
        )


def _as_volume(array: np.ndarray, name: str) -> np.ndarray:
    """``array`` as float32 (X, Y, Z), without trailing dimensions of size 1."""
    # NIfTI stores colour as a compound type.
    shape = (*array.shape, len(array.dtype.names)) if array.dtype.names else array.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    _check_shape(shape, name)
    return np.asarray(array, dtype=np.float32).reshape(shape)


def _check_shape(shape: Sequence[int], name: str) -> None:
    if len(shape) != 3:
        raise BadVolumeError(
            f"{name} has shape {tuple(shape)}: only single-channel 3D volumes are supported. Extract one channel or "
            "time point into a file of its own."
        )


def _read_with_itk(path: str, series_uid: str | None, name: str) -> tuple[np.ndarray, dict]:
    """As MONAI's ``ITKReader``, which needs more than the UID to name a series and takes the first of several."""
    try:
        import itk
    except ImportError as error:
        raise ImportError(f"Reading {path} needs the package 'itk': pip install itk") from error
    files = path
    if os.path.isdir(path):
        files = series_files(path, series_uid)
        problem = problem_of_series(files)
        if problem:
            raise BadVolumeError(f"{name} is no regular volume: {problem}.")
    _refuse_colour(path if files == path else files[0])
    return ITKReader().get_data(itk.imread(files))


def _refuse_colour(path: str) -> None:
    """Raise for images of several channels: ITK's Python package has no type for most of them."""
    import itk

    image_io = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
    # Without one the file cannot be read at all, and reading it says why.
    if image_io:
        image_io.SetFileName(path)
        image_io.ReadImageInformation()
        channels = image_io.GetNumberOfComponents()
        if channels > 1:
            shape = [image_io.GetDimensions(axis) for axis in range(image_io.GetNumberOfDimensions())]
            _check_shape([*shape, channels], path)


def series_files(directory: str, series_uid: str | None = None) -> list[str]:
    """The files of one DICOM series in the order of their slices along the scan axis.

    Raises:
        BadVolumeError: the folder has no such series, or several where none is named.
    """
    import itk

    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(False)
    names.SetDirectory(directory)
    uids = list(names.GetSeriesUIDs())
    if series_uid in uids or (not series_uid and len(uids) == 1):
        return list(names.GetFileNames(series_uid or uids[0]))
    if not uids:
        raise BadVolumeError(f"Folder {directory} holds no DICOM series: give a folder of DICOM files, or a file.")
    if series_uid:
        raise BadVolumeError(f"Folder {directory} has no DICOM series {series_uid!r}, only {', '.join(uids)}.")
    raise BadVolumeError(
        f"Folder {directory} holds {len(uids)} DICOM series: set 'series_uid' to one of {', '.join(uids)}."
    )


def _first_line(error: Exception) -> str:
    """A reader's message without the C++ source locations and type lists that ITK adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "/ITK/" not in line]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
