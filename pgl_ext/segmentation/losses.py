"""Losses of segmentation that leave out organs that were not annotated, and voxels to ignore."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import nn

from pgl_ext.settings import parse_bool
from pgl_ext.task import SegmentationTask

__all__ = ["DiceCrossEntropyLoss", "SegmentationLoss"]


class DiceCrossEntropyLoss(nn.Module):
    """Dice loss plus cross-entropy: binary in each channel of a multi-label task, else over the classes.

    MONAI's ``DiceCELoss`` takes the cross-entropy over classes of several channels also with ``sigmoid=True``.

    Args:
        multi_label: whether each channel is a binary decision of its own; else the first one is the background, which
            the Dice loss leaves out.
        kwargs: further arguments of MONAI's ``DiceLoss``, such as ``batch=True``: Dice over the batch as a whole, in
            which an organ need not be in every patch.
    """

    def __init__(self, multi_label: bool, **kwargs: Any) -> None:
        super().__init__()
        self.multi_label = multi_label = parse_bool(multi_label, "multi_label")
        self.dice = DiceLoss(sigmoid=multi_label, softmax=not multi_label, include_background=multi_label, **kwargs)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare logits with targets, 0 or 1 in float32; both (B, out_channels, X, Y, Z)."""
        cross_entropy = F.binary_cross_entropy_with_logits if self.multi_label else F.cross_entropy
        return self.dice(logits, target) + cross_entropy(logits, target)


class SegmentationLoss(nn.Module):
    """A segmentation loss of logits and a label map, over the organs that were annotated.

    Where an organ was not annotated in a sample, neither its logits nor its labels count. The loss is then
    ``1 / C * sum over c of loss(logits of c, targets of c)``, where c runs over the C organs and each term over the
    samples in which c was annotated; without one it is 0. So the weight of an organ depends neither on what else was
    annotated nor on in how many of the samples it was.

    Where voxels are to be ignored, the loss is given all others of the batch in a row, (1, channels, N, 1, 1), and is 0
    where there are none: it must not depend on where voxels lie.

    Args:
        task: the organs; says how label maps become targets.
        loss: compares logits with targets of the same shape (B, channels, X, Y, Z); default:
            :class:`DiceCrossEntropyLoss` over the batch as a whole. For a multi-label task it is the mean over its
            channels, each by itself.

    Example:
        >>> task = SegmentationTask({"spleen": [1]}, multi_label=True)
        >>> loss = SegmentationLoss(task)
        >>> float(loss(torch.full((1, 1, 4, 4, 4), 20.0), {"label": torch.ones(1, 1, 4, 4, 4)})) < 1e-3
        True
    """

    def __init__(self, task: SegmentationTask, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.task = task
        self.loss = DiceCrossEntropyLoss(task.multi_label, batch=True) if loss is None else loss

    def forward(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, a scalar, of logits (B, out_channels, X, Y, Z).

        Of deep supervision, (B, K, out_channels, X, Y, Z), it is the mean with weights 1, 1/2, 1/4, ...

        Args:
            batch: ``label`` (B, 1, X, Y, Z) with the files' values, optionally ``annotated`` (B, organs), bool.

        Raises:
            ValueError: an organ was not annotated and the task is not multi-label.
        """
        if logits.ndim == 6:
            weights = [0.5**level for level in range(logits.shape[1])]
            levels = zip(weights, logits.unbind(dim=1), strict=True)
            return sum(weight * self(level, batch) for weight, level in levels) / sum(weights)
        target, voxels = self.task.targets(batch["label"]), self.task.known_voxels(batch["label"])
        annotated = batch.get("annotated")
        if annotated is None or bool(annotated.all()):
            return self._compare(logits, target, voxels)
        self.task.check_annotated(annotated)
        # Connected to the network, so that there is a gradient, of zeros, where nothing was annotated.
        total = logits[:0].sum()
        for organ, known in enumerate(annotated.bool().T):
            if bool(known.any()):
                of_known = None if voxels is None else voxels[known]
                total = total + self._compare(logits[known, organ, None], target[known, organ, None], of_known)
        return total / len(self.task.names)

    def _compare(self, logits: torch.Tensor, target: torch.Tensor, voxels: torch.Tensor | None) -> torch.Tensor:
        """The loss of those voxels, bool (B, 1, X, Y, Z), or of all."""
        if voxels is None:
            return self.loss(logits, target)
        if not bool(voxels.any()):
            return logits[:0].sum()
        return self.loss(*(values.movedim(1, 0)[:, voxels[:, 0]][None, ..., None, None] for values in (logits, target)))
