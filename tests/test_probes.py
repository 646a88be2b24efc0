"""Probes as a whole: how their settings are chosen, and what they predict."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.metrics import compute_dice
from torch import nn

from pgl_ext.evaluation.probes import fit_probe
from pgl_ext.evaluation.probes.classifiers import LinearClassifier
from pgl_ext.evaluation.probes.selection import LabelledCase, choose, fit
from pgl_ext.evaluation.probes.voxels import LabelledVoxels, sample_voxels
from pgl_ext.task import SegmentationTask

TASK = SegmentationTask({"low": [1], "high": [2]})
OVERLAPPING = SegmentationTask({"high": [1, 2], "very high": [2]}, multi_label=True)
SIZE = (16, 14, 10)
FEW = {"voxels_per_organ": 300, "background_voxels": 600}


class Intensities(nn.Module):
    """The volume, its square, and a coarse map of it: an encoder whose features tell organs by intensity."""

    strides = ((1, 1, 1), (1, 1, 1), (2, 2, 2))

    def forward(self, volumes: torch.Tensor) -> list[torch.Tensor]:
        return [volumes, volumes.square(), volumes[..., ::2, ::2, ::2]]


def volume(seed: int) -> torch.Tensor:
    return torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(seed))


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


# --- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", ["linear", "knn"])
@pytest.mark.parametrize("cases", [1, 3])
def test_organs_that_features_tell_apart_are_found(classifier, cases):
    probe = fit_probe(Intensities(), [case(seed) for seed in range(cases)], TASK, classifier, levels=(0, 1), **FEW)
    found = torch.stack([dice(probe, case(seed), TASK) for seed in (10, 11)])
    # Every volume has nearly as many voxels of an organ as the others.
    assert float(found.min()) > 0.9


def test_a_coarse_map_lies_where_its_stride_says():
    """Every second voxel describes these smooth volumes: organs are found as well as from the volume itself."""

    def smooth(seed: int) -> dict:
        coarse = torch.randn(1, 1, 4, 4, 3, generator=torch.Generator().manual_seed(seed))
        image = F.interpolate(coarse, SIZE, mode="trilinear", align_corners=True)[0]
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
    fit_probe(Intensities(), [case(seed) for seed in range(3)], TASK, levels=0, **FEW)
    assert asked == [(100, 200)] * 3


@pytest.mark.parametrize("classifier", ["linear", "knn"])
def test_overlapping_organs_are_decided_each_by_itself(classifier):
    cases = [case(seed, OVERLAPPING) for seed in range(3)]
    probe = fit_probe(Intensities(), cases, OVERLAPPING, classifier, levels=(0, 1), **FEW)
    assert float(dice(probe, case(10, OVERLAPPING), OVERLAPPING).min()) > 0.95


@pytest.mark.parametrize("classifier", ["linear", "knn"])
def test_what_is_not_annotated_is_not_background(classifier):
    cases = [case(seed, OVERLAPPING, annotated=torch.tensor([True, seed == 0])) for seed in range(3)]
    for some in cases[1:]:
        some["label"].clamp_(max=1)
    probe = fit_probe(Intensities(), cases, OVERLAPPING, classifier, levels=(0, 1), **FEW)
    assert float(dice(probe, case(10, OVERLAPPING), OVERLAPPING).min()) > 0.9


def test_an_organ_that_is_annotated_nowhere_leaves_finite_logits():
    cases = [case(seed, OVERLAPPING, annotated=torch.tensor([True, False])) for seed in range(3)]
    probe = fit_probe(Intensities(), cases, OVERLAPPING)
    assert bool(torch.isfinite(probe(volume(10)[None])).all())


def test_standardised_by_case_it_is_blind_to_the_scale_of_a_case():
    scales = [(3.0, -7.0), (0.2, 100.0), (40.0, 0.0)]
    plain = [case(seed) for seed in range(3)]
    scaled = [{**some, "image": a * some["image"] + b} for some, (a, b) in zip(plain, scales, strict=True)]
    new = volume(10)[None]
    by_case = [fit_probe(Intensities(), cases, TASK, levels=0, standardisation="case") for cases in (plain, scaled)]
    torch.testing.assert_close(by_case[0](new), by_case[1](new), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(by_case[0](new), by_case[0](9 * new - 4), atol=1e-3, rtol=1e-3)
    by_data_set = fit_probe(Intensities(), plain, TASK, levels=0)
    assert not torch.allclose(by_data_set(new), by_data_set(9 * new - 4), atol=0.1)


def test_the_strength_is_given_or_the_default_or_chosen():
    cases = [case(seed) for seed in range(2)]
    probes = [
        fit_probe(Intensities(), cases, TASK, levels=0, strength=strength, **FEW) for strength in (None, 7, "chosen")
    ]
    given = [probe.description["strength"] for probe in probes]
    assert given[:2] == [LinearClassifier.default, 7]
    assert given[2] in LinearClassifier.strengths
    assert [probe.description["average_precision"] is None for probe in probes] == [True, True, False]
    assert float(probes[1].classifier.weight.abs().max()) < float(probes[0].classifier.weight.abs().max())


def test_predicting_changes_nothing(make_encoder):
    cases = [case(seed) for seed in range(2)]
    probe = fit_probe(make_encoder(), cases, TASK, batch_norm="re-estimated", voxels_per_organ=60, background_voxels=90)
    new = volume(10)[None]
    before = probe(new)
    state = {name: value.clone() for name, value in probe.state_dict().items()}
    probe(volume(11)[None])
    assert torch.equal(probe(new), before)
    assert all(torch.equal(value, state[name]) for name, value in probe.state_dict().items())
    assert not before.requires_grad


@pytest.mark.parametrize("batch_norm", ["stored", "re-estimated"])
def test_the_same_seed_gives_the_same_probe(make_encoder, batch_norm):
    cases = [case(seed) for seed in range(2)]
    settings = {"batch_norm": batch_norm, "voxels_per_organ": 60, "background_voxels": 90}
    new = volume(10)[None]
    first, again, other = (fit_probe(make_encoder(), cases, TASK, seed=seed, **settings)(new) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_description_says_how_it_was_made():
    probe = fit_probe(Intensities(), [case(0)], TASK, levels=[0, 2], standardisation="dataset")
    settings = {"classifier": "linear", "levels": [0, 2], "standardisation": "dataset", "batch_norm": "stored"}
    settings |= {"labelled_cases": 1, "strength": LinearClassifier.default, "average_precision": None}
    assert probe.description == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier": "svm"}, "classifier must be one of linear, knn, got 'svm'"),
        ({"standardisation": "voxel"}, "standardisation must be one of case, dataset, got 'voxel'"),
        ({"batch_norm": "none"}, "batch_norm must be one of stored, re-estimated, got 'none'"),
        ({"strength": 0}, "strength must be a positive number, 'chosen' or None, got 0"),
        ({"strength": "left out"}, "got 'left out'"),
        ({"levels": []}, r"ones of 0 to 2, .* got \(\)"),
        ({"levels": [3]}, r"ones of 0 to 2, .* got \(3,\)"),
        ({"levels": [1, 0]}, r"got \(1, 0\)"),
        ({"cases": []}, "got 0 cases"),
        ({"voxels_per_organ": 0}, "voxels_per_organ 0"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fit_probe(**{"encoder": Intensities(), "cases": [case(0)], "task": TASK, **settings})


# --- the choice of settings -----------------------------------------------------------------------------------------


def labelled_case(number: int, voxels: int = 60) -> LabelledCase:
    """A case whose second feature is its number, and of whose voxels every third belongs to the first organ."""
    generator = torch.Generator().manual_seed(number)
    organ = torch.arange(voxels) % 3 == 0
    features = torch.stack(
        [organ + 0.1 * torch.randn(voxels, generator=generator), torch.full((voxels,), float(number))], 1
    )
    targets = torch.stack([~organ, organ, torch.zeros_like(organ)], dim=1).float()
    ones = torch.ones(voxels)
    drawn = LabelledVoxels(torch.zeros(voxels, 3, dtype=torch.long), targets, ones, ones / 30, torch.ones(3).bool())
    return LabelledCase(drawn, features)


@pytest.mark.parametrize(("cases", "left_out"), [(2, 1), (3, 1), (5, 1), (7, 2), (12, 3)])
def test_a_case_is_never_scored_by_a_classifier_that_has_seen_it(cases, left_out):
    scored = []

    class Spy(LinearClassifier):
        strengths = (0.1,)

        def __init__(self, labelled, strength):
            super().__init__(labelled, strength)
            self.seen = set(labelled.features[:, 1].tolist())
            assert cases - left_out <= len(self.seen) < cases

        def logits(self, features):
            (number,) = set(features[:, 1].tolist())
            assert number not in self.seen
            scored.append(number)
            return super().logits(features)

    choice = choose([labelled_case(number) for number in range(cases)], TASK, Spy)
    assert sorted(scored) == list(range(cases))
    assert choice.average_precision > 0.95


def test_the_strength_of_the_best_average_precision_is_taken():
    class Known(LinearClassifier):
        """Right for one strength alone."""

        strengths = (3.0, 2.0, 1.0)

        def __init__(self, labelled, strength):
            self.sign = 1 if strength == 2.0 else -1

        def logits(self, features):
            organ = self.sign * (features[:, 0] - 0.5)
            return torch.stack([torch.zeros_like(organ), organ, torch.full_like(organ, -100)], dim=1)

    choice = choose([labelled_case(number) for number in range(3)], TASK, Known)
    assert choice.strength == 2.0
    assert choice.average_precision == pytest.approx(1)


def test_average_precision_counts_the_voxels_that_each_stands_for():
    """Two organ voxels that score first and last, five background voxels between: precisions of 1 and 2 / 7."""

    class Known(LinearClassifier):
        strengths = (1.0,)

        def __init__(self, labelled, strength):
            pass

        def logits(self, features):
            return torch.stack([torch.zeros(3), features[:, 0], torch.full((3,), -100.0)], dim=1)

    organ, counts = torch.tensor([True, False, True]), torch.tensor([1.0, 5, 1])
    targets = torch.stack([~organ, organ, torch.zeros(3).bool()], dim=1).float()
    drawn = LabelledVoxels(torch.zeros(3, 3, dtype=torch.long), targets, counts, torch.ones(3), torch.ones(3).bool())
    cases = [LabelledCase(drawn, torch.tensor([[3.0], [2], [1]]))] * 2
    assert choose(cases, TASK, Known).average_precision == pytest.approx((1 + 2 / 7) / 2)


def test_of_a_single_case_the_defaults_are_taken():
    choice = choose([labelled_case(0)], TASK, LinearClassifier)
    assert (choice.strength, choice.average_precision) == (LinearClassifier.default, None)


# --- the fit --------------------------------------------------------------------------------------------------------


def test_organs_and_background_weigh_the_same_however_large():
    """Of organs of 6 % and 25 % of the voxels, drawn one by one and in different numbers."""
    fitted = []
    image = volume(0)
    label = torch.where(image < -1.5, 1.0, torch.where(image > 0.7, 2.0, 0.0))
    drawn = sample_voxels(label, TASK, 150, 1500, torch.Generator().manual_seed(0), None)
    features = torch.zeros(len(drawn.targets), 1)
    fit([LabelledCase(drawn, features)], TASK, lambda labelled, strength: fitted.append(labelled), 1)
    (labelled,) = fitted
    # (strata, channels); without overlaps each channel is a stratum
    weights = labelled.targets.T @ labelled.weights
    torch.testing.assert_close(weights, weights[:1, :1].expand_as(weights))
