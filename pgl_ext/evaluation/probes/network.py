"""A probe as a segmentation network: a frozen encoder, and a classifier of its features."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from monai.data import MetaTensor
from torch import nn

from pgl_ext.evaluation.probes.classifiers import LinearClassifier, NearestNeighbours
from pgl_ext.evaluation.probes.decisions import decide
from pgl_ext.evaluation.probes.features import Statistics, features_at, re_estimate_batch_norm
from pgl_ext.evaluation.probes.selection import Choice, LabelledCase, choose, fit
from pgl_ext.evaluation.probes.voxels import sample_voxels
from pgl_ext.task import SegmentationTask

__all__ = ["ProbeNetwork", "fit_probe"]

logger = logging.getLogger(__name__)

_CLASSIFIERS = {"linear": LinearClassifier, "knn": NearestNeighbours}
_STANDARDISATIONS = ("case", "dataset")
_BATCH_NORMS = ("stored", "re-estimated")


class ProbeNetwork(nn.Module):
    """Logits of whole volumes from a frozen encoder's features, such that organs have the sizes of the labelled cases.

    Args:
        encoder: maps (B, C, X, Y, Z) to its feature maps; has ``strides``.
        levels: indices of the maps that are looked at, 0 for the finest.
        statistics: that features are standardised with; None: those of each volume itself.
        classifier: of standardised features.
        task: the organs.
        sizes: voxels of each organ; see :mod:`pgl_ext.evaluation.probes.decisions`.
        description: how it was fitted, as plain values.
    """

    def __init__(
        self,
        encoder: nn.Module,
        levels: Sequence[int],
        statistics: Statistics | None,
        classifier: LinearClassifier | NearestNeighbours,
        task: SegmentationTask,
        sizes: Sequence[int],
        description: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.levels = tuple(levels)
        self.statistics = statistics
        self.classifier = classifier
        self.task = task
        self.sizes = tuple(sizes)
        self.description = dict(description)

    @torch.no_grad()
    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Logits (B, out_channels, X, Y, Z) of volumes (B, C, X, Y, Z)."""
        return torch.stack([decide(self._logits(volume[None])[0], self.task, self.sizes) for volume in volumes])

    def _logits(self, volume: torch.Tensor) -> torch.Tensor:
        maps = chosen_maps(self.encoder, volume, self.levels)
        statistics = Statistics.of_maps(maps) if self.statistics is None else self.statistics
        strides = [self.encoder.strides[level] for level in self.levels]
        return self.classifier.logits_of_volume(statistics.standardise_maps(maps), strides, volume.shape[2:])


def chosen_maps(encoder: nn.Module, volume: torch.Tensor, levels: Sequence[int]) -> list[torch.Tensor]:
    """Feature maps (1, F, x, y, z), float32, of a volume (1, C, X, Y, Z)."""
    volume = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
    maps = encoder(volume)
    return [maps[level].float() for level in levels]


