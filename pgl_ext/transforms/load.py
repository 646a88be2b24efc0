"""Loading one volume of any supported file type: here is decided what a file is, and whether it can be trusted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample

from pgl_ext.errors import few
from pgl_ext.files import pointer_problem
from pgl_ext.settings import parse_bool
from pgl_ext.transforms.checks import BadVolumeError, OtherGridError, check_affine, on_grid_of
from pgl_ext.transforms.dicom import read_dicom, series_files
from pgl_ext.transforms.formats import (
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    SUPPORTED,
    SUPPORTED_SUFFIXES,
    file_suffix,
    image_files,
    is_dicom_file,
)
from pgl_ext.transforms.itk_files import read_itk
from pgl_ext.transforms.nifti import nifti_grid, read_nifti

__all__ = ["LoadVolumed", "read_grid", "series_files"]


class LoadVolumed(MapTransform):
    """Load 3D volumes from NIfTI, NRRD, MetaImage or DICOM.

    Each key's path becomes a float32 :class:`monai.data.MetaTensor` of shape ``(1, X, Y, Z)``. Its ``affine`` maps
    voxel indices to RAS+ millimetres, whatever the file's axes and units; ``meta["filename_or_obj"]`` keeps the path,
    so that ``SaveImaged`` names its outputs after it. Trailing dimensions of size 1 are dropped.

    The entry ``"image"`` may have several channels (C, X, Y, Z): in files of one grid, those behind the first under the
    item's ``"further_channels"``, or along the fourth axis of a NIfTI file. The item's ``"channel_names"`` say what
    they are. A file of four dimensions whose channels nothing names is refused: they may be time points.

    A folder is read as a DICOM series: the one named by the item's ``"series_uid"``, or the only one in the folder. Its
    slices, or the frames of a file, must lie at even steps along their normal. Files that do not say how their axes lie
    are read only with the item's ``"orientation"``, such as ``"LAS"``.

    Args:
        keys: keys of the items whose values are paths.
        allow_missing_keys: don't raise if a key is absent.
        channel_names: the channels that an image has to have, in their order; None: whatever it has. The name of a
            single channel is not compared.
        resample_channels: resample channels on another grid onto that of the first, linearly, instead of raising.

    Raises:
        FileNotFoundError: a path does not exist.
        BadVolumeError: a file is of an unsupported type, damaged, or leaves its grid or values open, or does not hold a
            3D volume; channels are missing, in another order or on another grid; a ``ValueError``.
        ImportError: ``itk`` or ``pydicom`` is needed and not installed.
    """

    def __init__(
        self,
        keys: KeysCollection,
        allow_missing_keys: bool = False,
        channel_names: Sequence[str] | None = None,
        resample_channels: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.channel_names = None if channel_names is None else list(channel_names)
        self.resample_channels = parse_bool(resample_channels, "resample_channels")

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = self._image(data) if key == "image" else _load(str(out[key]), out)
        return out

    def _image(self, item: Mapping[str, Any]) -> MetaTensor:
        files, names = image_files(item), list(item.get("channel_names") or ())
        needed = self.channel_names or names or [None] * len(files)
        count = len(names or files)
        if (count > 1 and count != len(needed)) or (len(needed) > 1 and names and names != needed):
            raise BadVolumeError(
                f"{few(files)}: the channels are {names or count}, but {needed} are needed, in this order. Give a file "
                "for each in this order and with these names, or train with --channel_names that are the data's"
            )
        if len(files) == 1:
            return _load(files[0], item, needed)
        # A series UID is that of the first.
        first, *further = (_load(file, {**item, "series_uid": None} if n else item) for n, file in enumerate(files))
        channels = [first, *(self._on_grid_of(channel, first) for channel in further)]
        return MetaTensor(torch.cat([c.as_tensor() for c in channels]), meta=first.meta)

    def _on_grid_of(self, channel: MetaTensor, first: MetaTensor) -> MetaTensor:
        remedy = "Resample it onto that one, or set --resample_channels true"
        try:
            return on_grid_of(channel, first, "the first channel", remedy)
        except OtherGridError:
            if not self.resample_channels:
                raise
        resample = SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float32)
        return resample(channel, dst_affine=first.affine, spatial_size=first.shape[1:])


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


def _load(path: str, item: Mapping[str, Any], channel_names: Sequence[str | None] = (None,)) -> MetaTensor:
    """Read one file, which has to have as many channels as there are names."""
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
    array = _as_channels(array, name, channel_names, suffix in NIFTI_SUFFIXES)
    check_affine(affine, name)
    # As MONAI's readers have it; NaN stands for "no channel".
    meta = {"filename_or_obj": path, "original_affine": affine, "spatial_shape": np.array(array.shape[1:])}
    meta |= {"space": "RAS", "original_channel_dim": float("nan")}
    return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine), meta=meta)


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


def _as_channels(array: np.ndarray, name: str, names: Sequence[str | None], is_nifti: bool) -> np.ndarray:
    """``array`` as float32 (C, X, Y, Z), without trailing dimensions of size 1; of NIfTI the last axis has channels."""
    # NIfTI stores colour as a compound type.
    shape = (*array.shape, len(array.dtype.names)) if array.dtype.names else array.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    has_channels = is_nifti and len(shape) == 4 and not array.dtype.names
    if len(names) > 1 and (not has_channels or shape[3] != len(names)):
        raise BadVolumeError(
            f"{name} has shape {tuple(shape)}, but the channels {list(names)} are needed: give a file for each, in "
            "this order, or a NIfTI file that has them along its fourth axis."
        )
    if len(names) == 1 and len(shape) != 3:
        named = (
            "; or, where all are channels and no time points, name these in their order: in a data list as "
            '"channel_names": {"0": "T1", "1": "T2"}, and with --channel_names "[\'T1\',\'T2\']"'
        )
        raise BadVolumeError(
            f"{name} has shape {tuple(shape)}, which is no 3D volume. Extract one channel or time point into a file of "
            f"its own{named if has_channels else ''}."
        )
    if np.iscomplexobj(array):
        raise BadVolumeError(f"{name} has complex values: convert it to their magnitude.")
    array = array.reshape(*shape[:3], len(names))
    volume = np.empty((len(names), *shape[:3]), dtype=np.float32)
    # NIfTI has x contiguous, all that follows wants z. A few slices at a time, of which a line of the processor's cache
    # has all, are copied three times faster than all of them at once.
    for start in range(0, shape[2], 16):
        volume[..., start : start + 16] = np.moveaxis(array[:, :, start : start + 16], -1, 0)
    return volume


def _first_line(error: Exception) -> str:
    """A reader's message without the C++ source locations and type lists that ITK adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "/ITK/" not in line]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
