"""Probes: the voxels drawn, their features, the classifier, the thresholds, and what a whole probe predicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.metrics import compute_dice
from scipy.ndimage import map_coordinates
from scipy.optimize import brentq, minimize
from scipy.special import expit, log_expit, log_softmax, logit, softmax
from torch import nn

from pgl_ext.evaluation.probes import fit_probe
from pgl_ext.evaluation.probes.linear import LinearClassifier, Statistics, fit_linear
from pgl_ext.evaluation.probes.network import decide, organ_log_odds
from pgl_ext.evaluation.probes.voxels import features_at, sample_voxels
from pgl_ext.geometry import upsample_features
from pgl_ext.task import SegmentationTask

ORGANS = SegmentationTask({"liver": [1], "spleen": [2, 3]})
TUMOUR = SegmentationTask({"kidney": [1, 2], "tumour": [2]}, multi_label=True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_voxels(size: tuple[int, ...]) -> torch.Tensor:
    return torch.cartesian_prod(*map(torch.arange, size))


# --- voxels ---------------------------------------------------------------------------------------------------------


def label_map(size: int = 20) -> torch.Tensor:
    """Mostly background, 200 voxels of 1, 20 of 2 and 20 of 3."""
    labels = torch.zeros(size**3)
    labels[:240] = torch.tensor([1.0] * 200 + [2.0] * 20 + [3.0] * 20)
    return labels[torch.randperm(size**3, generator=torch.Generator().manual_seed(0))].view(1, size, size, size)


def draw(labels: torch.Tensor, task: SegmentationTask, seed: int = 0, annotated=None):
    return sample_voxels(labels, task, 50, 300, torch.Generator().manual_seed(seed), annotated)


@pytest.mark.parametrize("multi_label", [False, True])
def test_voxels_to_ignore_are_not_drawn(multi_label):
    """And count for no organ's size: what is left is as of a map that never had them."""
    task = SegmentationTask({"a": [1], "b": [2]}, multi_label=multi_label, ignore_label=3)
    labels = label_map()
    drawn = draw(labels, task)
    values = labels[0][tuple(drawn.voxels.T)]
    assert [int((values == value).sum()) for value in range(4)] == [300, 50, 20, 0]
    torch.testing.assert_close(drawn.sizes, torch.tensor([200.0, 20.0]))


@pytest.mark.parametrize(
    ("task", "expected", "sizes"),
    [
        # expected: voxels drawn, by label value
        (ORGANS, {0: 300, 1: 50, (2, 3): 40}, [200, 40]),
        (TUMOUR, {(0, 3): 300, 1: 50, 2: 20}, [220, 20]),
    ],
)
def test_strata_are_drawn_in_the_numbers_asked_for_and_weigh_the_same(task, expected, sizes):
    labels = label_map()
    drawn = draw(labels, task)
    values = labels[0][tuple(drawn.voxels.T)]
    assert len(torch.unique(drawn.voxels, dim=0)) == len(drawn.voxels) == sum(expected.values())
    for value, number in expected.items():
        inside = torch.isin(values, torch.tensor(value, dtype=torch.float32))
        assert int(inside.sum()) == number
        np.testing.assert_allclose(drawn.weights[inside].sum(0), 1, rtol=1e-5)
    assert torch.equal(drawn.targets, task.targets(values.view(1, -1, 1, 1)).flatten(1).T)
    assert drawn.sizes.tolist() == pytest.approx(sizes)


def test_more_organs_than_an_integer_has_bits():
    """Each of 105 with 60 voxels, and one that holds the last three of them."""
    organs = {f"organ {value}": [value] for value in range(1, 106)}
    task = SegmentationTask({**organs, "several": [103, 104, 105]}, multi_label=True)
    labels = torch.zeros(20**3)
    labels[: 105 * 60] = torch.arange(1.0, 106.0).repeat(60)
    labels = labels.view(1, 20, 20, 20)
    drawn = draw(labels, task)
    values = labels[0][tuple(drawn.voxels.T)]
    assert [int((values == value).sum()) for value in range(106)] == [300] + [50] * 105
    assert drawn.sizes.tolist() == pytest.approx([60] * 105 + [180])
    assert torch.equal(drawn.targets.T.bool(), task.masks_of_labels(values.view(1, -1, 1, 1)).flatten(1))


