"""File formats by name, and what an item says of how its files are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "DICOM_SUFFIXES",
    "ITK_SUFFIXES",
    "NIFTI_SUFFIXES",
    "READING_FIELDS",
    "SUPPORTED",
    "SUPPORTED_SUFFIXES",
    "file_suffix",
    "has_known_suffix",
    "image_files",
    "is_dicom_file",
]

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_SUFFIXES = (".dcm", ".ima")
SUPPORTED_SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES + DICOM_SUFFIXES
"""File endings that can be read, in lower case; a folder is read as a DICOM series."""

SUPPORTED = f"supported are {', '.join(SUPPORTED_SUFFIXES)} and folders that hold a DICOM series"
"""The same in words, for messages."""

READING_FIELDS = ("series_uid", "orientation", "channel_names", "further_channels")
"""Fields of an item that say how its files are read: which DICOM series of a folder; the axes of files that name none,
from the first voxel to the last, such as ``"LAS"`` (left, anterior, superior); of several channels the names, and the
files behind that of the first, which is the item's image."""


def file_suffix(path: str | os.PathLike) -> str:
    """The supported ending of ``path`` in lower case (``".nii.gz"``), else its last suffix (``".png"``, ``""``)."""
    name = Path(path).name.lower()
    return next((suffix for suffix in SUPPORTED_SUFFIXES if name.endswith(suffix)), Path(name).suffix)


def image_files(item: Mapping[str, Any]) -> list[str]:
    """The files of an item's image: one, or one for each channel."""
    return [str(item["image"]), *map(str, item.get("further_channels") or ())]


def has_known_suffix(path: str) -> bool:
    """Whether a file's name ends in a suffix that says what the file is."""
    # DICOM files are often named by their UID alone, whose last part then looks like a suffix.
    suffix = file_suffix(path)
    return bool(suffix) and not suffix[1:].isdigit()


def is_dicom_file(path: str | os.PathLike) -> bool:
    """Whether ``path`` starts with the DICOM preamble: 128 free bytes, then ``DICM``."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
