"""Fitting a classifier on labelled cases, and choosing its strength by leaving some of them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pgl_ext.evaluation.probes.classifiers import LabelledFeatures, LinearClassifier, NearestNeighbours
from pgl_ext.evaluation.probes.decisions import organ_log_odds
from pgl_ext.evaluation.probes.voxels import LabelledVoxels
from pgl_ext.task import SegmentationTask

__all__ = ["Choice", "Classifier", "LabelledCase", "average_precision", "choose", "fit"]

Classifier = type[LinearClassifier] | type[NearestNeighbours]

_MOST_PARTS = 5


@dataclass(frozen=True)
class LabelledCase:
    """Some voxels of a labelled case with their features (N, F)."""

    voxels: LabelledVoxels
    features: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """A classifier's strength.

    Args:
        strength: its l2 or k.
        average_precision: that it was chosen by, mean over the organs of the cases that were left out, if it was.
    """

    strength: float
    average_precision: float | None = None


def fit(
    cases: Sequence[LabelledCase], task: SegmentationTask, classifier: Classifier, strength: float
) -> LinearClassifier | NearestNeighbours:
    """Fit a classifier on labelled cases, with all organs and the background equally large."""
    voxels = [case.voxels for case in cases]
    labelled = LabelledFeatures(
        torch.cat([case.features for case in cases]),
        torch.cat([case.targets for case in voxels]),
        torch.cat([case.balance[:, None] * case.known for case in voxels]),
        task.multi_label,
    )
    return classifier(labelled, strength)


def choose(cases: Sequence[LabelledCase], task: SegmentationTask, classifier: Classifier) -> Choice:
    """The strength of the best average precision on labelled cases that are left out of the fit.

    One case at a time is left out, or every fifth where there are more than five. With a single case, the classifier's
    default is taken.
    Unlike the Dice, average precision needs no threshold, which two or three cases are too few to find.

    Args:
        cases: the labelled cases; there is nothing else that the choice depends on.
        task: the organs.
        classifier: what to fit; its ``strengths`` are tried.
    """
    if len(cases) == 1:
        return Choice(classifier.default)
    parts = min(len(cases), _MOST_PARTS)
    choices = []
    for strength in classifier.strengths:
        found = []
        for part in range(parts):
            fitted = fit([case for n, case in enumerate(cases) if n % parts != part], task, classifier, strength)
            found += [_precisions(fitted, case, task) for case in cases[part::parts]]
        choices.append(Choice(strength, float(torch.stack(found).nanmean().nan_to_num(0))))
    return max(choices, key=lambda choice: choice.average_precision)


def _precisions(
    fitted: LinearClassifier | NearestNeighbours, case: LabelledCase, task: SegmentationTask
) -> torch.Tensor:
    """Average precision of each organ of a case (organs,), NaN where it is not known."""
    scores = organ_log_odds(fitted.logits(case.features).T, task)
    organs = len(task.names)
    positive = case.voxels.targets[:, -organs:].T * case.voxels.known[-organs:, None]
    return torch.stack([average_precision(s, p, case.voxels.counts) for s, p in zip(scores, positive, strict=True)])


def average_precision(scores: torch.Tensor, positive: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean over the positive voxels of the precision among all that score at least as high.

    Args:
        scores: (N,).
        positive: 0 or 1 (N,).
        counts: how many voxels each stands for (N,).

    Returns:
        scalar in [0, 1], NaN where no voxel is positive.
    """
    order = scores.argsort(descending=True)
    found, counts = (positive * counts)[order], counts[order]
    return (found * found.cumsum(0) / counts.cumsum(0)).sum() / found.sum()