@pytest.mark.parametrize(("value", "number"), [(0.0, 300), (1.0, 50)])
def test_a_case_of_background_or_of_one_organ_alone(value, number):
    drawn = draw(torch.full((1, 8, 8, 8), value), ORGANS)
    assert len(drawn.voxels) == number
    assert drawn.sizes.tolist() == pytest.approx([value * 8**3, 0])


def test_an_organ_that_is_not_annotated_makes_no_stratum():
    drawn = draw(label_map(), TUMOUR, annotated=torch.tensor([True, False]))
    assert len(drawn.voxels) == 350
    assert bool((drawn.weights[:, 0] > 0).all())
    assert bool((drawn.weights[:, 1] == 0).all())
    np.testing.assert_allclose(drawn.sizes, [220, np.nan], rtol=1e-5)


def test_a_multi_class_task_needs_all_organs_annotated():
    with pytest.raises(ValueError, match="set multi_label to true"):
        draw(label_map(), ORGANS, annotated=torch.tensor([True, False]))


# --- features -------------------------------------------------------------------------------------------------------

CASES = [
    # map, stride, volume
    [(5, 4, 3), (4, 4, 2), (20, 16, 6)],
    [(5, 4, 3), (4, 4, 2), (17, 13, 5)],
    [(9, 7, 11), (1, 2, 1), (9, 13, 11)],
    [(3, 1, 2), (16, 16, 8), (40, 9, 16)],
]


