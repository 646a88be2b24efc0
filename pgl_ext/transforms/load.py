"""Loading one volume of any supported file type."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from monai.config import KeysCollection
from monai.data import ImageReader, ITKReader, MetaTensor, NibabelReader
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
    slices must lie at even steps along their normal.
    NRRD goes through ITK too: unlike MONAI's ``NrrdReader`` it reads files that lack ``space directions`` and gets
    every NRRD space right. ITK is imported only when such a file is read.

    Args:
        keys: keys of the items whose values are paths.
        allow_missing_keys: don't raise if a key is absent.

    Raises:
        FileNotFoundError: a path does not exist.
        BadVolumeError: a file is of an unsupported type, cannot be read, or does not hold a single-channel 3D volume; a
            ``ValueError``.
        ImportError: ``itk``, or ``pydicom`` for a series, is needed and not installed.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = _load(str(out[key]), out.get("series_uid"))
        return out


def _load(path: str, series_uid: str | None) -> MetaTensor:
    reader = _reader_for(path, series_uid)
    # LoadImage would do the same two steps, but builds every reader MONAI knows each time and, should this one fail,
    # tries all the others: slow, noisy, and the error that counts is lost.
    try:
        array, meta = reader.get_data(reader.read(path))
    except (ImportError, MemoryError, BadVolumeError):
        raise
    except Exception as error:  # what damaged files make of the readers has no bounds
        raise BadVolumeError(
            f"Cannot read {_describe(path, series_uid)}: {_first_line(error)}. The file may be truncated, damaged or "
            "of another type than its name says: restore or convert it, or remove it from the data."
        ) from error
    array = _as_volume(array, _describe(path, series_uid))
    meta["filename_or_obj"] = path
    image = MetaTensor.ensure_torch_and_prune_meta(array, meta)
    return EnsureChannelFirst(channel_dim="no_channel")(image)


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


def _reader_for(path: str, series_uid: str | None) -> ImageReader:
    if not os.path.exists(path):
        raise FileNotFoundError(f"Volume {path} does not exist: check the data list and the dataset folder.")
    suffix = file_suffix(path)
    if os.path.isfile(path):
        if suffix in NIFTI_SUFFIXES:
            return NibabelReader()
        if suffix not in SUPPORTED_SUFFIXES and not is_dicom_file(path):
            raise BadVolumeError(
                f"{path} is of an unsupported type {suffix!r}: {SUPPORTED}. Convert the file or remove it."
            )
    try:
        import itk  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Reading {path} needs the package 'itk': pip install itk") from error
    return _SeriesReader(series_name=series_uid or "")


class _SeriesReader(ITKReader):
    """ITKReader that knows a DICOM series by its plain SeriesInstanceUID.

    MONAI's reader has GDCM append further tags to the UID, so that ``series_name`` cannot be the UID that DICOM
    headers and data lists hold; and of several series in a folder it takes the first.
    """

    def read(self, data: str, **kwargs):
        import itk

        if os.path.isdir(data):
            folder, data = data, series_files(data, self.series_name)
            problem = problem_of_series(data)
            if problem:
                raise BadVolumeError(f"{_describe(folder, self.series_name)} is no regular volume: {problem}.")
        _check_components(data if isinstance(data, str) else data[0])
        return itk.imread(data, **self.kwargs, **kwargs)


def _check_components(path: str) -> None:
    """Turn colour images away, for most of which ITK's Python package has no type and says so at length."""
    import itk

    image_io = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
    # Without one the file cannot be read at all, and reading it says why.
    if image_io:
        image_io.SetFileName(path)
        image_io.ReadImageInformation()
        components = image_io.GetNumberOfComponents()
        if components > 1:
            shape = [image_io.GetDimensions(axis) for axis in range(image_io.GetNumberOfDimensions())]
            _check_shape([*shape, components], path)


def series_files(directory: str, series_uid: str) -> list[str]:
    """The files of one DICOM series in the order of their slices along the scan axis."""
    import itk

    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(False)
    names.SetDirectory(directory)
    found = list(names.GetSeriesUIDs())
    if series_uid in found or (not series_uid and len(found) == 1):
        return list(names.GetFileNames(series_uid or found[0]))
    if not found:
        raise BadVolumeError(f"Folder {directory} holds no DICOM series: give a folder of DICOM files, or a file.")
    if series_uid:
        raise BadVolumeError(f"Folder {directory} has no DICOM series {series_uid!r}, only {', '.join(found)}.")
    raise BadVolumeError(
        f"Folder {directory} holds {len(found)} DICOM series: set 'series_uid' to one of {', '.join(found)}."
    )


def _describe(path: str, series_uid: str | None) -> str:
    return f"{path} (series {series_uid})" if series_uid else path


def _first_line(error: Exception) -> str:
    """What a reader said, without the C++ source locations and type lists of ITK's longer messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "/ITK/" not in line]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
