"""From the logits of a volume to its organs, each as large as in the labelled cases.

Where the threshold lies decides most of a weak classifier's Dice, and it cannot be learned from a few cases: features
shift from case to case, and logits with them. So the threshold is set in every volume such that an organ gets as many
voxels as it has in the labelled cases on average. The Dice then says how well the features rank the voxels of a volume.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pgl_ext.task import SegmentationTask

__all__ = ["decide", "organ_log_odds"]


def organ_log_odds(logits: torch.Tensor, task: SegmentationTask) -> torch.Tensor:
    """Logarithm of p / (1 - p) for the probability p of each organ, (organs, ...) of logits (out_channels, ...)."""
    if task.multi_label:
        return logits
    others = [torch.cat([logits[:channel], logits[channel + 1 :]]).logsumexp(0) for channel in range(len(logits))]
    return (logits - torch.stack(others))[1:]


def decide(logits: torch.Tensor, task: SegmentationTask, sizes: Sequence[int]) -> torch.Tensor:
    """Shift the logits of a volume such that each organ by itself has a certain number of voxels.

    Args:
        logits: (out_channels, X, Y, Z).
        task: the organs.
        sizes: voxels of each organ.

    Returns:
        Logits (out_channels, X, Y, Z): the organs' log odds above their thresholds, for a multi-class task after those
        of the background, which are 0. An organ is smaller only where another one claims its voxels more strongly.
    """
    excess = []
    for odds, size in zip(organ_log_odds(logits, task), sizes, strict=True):
        largest = odds.flatten().topk(min(size + 1, odds.numel())).values
        # The largest value that is not to be among the organ's, if there is one.
        excess.append(odds - (largest[size] if size < odds.numel() else largest[-1] - 1))
    background = [] if task.multi_label else [torch.zeros_like(excess[0])]
    return torch.stack(background + excess)
