"""File formats by name, DICOM headers, and the check whether DICOM slices form a volume."""

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
    return next((suffix for suffix in SUPPORTED_SUFFIXES if name.endswith(suffix)), Path(name).suffix)


def is_dicom_file(path: str | os.PathLike) -> bool:
    """Whether ``path`` starts with the DICOM preamble: 128 free bytes, then ``DICM``."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def dicom_header(path: str, tags: list[str]) -> Any:
    """The ``pydicom.Dataset`` of the elements of a DICOM file that have these keywords.

    Raises:
        ImportError: ``pydicom`` is not installed.
        OSError: the file cannot be read, or is not DICOM.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ImportError(f"Reading the DICOM file {path} needs the package 'pydicom': pip install pydicom") from error

    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except pydicom.errors.InvalidDicomError as error:
        raise OSError(str(error)) from error


def problem_of_series(files: Sequence[str]) -> str:
    """Why these slices are no volume, and what helps; empty where they are one or have no positions.

    Readers assume even steps between slices and axes at right angles. With missing slices, several acquisitions in one
    series or a tilted gantry, anatomy would be squeezed or skewed.

    Args:
        files: of one series, in the order of their slices.

    Raises:
        ImportError: ``pydicom`` is not installed.
        OSError: a file cannot be read.
    """
    tags = ["ImagePositionPatient", "ImageOrientationPatient"]
    headers = [dicom_header(file, tags) for file in files]
    if len(files) < 2 or not all(tag in header for header in headers for tag in tags):
        return ""
    places, orientations = (np.array([header[tag].value for header in headers], dtype=np.float64) for tag in tags)
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        return "its slices lie in several planes, as those of a localizer: leave it out"
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    along = np.diff(places @ normal)
    steps = np.abs(along)
    median = np.median(steps)
    if steps.min() < _SAME_PLACE or np.ptp(np.sign(along)):
        return "several slices lie at one place, as of several phases or acquisitions: make a series of each"
    if np.abs(steps - median).max() > max(_UNEVEN * median, _UNEVEN) + 1e-6:
        return (
            f"its slices lie {steps.min():.4g} to {steps.max():.4g} mm apart: complete the series, or convert it to a "
            "file with even steps"
        )
    total = places[-1] - places[0]
    drift = np.linalg.norm(total - (total @ normal) * normal)
    if drift > _DRIFT:
        return (
            f"its slices shift by {drift:.4g} mm from the first to the last, as with a tilted gantry: convert it to "
            "NIfTI with a tool that corrects this"
        )
    return ""
