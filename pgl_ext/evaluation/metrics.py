"""How well a segmentation agrees with its reference, in volume and in surface, per case and organ.

==================  ==================  ==============  ===================================  ===============
reference           prediction          Dice, IoU, NSD  HD, HD95                             status
==================  ==================  ==============  ===================================  ===============
some voxels         some voxels         measured        measured                             ok
some voxels         empty               0               diagonal of the volume (a penalty)   missed
empty               some voxels         0               diagonal of the volume (a penalty)   spurious
empty               empty               NaN             NaN                                  absent
not annotated       anything            NaN             NaN                                  not annotated
==================  ==================  ==============  ===================================  ===============

NaN takes no part in means. The penalty keeps a method that finds nothing from looking better than one that tries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects
from scipy.spatial import KDTree

__all__ = ["METRICS", "STATUSES", "TOLERANCE_MM", "Metric", "organ_scores", "surface_voxels"]


class Metric(NamedTuple):
    """How a metric is shown, title with unit and digits after the point, and the value of a perfect segmentation."""

    title: str
    digits: int
    perfect: float

    @property
    def higher_is_better(self) -> bool:
        return self.perfect > 0


METRICS = {
    "dice": Metric("Dice", 3, 1.0),
    "iou": Metric("IoU", 3, 1.0),
    "hd_mm": Metric("HD (mm)", 1, 0.0),
    "hd95_mm": Metric("HD95 (mm)", 1, 0.0),
    "nsd": Metric("NSD", 3, 1.0),
}
"""By column of ``cases.csv``."""

TOLERANCE_MM = 2.0
"""Distance up to which surfaces agree in the normalised surface distance, unless told otherwise."""

STATUSES = ("ok", "missed", "spurious", "absent", "not annotated")

# A search tree of surface voxels is quicker than a map of the distances in the volume and takes a thousandth of its
# memory, but not for the ragged surfaces, of millions of voxels, that an untrained network predicts.
_TREE_LIMIT = 300_000


def organ_scores(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    annotated: bool = True,
    tolerance_mm: float = TOLERANCE_MM,
) -> dict[str, float | str]:
    """Compare one organ of one case.

    With P and R the sets of voxels, Dice = 2 |P ∩ R| / (|P| + |R|) and IoU = |P ∩ R| / |P ∪ R|. The Hausdorff distance
    (HD) is the largest distance from a surface voxel of either mask to the nearest surface voxel of the other, HD95 the
    larger of the two directed 95th percentiles; see :func:`surface_voxels`. The normalised surface distance (NSD) is
    the share of both masks' surface voxels that lie within the tolerance of the other's surface, as MONAI's
    ``compute_surface_dice`` has it.

    Args:
        prediction: bool (X, Y, Z).
        reference: bool (X, Y, Z) on the same grid; not looked at where the organ is not annotated.
        spacing: mm per voxel of each axis.
        annotated: whether it is known where the organ lies.
        tolerance_mm: of the NSD.

    Returns:
        ``dice``, ``iou``, ``hd_mm``, ``hd95_mm``, ``nsd``, the volumes ``reference_ml`` and ``predicted_ml``, and
        ``status``; where a mask is empty as the table of this module says.

    Raises:
        ValueError: the masks differ in shape.
    """
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(
            f"prediction and reference must be masks of one shape (X, Y, Z), got {prediction.shape} and "
            f"{reference.shape}: compare them on the grid of the original image."
        )
    voxel_ml = math.prod(spacing) / 1000
    predicted = int(np.count_nonzero(prediction))
    expected = int(np.count_nonzero(reference)) if annotated else math.nan
    volumes = {"reference_ml": expected * voxel_ml, "predicted_ml": predicted * voxel_ml}
    if predicted and expected > 0:
        common = int(np.count_nonzero(prediction & reference))
        dice, iou = 2 * common / (predicted + expected), common / (predicted + expected - common)
        values, status = (dice, iou, *_surface_scores(prediction, reference, spacing, tolerance_mm)), "ok"
    elif annotated and (predicted or expected):
        diagonal = math.hypot(*np.multiply(prediction.shape, spacing))
        values, status = (0.0, 0.0, diagonal, diagonal, 0.0), "missed" if expected else "spurious"
    else:
        values, status = (math.nan,) * len(METRICS), "absent" if annotated else "not annotated"
    return {**dict(zip(METRICS, values, strict=True)), **volumes, "status": status}


def surface_voxels(mask: np.ndarray) -> np.ndarray:
    """Indices (N, 3) of the voxels of a mask, bool (X, Y, Z), not empty, with one of six neighbours outside it.

    Outside the volume there is nothing, so that voxels at its border are surface.
    """
    # Only the bounding box, which for most organs is a small part of the volume.
    (box,) = find_objects(mask.view(np.uint8), max_label=1)
    inside = mask[box]
    return np.argwhere(inside & ~binary_erosion(inside)) + [axis.start for axis in box]


def _surface_scores(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance_mm: float
) -> tuple[float, float, float]:
    """HD and HD95 in mm, and NSD, of two masks that are not empty."""
    surfaces = surface_voxels(prediction), surface_voxels(reference)
    directed = [_distances(start, end, spacing) for start, end in (surfaces, surfaces[::-1])]
    hd, hd95 = max(d.max() for d in directed), max(np.percentile(d, 95) for d in directed)
    # A distance of just the tolerance, such as one or two voxels, counts however spacings are rounded.
    return hd.item(), hd95.item(), np.mean(np.concatenate(directed) <= tolerance_mm + 1e-4).item()


def _distances(start: np.ndarray, end: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distance in mm from each start voxel (N, 3) to the nearest end voxel (M, 3), in voxel indices."""
    if len(start) <= _TREE_LIMIT:
        return KDTree(end * np.asarray(spacing)).query(start * np.asarray(spacing))[0]
    low = np.minimum(start.min(0), end.min(0))
    outside = np.ones(np.maximum(start.max(0), end.max(0)) - low + 1, dtype=bool)
    outside[tuple((end - low).T)] = False
    return distance_transform_edt(outside, spacing)[tuple((start - low).T)]
