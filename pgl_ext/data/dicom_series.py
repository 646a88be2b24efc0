"""Whether the slices of a DICOM series make up one volume with a regular grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pgl_ext.data.datalist import dicom_header

__all__ = ["problem_of_series"]

_UNEVEN = 0.1  # share of the median step by which steps may differ, or mm, as positions are often rounded
_SAME_PLACE = 0.01  # mm
_DRIFT = 1.0  # mm from the first slice to the last, across the stack


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