def by_scipy(features: torch.Tensor, stride: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    """Features (N, C) at all voxels of a volume."""
    places = (all_voxels(size) / torch.tensor(stride)).T.numpy()
    return np.stack([map_coordinates(c, places, order=1, mode="nearest") for c in features[0].numpy()], axis=1)


@pytest.mark.parametrize(("cells", "stride", "size"), CASES)
def test_features_are_those_of_scipy_at_voxel_over_stride(cells, stride, size):
    features = random(1, 3, *cells)
    found = features_at(features, stride, all_voxels(size))
    np.testing.assert_allclose(found, by_scipy(features, stride, size), atol=1e-5)
    # What the classifier is fitted on is what it predicts from.
    torch.testing.assert_close(upsample_features(features, size, stride)[0].flatten(1).T, found)


def test_pooled_statistics_are_those_of_all_places():
    volumes = [[random(1, 2, 4, 4, 4, seed=n) * (1 + n) + n, random(1, 3, 2, 2, 2, seed=n)] for n in range(3)]
    pooled = Statistics.pooled([Statistics.of_maps(maps) for maps in volumes])
    places = [torch.cat([maps[n][0].flatten(1) for maps in volumes], dim=1).numpy() for n in (0, 1)]
    np.testing.assert_allclose(pooled.mean, np.concatenate([p.mean(1) for p in places]), atol=1e-6)
    np.testing.assert_allclose(pooled.deviation, np.concatenate([p.std(1) for p in places]), rtol=1e-5)


# --- the classifier -------------------------------------------------------------------------------------------------

N, CHANNELS = 120, 6
# The last feature is constant.
STATISTICS = Statistics(torch.linspace(-1, 1, CHANNELS), torch.tensor([0.5, 1, 2, 1, 1, 0]))
SCALE = np.array([0.5, 1, 2, 1, 1, 1])


def labelled(multi_label: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, targets and weights of voxels; of a multi-label task the last channel is not known in a third."""
    features = random(N, CHANNELS)
    features[:, -1] = STATISTICS.mean[-1]
    scores = features[:, :3] * 2 + random(N, 3, seed=1)
    weights = random(N, 1, seed=2).abs().repeat(1, 3)
    if not multi_label:
        return features, F.one_hot(scores.argmax(1), 3).float(), weights
    weights[: N // 3, -1] = 0
    return features, (scores > 0.3).float(), weights


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_logistic_regression_minimises_its_objective(multi_label, l2):
    features, targets, weights = labelled(multi_label)
    x, t, w = (value.double().numpy() for value in (features, targets, weights))
    x = (x - STATISTICS.mean.numpy()) / SCALE

    def objective(parameters: np.ndarray) -> float:
        parameters = parameters.reshape(CHANNELS + 1, 3)
        z = x @ parameters[:-1] + parameters[-1]
        if multi_label:
            losses = -(t * log_expit(z) + (1 - t) * log_expit(-z))
            loss = ((w * losses).sum(0) / w.sum(0)).sum()
        else:
            loss = (w[:, 0] * -(t * log_softmax(z, axis=1)).sum(1)).sum() / w[:, 0].sum()
        return loss + l2 / 2 * (parameters[:-1] ** 2).sum()

    found = fit_linear(features, STATISTICS, targets, weights, multi_label, l2)
    best = minimize(objective, np.zeros((CHANNELS + 1) * 3))
    parameters = torch.cat([found.weight, found.bias[None]]).double().numpy()
    assert objective(parameters.ravel()) <= best.fun + 1e-5
    np.testing.assert_allclose(found.weight, best.x.reshape(CHANNELS + 1, 3)[:-1], atol=1e-2)


@pytest.mark.parametrize("l2", [0.5, 0.01])
def test_two_voxels_have_a_weight_that_one_equation_gives(l2):
    """Features -1 and 1 of targets 0 and 1: the derivative of log(1 + exp(-w)) + l2 / 2 * w^2 vanishes."""
    x = torch.tensor([[-1.0], [1.0]])
    plain = Statistics(torch.zeros(1), torch.ones(1))
    found = fit_linear(x, plain, (x > 0).float(), torch.ones(2, 1), True, l2)
    assert float(found.weight) == pytest.approx(brentq(lambda w: l2 * w - expit(-w), 0, 100), abs=1e-3)
    assert float(found.bias) == pytest.approx(0, abs=1e-3)


def test_an_organ_that_is_known_nowhere_is_not_learned():
    features, targets, weights = labelled(multi_label=True)
    weights[:, 1] = 0
    found = fit_linear(features, STATISTICS, targets, weights, True, 0.1)
    assert torch.equal(found.weight[:, 1], torch.zeros(CHANNELS))
    assert bool((found.weight[:, [0, 2]] != 0).any(0).all())


def test_logits_of_a_volume_are_those_of_standardised_interpolated_features():
    size, strides = (13, 12, 7), [(2, 2, 1), (4, 4, 2)]
    maps = [random(1, 4, 7, 6, 7), random(1, 2, 4, 3, 4)]
    weight, bias = random(CHANNELS, 3), random(3, seed=1)
    classifier = LinearClassifier(STATISTICS.mean, torch.from_numpy(SCALE).float(), weight, bias)
    features = np.concatenate([by_scipy(m, stride, size) for m, stride in zip(maps, strides, strict=True)], axis=1)
    expected = (features - STATISTICS.mean.numpy()) / SCALE @ weight.numpy() + bias.numpy()
    found = classifier.logits_of_volume(maps, strides, size)
    assert found.shape == (1, 3, *size)
    np.testing.assert_allclose(found[0].flatten(1).T, expected, atol=1e-4)


# --- thresholds -----------------------------------------------------------------------------------------------------

SHAPE = (6, 5, 4)


def test_log_odds_are_those_of_the_probabilities():
    logits = random(3, *SHAPE)
    expected = logit(softmax(logits.double().numpy(), axis=0))[1:]
    np.testing.assert_allclose(organ_log_odds(logits, ORGANS), expected, atol=1e-5)
    assert torch.equal(organ_log_odds(logits[:2], TUMOUR), logits[:2])
    assert torch.isfinite(organ_log_odds(logits * 1e4, ORGANS)).all()


@pytest.mark.parametrize("sizes", [(0, 0), (1, 30), (17, 120), (119, 5)])
def test_each_organ_gets_its_size(sizes):
    logits = random(2, *SHAPE)
    masks = TUMOUR.masks(decide(logits, TUMOUR, sizes))
    assert masks.flatten(1).sum(1).tolist() == list(sizes)
    # They are the voxels that score highest.
    for mask, scores in zip(masks, logits, strict=True):
        if 0 < mask.sum() < mask.numel():
            assert float(scores[mask].min()) > float(scores[~mask].max())


def test_organs_that_exclude_each_other_share_disputed_voxels():
    logits, sizes = random(3, *SHAPE), (40, 50)
    masks = ORGANS.masks(decide(logits, ORGANS, sizes))
    odds = organ_log_odds(logits, ORGANS)
    least = [o.flatten().sort(descending=True).values[size - 1] for o, size in zip(odds, sizes, strict=True)]
    alone = odds >= torch.stack(least).view(2, 1, 1, 1)
    disputed = alone.all(0)
    assert bool(disputed.any())
    assert not bool(masks.all(0).any())
    assert torch.equal(masks.any(0), alone.any(0))
    assert torch.equal(masks[:, ~disputed], alone[:, ~disputed])


# --- whole probes ---------------------------------------------------------------------------------------------------

TASK = SegmentationTask({"low": [1], "high": [2]})
OVERLAPPING = SegmentationTask({"high": [1, 2], "very high": [2]}, multi_label=True)
SIZE = (16, 14, 10)
FEW = {"voxels_per_organ": 300, "background_voxels": 600}


class Intensities(nn.Module):
    """The volume, its square, and a coarse map of it: an encoder whose features tell organs by intensity."""

    level_strides = ((1, 1, 1), (1, 1, 1), (2, 2, 2))

    def features(self, volumes: torch.Tensor) -> list[torch.Tensor]:
        return [volumes, volumes.square(), volumes[..., ::2, ::2, ::2]]


def volume(seed: int) -> torch.Tensor:
    return random(1, *SIZE, seed=seed)


def case(seed: int, task: SegmentationTask = TASK, **extra) -> dict:
    image = volume(seed)
    if task is TASK:
        labels = torch.where(image < -1, 1.0, torch.where(image > 1, 2.0, 0.0))
    else:
        labels = (image > 0.5).float() + (image > 1.2).float()
    return {"image": image, "label": labels, **extra}


def dice(probe: nn.Module, some: dict, task: SegmentationTask) -> torch.Tensor:
    masks, reference = task.masks(probe(some["image"][None])), task.masks_of_labels(some["label"][None])
    return compute_dice(masks, reference)[0]


@pytest.mark.parametrize("cases", [1, 3])
def test_organs_that_features_tell_apart_are_found(cases):
    probe = fit_probe(Intensities(), [case(seed) for seed in range(cases)], TASK, levels=(0, 1), **FEW)
    found = torch.stack([dice(probe, case(seed), TASK) for seed in (10, 11)])
    # Every volume has nearly as many voxels of an organ as the others.
    assert float(found.min()) > 0.9


def test_organs_get_the_mean_sizes_of_the_cases_that_they_are_annotated_in():
    annotated = [[True, True], [True, False], [True, False]]
    cases = [case(seed, OVERLAPPING, annotated=torch.tensor(known)) for seed, known in enumerate(annotated)]
    counts = [[int((some["label"] >= value).sum()) for value in (1, 2)] for some in cases]
    probe = fit_probe(Intensities(), cases, OVERLAPPING, levels=0, **FEW)
    masks = OVERLAPPING.masks(probe(volume(10)[None]))
    assert masks.flatten(2).sum(2)[0].tolist() == [round(np.mean([high for high, _ in counts])), counts[0][1]]


def test_a_coarse_map_lies_where_its_stride_says():
    """Every second voxel describes these smooth volumes: organs are found as well as from the volume itself."""

    def smooth(seed: int) -> dict:
        image = F.interpolate(random(1, 1, 4, 4, 3, seed=seed), SIZE, mode="trilinear", align_corners=True)[0]
        return {"image": image, "label": torch.where(image < -0.5, 1.0, torch.where(image > 0.5, 2.0, 0.0))}

    cases = [smooth(seed) for seed in range(3)]
    fine, coarse = (fit_probe(Intensities(), cases, TASK, levels=(level,), **FEW) for level in (0, 2))
    # Where voxels were given the features of other places, intensity would hardly seem to matter.
    torch.testing.assert_close(coarse.classifier.weight, fine.classifier.weight, atol=0.1, rtol=0.2)
    for seed in (10, 11):
        expected = dice(fine, smooth(seed), TASK)
        assert float(expected.min()) > 0.6
        torch.testing.assert_close(dice(coarse, smooth(seed), TASK), expected, atol=0.15, rtol=0)


def test_voxels_are_those_of_all_cases_together(monkeypatch):
    asked = []

    def spy(label, task, per_organ, background, *args):
        asked.append((per_organ, background))
        return sample_voxels(label, task, per_organ, background, *args)

    monkeypatch.setattr("pgl_ext.evaluation.probes.network.sample_voxels", spy)
    fit_probe(Intensities(), [case(seed) for seed in range(3)], TASK, voxels_per_organ=299, background_voxels=600)
    assert asked == [(100, 200)] * 3


def test_overlapping_organs_are_decided_each_by_itself():
    cases = [case(seed, OVERLAPPING) for seed in range(3)]
    probe = fit_probe(Intensities(), cases, OVERLAPPING, levels=(0, 1), **FEW)
    assert float(dice(probe, case(10, OVERLAPPING), OVERLAPPING).min()) > 0.95


def test_what_is_not_annotated_is_not_background():
    cases = [case(seed, OVERLAPPING, annotated=torch.tensor([True, seed == 0])) for seed in range(3)]
    for some in cases[1:]:
        some["label"].clamp_(max=1)
    probe = fit_probe(Intensities(), cases, OVERLAPPING, levels=(0, 1), **FEW)
    assert float(dice(probe, case(10, OVERLAPPING), OVERLAPPING).min()) > 0.9


def test_an_organ_that_is_annotated_nowhere_is_found_nowhere():
    cases = [case(seed, OVERLAPPING, annotated=torch.tensor([True, False])) for seed in range(3)]
    logits = fit_probe(Intensities(), cases, OVERLAPPING)(volume(10)[None])
    assert bool(torch.isfinite(logits).all())
    assert not bool(OVERLAPPING.masks(logits)[0, 1].any())


def test_it_is_blind_to_the_scale_of_all_cases_but_not_to_that_of_one():
    def scaled(image: torch.Tensor) -> torch.Tensor:
        return 9 * image - 4

    plain = [case(seed) for seed in range(3)]
    changed = [{**some, "image": scaled(some["image"])} for some in plain]
    new = volume(10)[None]
    of_plain, of_changed = (fit_probe(Intensities(), cases, TASK, levels=0) for cases in (plain, changed))
    torch.testing.assert_close(of_plain(new), of_changed(scaled(new)), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(of_plain(new), of_plain(scaled(new)), atol=0.1)


def test_a_stronger_penalty_gives_smaller_weights():
    weak, default, strong = (fit_probe(Intensities(), [case(0)], TASK, **l2) for l2 in ({"l2": 1e-3}, {}, {"l2": 7}))
    assert default.description["l2"] == 0.01
    sizes = [float(probe.classifier.weight.norm()) for probe in (weak, default, strong)]
    assert sizes == sorted(sizes, reverse=True)


def test_predicting_changes_nothing(make_encoder):
    encoder = make_encoder().train()
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    probe = fit_probe(encoder, [case(seed) for seed in range(2)], TASK, voxels_per_organ=60, background_voxels=90)
    before = probe(volume(10)[None])
    probe(volume(11)[None])
    assert torch.equal(probe(volume(10)[None]), before)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert not before.requires_grad


def test_volumes_of_a_batch_are_decided_each_by_itself():
    probe = fit_probe(Intensities(), [case(0)], TASK, **FEW)
    both = probe(torch.stack([volume(10), volume(11)]))
    assert torch.equal(both, torch.cat([probe(volume(seed)[None]) for seed in (10, 11)]))


def test_the_same_seed_gives_the_same_probe(make_encoder):
    cases, new = [case(seed) for seed in range(2)], volume(10)[None]
    few = {"voxels_per_organ": 60, "background_voxels": 90}
    first, again, other = (fit_probe(make_encoder(), cases, TASK, seed=seed, **few)(new) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_description_says_how_it_was_made():
    probe = fit_probe(Intensities(), [case(0)], TASK, levels=[0, 2], l2=0.1, **FEW)
    assert probe.description == {"levels": [0, 2], "l2": 0.1, **FEW, "labelled_cases": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l2": 0}, "l2 must be a positive number, got 0"),
        ({"l2": "chosen"}, "l2 must be a positive number, got 'chosen'"),
        ({"levels": []}, r"some of 0 to 2, .* got \[\]"),
        ({"levels": [1, 3]}, r"some of 0 to 2, .* got \[1, 3\]"),
        ({"levels": -1}, "some of 0 to 2, .* got -1"),
        ({"cases": []}, "got 0 cases"),
        ({"voxels_per_organ": 0}, "voxels_per_organ 0"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fit_probe(**{"encoder": Intensities(), "cases": [case(0)], "task": TASK, **settings})