def fit_probe(
    encoder: nn.Module,
    cases: Sequence[Mapping[str, Any]],
    task: SegmentationTask,
    classifier: str = "linear",
    levels: Sequence[int] | None = None,
    standardisation: str = "dataset",
    batch_norm: str = "stored",
    strength: float | str | None = None,
    voxels_per_organ: int = 1000,
    background_voxels: int = 12_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ProbeNetwork:
    """Fit a probe of a frozen encoder on labelled cases.

    Voxels are drawn evenly from the cases, balanced over organs and background.

    Args:
        encoder: maps (B, C, X, Y, Z) to its feature maps; has ``strides``. Moved, set to evaluation mode and frozen in
            place.
        cases: preprocessed labelled cases with ``image`` (C, X, Y, Z), ``label`` (1, X, Y, Z) with the files' values,
            and optionally ``annotated`` (organs,).
        task: the organs.
        classifier: ``"linear"`` or ``"knn"``.
        levels: indices of the feature maps to look at, 0 for the finest; None: all.
        standardisation: mean and standard deviation of every feature over each ``"case"`` by itself, also in
            prediction, or over the labelled cases together (``"dataset"``).
        batch_norm: the encoder's ``"stored"`` statistics, or those ``"re-estimated"`` on the labelled cases.
        strength: l2 of the linear classifier, k of the nearest neighbours; None: its default; ``"chosen"``: by leaving
            labelled cases out, see :func:`pgl_ext.evaluation.probes.selection.choose`. With few cases that choice is chance.
        voxels_per_organ: over all cases together.
        background_voxels: the same of the background.
        seed: of the choice of voxels.
        device: where to compute.

    Raises:
        ValueError: there are no cases, an argument is not one of those named here, or an organ is not annotated and the
            task is not multi-label.
    """
    levels = _checked_levels(levels, encoder)
    _check_choice("classifier", classifier, _CLASSIFIERS)
    _check_choice("standardisation", standardisation, _STANDARDISATIONS)
    _check_choice("batch_norm", batch_norm, _BATCH_NORMS)
    if not (strength is None or strength == "chosen" or (isinstance(strength, (int, float)) and strength > 0)):
        raise ValueError(f"strength must be a positive number, 'chosen' or None, got {strength!r}.")
    if not len(cases) or min(voxels_per_organ, background_voxels) < 1:
        raise ValueError(
            f"a probe needs labelled cases and voxels of them, got {len(cases)} cases, voxels_per_organ "
            f"{voxels_per_organ} and background_voxels {background_voxels}."
        )
    encoder = encoder.to(device).eval().requires_grad_(False)
    if batch_norm == "re-estimated":
        re_estimate_batch_norm(encoder, (case["image"][None].to(device) for case in cases))
    generator = torch.Generator().manual_seed(seed)
    per_organ, background = (-(-total // len(cases)) for total in (voxels_per_organ, background_voxels))
    labelled, statistics = [], []
    for case in cases:
        maps = chosen_maps(encoder, case["image"][None].to(device), levels)
        drawn = sample_voxels(case["label"], task, per_organ, background, generator, case.get("annotated")).to(device)
        features = features_at(maps, [encoder.strides[level] for level in levels], drawn.voxels)
        labelled.append(LabelledCase(drawn, features))
        statistics.append(Statistics.of_maps(maps))
    pooled = None if standardisation == "case" else Statistics.pooled(statistics)
    labelled = [
        LabelledCase(case.voxels, (pooled or own).standardise(case.features))
        for case, own in zip(labelled, statistics, strict=True)
    ]
    if strength == "chosen":
        choice = choose(labelled, task, _CLASSIFIERS[classifier])
    else:
        choice = Choice(_CLASSIFIERS[classifier].default if strength is None else strength)
    logger.info("%s probe of %d labelled cases: %s", classifier, len(cases), choice)
    description = {
        "classifier": classifier,
        "levels": list(levels),
        "standardisation": standardisation,
        "batch_norm": batch_norm,
        "labelled_cases": len(cases),
        **asdict(choice),
    }
    fitted = fit(labelled, task, _CLASSIFIERS[classifier], choice.strength)
    return ProbeNetwork(encoder, levels, pooled, fitted, task, _mean_sizes(labelled, task), description)


def _mean_sizes(cases: Sequence[LabelledCase], task: SegmentationTask) -> list[int]:
    """Voxels of each organ, on average over the cases that it is annotated in."""
    organs = len(task.names)
    sizes = torch.stack([case.voxels.counts @ case.voxels.targets[:, -organs:] for case in cases])
    known = torch.stack([case.voxels.known[-organs:] for case in cases])
    return ((sizes * known).sum(0) / known.sum(0).clamp_min(1)).round().int().tolist()


def _checked_levels(levels: Sequence[int] | int | None, encoder: nn.Module) -> tuple[int, ...]:
    known = range(len(encoder.strides))
    if levels is None:
        return tuple(known)
    levels = (levels,) if isinstance(levels, int) else tuple(levels)
    if not levels or not set(levels) <= set(known) or list(levels) != sorted(set(levels)):
        raise ValueError(
            f'levels must be ascending ones of 0 to {known[-1]}, the encoder\'s feature maps, such as "[2, 3, 4]", got '
            f"{levels}."
        )
    return levels


def _check_choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
