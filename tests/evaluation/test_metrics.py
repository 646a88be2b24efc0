"""Scores against SimpleITK's filters, brute force over all pairs of surface voxels, and MONAI's metrics.

Tools differ in what a surface is. SimpleITK's Hausdorff filter measures from every voxel of a mask, inner ones too, to
the *set* of the other's voxels; given the surfaces as masks (its own LabelContour filter, on padded volumes so that the
border counts as outside) it measures between surfaces, as MONAI and this package do.
"""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from pgl_ext.evaluation.metrics import METRICS, organ_scores, surface_voxels
from pgl_ext.tools.phantom import generate_case

SPACING = (0.7, 1.3, 3.1)
SHAPE = (22, 18, 12)


def blob(seed: int, level: float = 0.55, shape=SHAPE) -> np.ndarray:
    """A random smooth mask, of several parts and with holes, that touches the border."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.0)
    return noise > np.quantile(noise, level)


def sitk_image(mask: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(mask.astype(np.uint8).transpose(2, 1, 0))
    image.SetSpacing([float(s) for s in SPACING])
    return image


def brute_surface(mask: np.ndarray) -> np.ndarray:
    """Surface voxels (N, 3) in mm, neighbour by neighbour."""
    padded = np.pad(mask, 1)
    found = []
    for voxel in np.argwhere(padded):
        neighbours = [tuple(voxel + sign * step) for step in np.eye(3, dtype=int) for sign in (1, -1)]
        if not all(padded[n] for n in neighbours):
            found.append((voxel - 1) * np.array(SPACING))
    return np.array(found)


MASKS = [
    pytest.param(blob(0), blob(1), id="unrelated"),
    pytest.param(blob(2, 0.6), blob(2, 0.7), id="nested"),
    pytest.param(blob(3, 0.9), blob(4, 0.2), id="small in large"),
    pytest.param(blob(5), blob(5), id="equal"),
]


@pytest.mark.parametrize(("prediction", "reference"), MASKS)
def test_overlap_and_hausdorff_of_simpleitk(prediction, reference):
    scores = organ_scores(prediction, reference, SPACING)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(sitk_image(reference), sitk_image(prediction))
    assert scores["dice"] == pytest.approx(overlap.GetDiceCoefficient(1))
    assert scores["iou"] == pytest.approx(overlap.GetJaccardCoefficient(1))
    contours = [sitk.LabelContour(sitk.ConstantPad(sitk_image(m), [1] * 3, [1] * 3)) for m in (prediction, reference)]
    hausdorff = sitk.HausdorffDistanceImageFilter()
    hausdorff.Execute(*contours)
    assert scores["hd_mm"] == pytest.approx(hausdorff.GetHausdorffDistance(), rel=1e-5)
    voxel_ml = math.prod(SPACING) / 1000
    assert scores["reference_ml"] == pytest.approx(reference.sum() * voxel_ml)
    assert scores["predicted_ml"] == pytest.approx(prediction.sum() * voxel_ml)
    assert scores["status"] == "ok"


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("prediction", "reference"), MASKS)
def test_hausdorff_distances_by_brute_force(prediction, reference, ragged, monkeypatch):
    if ragged:  # as if the surfaces had millions of voxels
        monkeypatch.setattr("pgl_ext.evaluation.metrics._TREE_LIMIT", 0)
    distances = cdist(brute_surface(prediction), brute_surface(reference))
    directed = distances.min(0), distances.min(1)
    scores = organ_scores(prediction, reference, SPACING)
    assert scores["hd_mm"] == pytest.approx(max(d.max() for d in directed))
    assert scores["hd95_mm"] == pytest.approx(max(np.percentile(d, 95) for d in directed))


@pytest.mark.parametrize(("prediction", "reference"), MASKS)
def test_scores_of_monai(prediction, reference):
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference)]
    scores = organ_scores(prediction, reference, SPACING)
    assert scores["dice"] == pytest.approx(compute_dice(*pair).item())
    assert scores["iou"] == pytest.approx(compute_iou(*pair).item())
    for percentile, name in ((None, "hd_mm"), (95, "hd95_mm")):
        expected = compute_hausdorff_distance(*pair, percentile=percentile, spacing=SPACING).item()
        assert scores[name] == pytest.approx(expected, rel=1e-5)
    for tolerance in (0.5, 0.7, 1.0, 2.0, 3.1, 8.0):  # also as large as a voxel's side
        expected = compute_surface_dice(*pair, [tolerance], include_background=True, spacing=SPACING).item()
        scores = organ_scores(prediction, reference, SPACING, tolerance_mm=tolerance)
        assert scores["nsd"] == pytest.approx(expected, rel=1e-5)


def test_scores_do_not_depend_on_the_order_but_the_status_does():
    a, b = blob(0), blob(1)
    forward, backward = organ_scores(a, b, SPACING), organ_scores(b, a, SPACING)
    assert all(forward[name] == backward[name] for name in METRICS)
    assert (forward["reference_ml"], forward["predicted_ml"]) == (backward["predicted_ml"], backward["reference_ml"])


def test_surface_of_a_shifted_box():
    mask = np.zeros((9, 9, 9), dtype=bool)
    mask[2:7, 3:8, 4:9] = True
    voxels = surface_voxels(mask)
    assert len(voxels) == 5**3 - 3**3
    assert np.array_equal(voxels.min(0), [2, 3, 4])
    assert np.array_equal(voxels.max(0), [6, 7, 8])


EMPTY = np.zeros(SHAPE, dtype=bool)
DIAGONAL = math.sqrt(sum((n * s) ** 2 for n, s in zip(SHAPE, SPACING, strict=True)))


@pytest.mark.parametrize(
    ("prediction", "reference", "annotated", "expected", "status"),
    [
        (EMPTY, blob(0), True, (0, 0, DIAGONAL, DIAGONAL, 0), "missed"),
        (blob(0), EMPTY, True, (0, 0, DIAGONAL, DIAGONAL, 0), "spurious"),
        (EMPTY, EMPTY, True, (math.nan,) * 5, "absent"),
        (blob(0), EMPTY, False, (math.nan,) * 5, "not annotated"),
        (EMPTY, EMPTY, False, (math.nan,) * 5, "not annotated"),
    ],
)
def test_empty_masks(prediction, reference, annotated, expected, status):
    scores = organ_scores(prediction, reference, SPACING, annotated)
    assert [scores[name] for name in METRICS] == pytest.approx(expected, nan_ok=True)
    assert scores["status"] == status
    assert math.isnan(scores["reference_ml"]) == (not annotated)


def test_missing_is_never_better_than_any_attempt():
    reference = np.zeros(SHAPE, dtype=bool)
    reference[0, 0, 0] = True
    attempt = np.zeros(SHAPE, dtype=bool)
    attempt[-1, -1, -1] = True
    tried, missed = organ_scores(attempt, reference, SPACING), organ_scores(EMPTY, reference, SPACING)
    assert missed["hd_mm"] > tried["hd_mm"]
    assert missed["dice"] <= tried["dice"]


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"got \(22, 18, 12\) and \(22, 18, 11\).*original image"):
        organ_scores(EMPTY, EMPTY[..., 1:], SPACING)


def test_large_volumes_take_little_memory():
    labels = generate_case(1, (64, 64, 25), "RAS")[1].repeat(8, 0).repeat(8, 1).repeat(8, 2)
    assert labels.shape == (512, 512, 200)
    reference = labels == 4  # the liver
    prediction = np.roll(reference, 3, axis=0)
    tracemalloc.start()
    scores = organ_scores(prediction, reference, (0.8, 0.8, 2.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < scores["hd95_mm"] <= scores["hd_mm"] <= 2.4 + 1e-9
    # A distance map of the volume would take 8 bytes per voxel.
    assert peak < 4 * reference.size
