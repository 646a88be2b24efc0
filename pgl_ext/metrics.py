"""How well a segmentation agrees with its reference: Dice, IoU, and Hausdorff distances in mm, per case and organ.

==================  ==================  ==========  ===================================  ===============
reference           prediction          Dice, IoU   HD, HD95                             status
==================  ==================  ==========  ===================================  ===============
some voxels         some voxels         measured    measured                             ok
some voxels         empty               0           diagonal of the volume (a penalty)   missed
empty               some voxels         0           diagonal of the volume (a penalty)   spurious
empty               empty               NaN         NaN                                  absent
not annotated       anything            NaN         NaN                                  not annotated
==================  ==================  ==========  ===================================  ===============

NaN takes no part in means. The penalty keeps a method that finds nothing from looking better than one that tries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import KDTree

__all__ = ["METRICS", "STATUSES", "organ_scores", "spacing_of", "surface_points"]

METRICS = ("dice", "iou", "hd_mm", "hd95_mm")
STATUSES = ("ok", "missed", "spurious", "absent", "not annotated")


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Distance in mm of neighbouring voxels along each voxel axis of an affine (4, 4), rotated or not."""
    return tuple(float(length) for length in np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0))


def organ_scores(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], annotated: bool = True
) -> dict[str, float | str]:
    """Compare one organ of one case.

    With P and R the sets of voxels, Dice = 2 |P ∩ R| / (|P| + |R|) and IoU = |P ∩ R| / |P ∪ R|. The Hausdorff distance
    (HD) is the largest distance from a surface voxel of either mask to the nearest surface voxel of the other, HD95 the
    larger of the two directed 95th percentiles; see :func:`surface_points`.

    Args:
        prediction: bool (X, Y, Z).
        reference: bool (X, Y, Z) on the same grid; not looked at where the organ is not annotated.
        spacing: mm per voxel of each axis.
        annotated: whether it is known where the organ lies.

    Returns:
        ``dice``, ``iou``, ``hd_mm``, ``hd95_mm``, the volumes ``reference_ml`` and ``predicted_ml``, and ``status``;
        where a mask is empty as the table of this module says.

    Raises:
        ValueError: the masks differ in shape.
    """
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(
            f"prediction and reference must be masks of one shape (X, Y, Z), got {prediction.shape} and "
            f"{reference.shape}: compare them on the grid of the original image."
        )
    millilitres = math.prod(spacing) / 1000
    predicted = int(np.count_nonzero(prediction))
    scores: dict[str, float | str] = {**dict.fromkeys(METRICS, math.nan), "reference_ml": math.nan}
    scores |= {"predicted_ml": predicted * millilitres, "status": "not annotated"}
    if not annotated:
        return scores
    expected = int(np.count_nonzero(reference))
    scores["reference_ml"] = expected * millilitres
    if predicted and expected:
        common = int(np.count_nonzero(prediction & reference))
        scores |= {"dice": 2 * common / (predicted + expected), "iou": common / (predicted + expected - common)}
        scores["hd_mm"], scores["hd95_mm"] = _hausdorff_distances(prediction, reference, spacing)
        scores["status"] = "ok"
    elif predicted or expected:
        diagonal = math.hypot(*(n * s for n, s in zip(prediction.shape, spacing, strict=True)))
        scores |= {"dice": 0.0, "iou": 0.0, "hd_mm": diagonal, "hd95_mm": diagonal}
        scores["status"] = "missed" if expected else "spurious"
    else:
        scores["status"] = "absent"
    return scores


def surface_points(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Centres in mm (N, 3) of a mask's surface voxels: those with one of six neighbours outside it.

    Outside the volume there is nothing, so that voxels at its border are surface.

    Args:
        mask: bool (X, Y, Z), not empty.
        spacing: mm per voxel of each axis.
    """
    # Only the bounding box, which for most organs is a small part of the volume.
    (box,) = find_objects(mask.view(np.uint8), max_label=1)
    inside = mask[box]
    edge = inside & ~binary_erosion(inside)
    corner = [part.start for part in box]
    return (np.argwhere(edge) + corner) * np.asarray(spacing, dtype=np.float64)


def _hausdorff_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> tuple[float, float]:
    """HD and HD95 in mm of two masks that are not empty."""
    points = surface_points(prediction, spacing), surface_points(reference, spacing)
    # A tree of the surfaces' voxels takes a thousandth of the memory of a distance map of the volume.
    directed = [KDTree(a).query(b)[0] for a, b in (points, points[::-1])]
    return max(d.max() for d in directed).item(), max(np.percentile(d, 95) for d in directed).item()
