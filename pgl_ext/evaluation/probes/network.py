"""A probe as a segmentation network: a frozen encoder, a linear classifier of its features, thresholds by organ size.

A few cases do not tell where a threshold should lie: features shift from case to case, and logits with them. So it is
set in every volume such that an organ gets as many voxels as it has in the labelled cases on average. The Dice then
says how well the features rank the voxels of a volume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.utils import convert_to_tensor
from torch import nn

from pgl_ext.evaluation.probes.linear import LinearClassifier, Statistics, fit_linear
from pgl_ext.evaluation.probes.voxels import features_at, sample_voxels
from pgl_ext.task import SegmentationTask

__all__ = ["ProbeNetwork", "decide", "fit_probe", "organ_log_odds"]


class ProbeNetwork(nn.Module):
    """Logits of whole volumes from a frozen encoder's features, such that organs have the sizes of the labelled cases.

    Args:
        encoder: maps (B, C, X, Y, Z) to its feature maps; has ``strides``.
        levels: indices of the maps that are used, 0 for the finest.
        classifier: of their features.
        task: the organs.
        sizes: voxels of each organ; see :func:`decide`.
        description: how it was fitted, as plain values.
    """

    def __init__(
        self,
        encoder: nn.Module,
        levels: Sequence[int],
        classifier: LinearClassifier,
        task: SegmentationTask,
        sizes: Sequence[int],
        description: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.levels = levels
        self.classifier = classifier
        self.task = task
        self.sizes = sizes
        self.description = description

    @torch.no_grad()
    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Logits (B, out_channels, X, Y, Z) of volumes (B, C, X, Y, Z)."""
        decided = []
        for volume in convert_to_tensor(volumes).split(1):
            maps, strides = _maps_and_strides(self.encoder, volume, self.levels)
            (logits,) = self.classifier.logits_of_volume(maps, strides, volume.shape[2:])
            decided.append(decide(logits, self.task, self.sizes))
        return torch.stack(decided)


def organ_log_odds(logits: torch.Tensor, task: SegmentationTask) -> torch.Tensor:
    """Logarithm of p / (1 - p) for the probability p of each organ, (organs, ...) of logits (out_channels, ...)."""
    if task.multi_label:
        return logits
    others = [torch.cat([logits[:channel], logits[channel + 1 :]]).logsumexp(0) for channel in range(1, len(logits))]
    return logits[1:] - torch.stack(others)


def decide(logits: torch.Tensor, task: SegmentationTask, sizes: Sequence[int]) -> torch.Tensor:
    """Shift the logits (out_channels, X, Y, Z) of a volume such that each organ by itself has a size in voxels.

    They become the organs' log odds above their thresholds, for a multi-class task after those of the background, which
    are 0. An organ is smaller only where another one claims its voxels more strongly.
    """
    excess = []
    for odds, size in zip(organ_log_odds(logits, task), sizes, strict=True):
        largest = odds.flatten().topk(min(size + 1, odds.numel())).values
        # The largest value that is not to be among the organ's, if there is one.
        excess.append(odds - (largest[size] if size < odds.numel() else largest[-1] - 1))
    background = [] if task.multi_label else [torch.zeros_like(excess[0])]
    return torch.stack(background + excess)


def fit_probe(
    encoder: nn.Module,
    cases: Sequence[Mapping[str, Any]],
    task: SegmentationTask,
    levels: Sequence[int] | int | None = None,
    l2: float = 0.01,
    voxels_per_organ: int = 1000,
    background_voxels: int = 12_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ProbeNetwork:
    """Fit logistic regression on a frozen encoder's features at voxels of labelled cases.

    Voxels are drawn evenly from the cases, balanced over organs and background. Batch norm uses stored statistics.

    Args:
        encoder: the network whose features are probed. Moved, set to evaluation mode and frozen in place.
        cases: preprocessed labelled cases with ``image`` (C, X, Y, Z), ``label`` (1, X, Y, Z) with the files' values,
            and optionally ``annotated`` (organs,).
        task: the organs.
        levels: indices of the feature maps to use, 0 for the finest; None: all.
        l2: strength of the penalty on the classifier's weights.
        voxels_per_organ: over all cases together.
        background_voxels: the same of the background.
        seed: of the choice of voxels.
        device: where to compute.

    Raises:
        ValueError: there are no cases, an argument is out of its range, or an organ is not annotated and the task is
            not multi-label.
    """
    description = {"l2": l2, "voxels_per_organ": voxels_per_organ, "background_voxels": background_voxels}
    _check(**description, cases=len(cases))
    levels = _checked_levels(levels, len(encoder.level_strides))
    encoder = encoder.to(device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    per_organ, background = (math.ceil(total / len(cases)) for total in (voxels_per_organ, background_voxels))
    drawn, features, statistics = [], [], []
    for case in cases:
        maps, strides = _maps_and_strides(encoder, case["image"][None].to(device), levels)
        voxels = sample_voxels(case["label"], task, per_organ, background, generator, case.get("annotated"))
        places = voxels.voxels.to(device)
        features.append(torch.cat([features_at(m, s, places) for m, s in zip(maps, strides, strict=True)], dim=1))
        statistics.append(Statistics.of_maps(maps))
        drawn.append(voxels)
    _, targets, weights, sizes = zip(*drawn, strict=True)
    classifier = fit_linear(
        torch.cat(features),
        Statistics.pooled(statistics),
        torch.cat(targets).to(device),
        torch.cat(weights).to(device),
        task.multi_label,
        l2,
    )
    # An organ that is annotated nowhere gets no voxels.
    mean_sizes = torch.stack(sizes).nanmean(0).nan_to_num(0).round().int().tolist()
    description = {"levels": levels, **description, "labelled_cases": len(cases)}
    return ProbeNetwork(encoder, levels, classifier, task, mean_sizes, description)


def _maps_and_strides(
    encoder: nn.Module, volume: torch.Tensor, levels: Sequence[int]
) -> tuple[list[torch.Tensor], list[Sequence[int]]]:
    """Feature maps (1, F, x, y, z), float32, of a volume (1, C, X, Y, Z), and their strides in voxels per axis."""
    maps = encoder.features(convert_to_tensor(volume))
    return [maps[level].float() for level in levels], [encoder.level_strides[level] for level in levels]


def _checked_levels(levels: Sequence[int] | int | None, count: int) -> list[int]:
    chosen = list(range(count) if levels is None else [levels] if isinstance(levels, int) else levels)
    if not chosen or not set(chosen) <= set(range(count)):
        raise ValueError(f'levels must be some of 0 to {count - 1}, such as "[2, 3, 4]", got {levels!r}.')
    return chosen


def _check(l2: float, voxels_per_organ: int, background_voxels: int, cases: int) -> None:
    if not isinstance(l2, (int, float)) or not l2 > 0:
        raise ValueError(f"l2 must be a positive number, got {l2!r}.")
    if min(cases, voxels_per_organ, background_voxels) < 1:
        raise ValueError(
            f"a probe needs labelled cases and voxels of them, got {cases} cases, voxels_per_organ "
            f"{voxels_per_organ} and background_voxels {background_voxels}."
        )
