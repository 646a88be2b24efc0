"""Labelled voxels to fit a probe on, balanced over organs and background."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from pgl_ext.task import SegmentationTask

__all__ = ["LabelledVoxels", "sample_voxels"]


@dataclass(frozen=True)
class LabelledVoxels:
    """Some voxels of a case, drawn at random from strata: the background, every organ, every overlap of organs.

    Args:
        voxels: indices (N, 3).
        targets: what the task's output channels should be there, 0 or 1 (N, out_channels).
        counts: how many voxels of the case each stands for (N,).
        balance: weights (N,) with which all strata are equally large.
        known: which of the output channels are known in this case (out_channels,), bool.
    """

    voxels: torch.Tensor
    targets: torch.Tensor
    counts: torch.Tensor
    balance: torch.Tensor
    known: torch.Tensor

    def to(self, device: torch.device | str) -> LabelledVoxels:
        """The same on a device."""
        return LabelledVoxels(*(getattr(self, field.name).to(device) for field in fields(self)))


def sample_voxels(
    labels: torch.Tensor,
    task: SegmentationTask,
    per_organ: int,
    background: int,
    generator: torch.Generator,
    annotated: torch.Tensor | None = None,
) -> LabelledVoxels:
    """Draw voxels without replacement: as many of each organ, and of each overlap of organs, and of the background.

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
    known = torch.ones(len(task.names), dtype=torch.bool) if annotated is None else annotated.bool()
    task.check_annotated(known)
    # Which organs a voxel is in is a matter of its label value, of which there are few.
    values, index = torch.unique(labels, return_inverse=True)
    masks = task.masks_of_labels(values.view(1, -1, 1, 1)).flatten(1) & known[:, None]
    combinations, stratum_of_value = torch.unique(masks.flip(0), dim=1, return_inverse=True)
    strata = stratum_of_value[index.flatten()]
    chosen, counts, balance = [], [], []
    for stratum, organs in enumerate(combinations.T):
        places = torch.nonzero(strata == stratum)[:, 0]
        number = min(len(places), per_organ if bool(organs.any()) else background)
        chosen.append(places[torch.randperm(len(places), generator=generator)[:number]])
        counts.append(torch.full((number,), len(places) / number))
        balance.append(torch.full((number,), 1 / number))
    places = torch.cat(chosen)
    return LabelledVoxels(
        torch.stack(torch.unravel_index(places, labels.shape[1:]), dim=1),
        task.targets(labels.flatten()[places].view(1, -1, 1, 1)).flatten(1).T,
        torch.cat(counts),
        torch.cat(balance),
        known if task.multi_label else torch.ones(task.out_channels, dtype=torch.bool),
    )
