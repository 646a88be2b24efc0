"""What a file is: formats by their names, DICOM files and headers, and whether DICOM slices make up a volume."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "DICOM_SUFFIXES",
    "ITK_SUFFIXES",
    "NIFTI_SUFFIXES",
    "SUPPORTED",
    "SUPPORTED_SUFFIXES",
    "dicom_header",
    "file_suffix",
    "is_dicom_file",
    "problem_of_series",
]

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_SUFFIXES = (".dcm", ".ima")
SUPPORTED_SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES + DICOM_SUFFIXES
"""File endings that can be read, in lower case; a folder is read as a DICOM series."""

SUPPORTED = f"supported are {', '.join(SUPPORTED_SUFFIXES)} and folders that hold a DICOM series"
"""The same in words, for messages."""

_UNEVEN = 0.1  # share of the median step by which steps may differ, or mm, as positions are often rounded
_SAME_PLACE = 0.01  # mm
_DRIFT = 1.0  # mm from the first slice to the last, across the stack


def file_suffix(path: str | os.PathLike) -> str:
    """The supported ending of ``path`` in lower case (``".nii.gz"``), else its last suffix (``".png"``, ``""``)."""
    name = Path(path).name.lower()
    matches = [s for s in SUPPORTED_SUFFIXES if name.endswith(s)]
    return max(matches, key=len) if matches else Path(name).suffix


def is_dicom_file(path: str | os.PathLike) -> bool:
    """Whether ``path`` starts with the DICOM preamble: 128 free bytes, then ``DICM``."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def dicom_header(path: str, tags: Sequence[str]) -> Any:
    """The ``pydicom.Dataset`` of some elements of a DICOM file.

    Args:
        path: the file.
        tags: keywords of the elements.

    Raises:
        ImportError: ``pydicom`` is not installed.
        OSError: the file cannot be read, or is not DICOM.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ImportError(f"Reading the DICOM file {path} needs the package 'pydicom': pip install pydicom") from error

    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
    except pydicom.errors.InvalidDicomError as error:
        raise OSError(str(error)) from error


def problem_of_series(files: Sequence[str]) -> str:
    """Why these slices are no volume, and what helps; empty where they are one.

    An image has one step between its slices and axes at right angles, and readers give it these wherever the slices
    lie: with some missing, several acquisitions in one series, or a tilted gantry, anatomy would be squeezed or skewed.

    Args:
        files: of one series, in the order of their slices. Without positions or orientations nothing can be said.

    Raises:
        ImportError: ``pydicom`` is not installed.
        OSError: a file cannot be read.
    """
    headers = [dicom_header(file, ["ImagePositionPatient", "ImageOrientationPatient"]) for file in files]
    if len(files) < 2 or not all("ImagePositionPatient" in h and "ImageOrientationPatient" in h for h in headers):
        return ""
    places = np.array([header.ImagePositionPatient for header in headers], dtype=np.float64)
    orientations = np.array([header.ImageOrientationPatient for header in headers], dtype=np.float64)
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        return "its slices lie in several planes, as those of a localizer: leave it out"
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    along = np.diff(places @ normal)
    steps, median = np.abs(along), float(np.median(np.abs(along)))
    if steps.min() < _SAME_PLACE or not (np.all(along > 0) or np.all(along < 0)):
        return "several slices lie at one place, as of several phases or acquisitions: make a series of each"
    if np.abs(steps - median).max() > max(_UNEVEN * median, _UNEVEN) + 1e-6:
        return (
            f"its slices lie {steps.min():.4g} to {steps.max():.4g} mm apart: complete the series, or convert it to a "
            "file with even steps"
        )
    total = places[-1] - places[0]
    drift = float(np.linalg.norm(total - (total @ normal) * normal))
    if drift > _DRIFT:
        return (
            f"its slices shift by {drift:.4g} mm from the first to the last, as with a tilted gantry: convert it to "
            "NIfTI with a tool that corrects this"
        )
    return ""
