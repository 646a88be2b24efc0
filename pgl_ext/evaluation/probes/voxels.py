"""Labelled voxels to fit a probe on, balanced over organs and background, and the features of voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pgl_ext.task import SegmentationTask

__all__ = ["LabelledVoxels", "features_at", "sample_voxels"]


class LabelledVoxels(NamedTuple):
    """Voxels of a case, drawn at random from strata: the background, every organ, every overlap of organs.

    Args:
        voxels: indices (N, 3).
        targets: what the task's output channels should be there, 0 or 1 (N, out_channels).
        weights: 1 / (voxels drawn from the stratum), so that all strata weigh the same, and 0 in channels of organs
            that are not annotated, (N, out_channels).
        sizes: voxels that each organ has in the case, NaN where it is not annotated (organs,).
    """

    voxels: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    sizes: torch.Tensor


def sample_voxels(
    labels: torch.Tensor,
    task: SegmentationTask,
    per_organ: int,
    background: int,
    generator: torch.Generator,
    annotated: torch.Tensor | None = None,
) -> LabelledVoxels:
    """Draw voxels without replacement from each organ, each overlap of organs and the background, in this order.

    Args:
        labels: label map (1, X, Y, Z) with the files' values, on the CPU.
        task: the organs.
        per_organ: voxels of each organ, or all where there are fewer.
        background: voxels of the background.
        generator: of the random choice.
        annotated: which organs are annotated (organs,), bool; None: all. The others take no part.

    Raises:
        ValueError: an organ is not annotated and the task is not multi-label.
    """
    annotated = torch.ones(len(task.names), dtype=torch.bool) if annotated is None else annotated.bool()
    task.check_annotated(annotated)
    strata, has_organ = _strata(labels, task, annotated)
    chosen, counts, weights = [], [], []
    for stratum, is_organ in enumerate(has_organ):
        places = torch.nonzero(strata == stratum)[:, 0]
        drawn = places[torch.randperm(len(places), generator=generator)[: per_organ if is_organ else background]]
        chosen.append(drawn)
        counts.append(torch.full((len(drawn),), len(places) / len(drawn)))
        weights.append(torch.full((len(drawn), 1), 1 / len(drawn)))
    places = torch.cat(chosen)
    targets = task.targets(labels.flatten()[places].view(1, -1, 1, 1)).flatten(1).T
    # Each voxel stands for as many of its stratum as were not drawn, and itself.
    sizes = torch.cat(counts) @ targets[:, -len(task.names) :]
    return LabelledVoxels(
        torch.stack(torch.unravel_index(places, labels.shape[1:]), dim=1),
        targets,
        torch.cat(weights) * (annotated if task.multi_label else torch.ones(task.out_channels)),
        sizes.where(annotated, torch.nan),
    )


def _strata(labels: torch.Tensor, task: SegmentationTask, annotated: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """Number of the stratum of every voxel (X * Y * Z,), -1 of those to ignore, and of every stratum whether there is
    an organ in it."""
    # The label value alone says which organs a voxel is in, and there are few values.
    values, value_of_voxel = torch.unique(labels, return_inverse=True)
    ignored = torch.isin(values, torch.tensor(task.ignored, dtype=values.dtype))
    masks = task.masks_of_labels(values.view(1, -1, 1, 1)).flatten(1) & annotated[:, None]
    combinations, stratum = torch.unique(masks[:, ~ignored].flip(0), dim=1, return_inverse=True)
    stratum_of_value = torch.full(values.shape, -1).masked_scatter_(~ignored, stratum)
    return stratum_of_value[value_of_voxel.flatten()], combinations.any(0).tolist()


def features_at(features: torch.Tensor, stride: Sequence[int], voxels: torch.Tensor) -> torch.Tensor:
    """Features (N, C) of a map (1, C, x, y, z) at voxels, indices (N, 3), interpolated linearly.

    Feature j lies on voxel stride * j of an axis; beyond the last one its value is repeated.
    """
    last = torch.tensor(features.shape[2:], device=voxels.device) - 1
    places = voxels / torch.tensor(stride, device=voxels.device)
    # grid_sample counts from -1 to 1 and takes z first; an axis of one feature has nowhere to go.
    grid = (2 * places / last.clamp_min(1) - 1).flip(-1)[None, :, None, None]
    return F.grid_sample(features, grid, padding_mode="border", align_corners=True)[0, :, :, 0, 0].T
