"""Losses of the self-supervised methods and of segmentation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import nn

from pgl_ext.flags import as_bool
from pgl_ext.task import SegmentationTask

__all__ = ["DiceCrossEntropyLoss", "LocalConsistencyLoss", "SegmentationLoss"]

# Its sigmoid is 2e-35: summed over a batch of large patches it is still nothing beside the smoothing of a Dice loss.
_CERTAINLY_ABSENT = -80.0


class LocalConsistencyLoss(nn.Module):
    """Squared distance of channel-normalised features, averaged over samples and cells (PGL paper, equation 8).

    ``mean over n, d, h, w of || norm(prediction) - stop_gradient(norm(target)) ||^2``, in [0, 4]: 0 where all features
    point the same way, 4 where they are opposite. Computed in float32 whatever the inputs' dtype.

    Example:
        >>> loss = LocalConsistencyLoss()
        >>> features = torch.rand(2, 256, 6, 6, 2)
        >>> float(loss(features, features)) < 1e-6
        True
    """

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare.

        Args:
            prediction: online features after the predictor, (B, C, ...).
            target: target features of the same shape; receives no gradient.

        Returns:
            scalar in [0, 4].

        Raises:
            ValueError: where the shapes differ.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                "prediction and target must have the same shape, got "
                f"{tuple(prediction.shape)} and {tuple(target.shape)}."
            )
        with torch.autocast(prediction.device.type, enabled=False):
            # eps keeps constant features (crops of nothing but air) free of NaN.
            prediction = F.normalize(prediction.float(), dim=1, eps=1e-6)
            target = F.normalize(target.detach().float(), dim=1, eps=1e-6)
            return (prediction - target).square().sum(dim=1).mean()


class DiceCrossEntropyLoss(nn.Module):
    """Dice loss plus cross-entropy: binary in each channel of a multi-label task, else over the classes.

    MONAI's ``DiceCELoss`` takes the cross-entropy over classes wherever there are several channels, also with
    ``sigmoid=True``, as if organs could not overlap.

    Args:
        multi_label: whether each channel is a binary decision of its own; else the first one is the background, which
            the Dice loss leaves out.
        kwargs: further arguments of MONAI's ``DiceLoss``, such as ``batch=True``: Dice over the batch as a whole, in
            which an organ need not be in every patch.
    """

    def __init__(self, multi_label: bool, **kwargs: Any) -> None:
        super().__init__()
        self.multi_label = multi_label = as_bool(multi_label, "multi_label")
        self.dice = DiceLoss(sigmoid=multi_label, softmax=not multi_label, include_background=multi_label, **kwargs)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare logits with targets, 0 or 1 in float32; both (B, out_channels, X, Y, Z)."""
        cross_entropy = F.binary_cross_entropy_with_logits if self.multi_label else F.cross_entropy
        return self.dice(logits, target) + cross_entropy(logits, target)


class SegmentationLoss(nn.Module):
    """Has a segmentation loss compare logits with a label map, in the organs that were annotated.

    Where an organ was not annotated in a sample, neither its logits nor its labels count: absent from the label map
    does not mean absent from the patient.

    Args:
        task: the organs; says how label maps become targets.
        loss: compares logits with targets of the same shape (B, out_channels, X, Y, Z), such as
            :class:`DiceCrossEntropyLoss`.

    Example:
        >>> task = SegmentationTask({"spleen": [1]}, multi_label=True)
        >>> loss = SegmentationLoss(task, DiceCrossEntropyLoss(multi_label=True, batch=True))
        >>> float(loss(torch.full((1, 1, 4, 4, 4), 20.0), {"label": torch.ones(1, 1, 4, 4, 4)})) < 1e-3
        True
    """

    def __init__(self, task: SegmentationTask, loss: nn.Module) -> None:
        super().__init__()
        self.task = task
        self.loss = loss

    def forward(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compare.

        Args:
            logits: (B, out_channels, X, Y, Z).
            batch: ``label`` (B, 1, X, Y, Z) with the files' values; and optionally ``annotated`` (B, organs), whether
                the organ was annotated in the sample.

        Returns:
            scalar.

        Raises:
            ValueError: where an organ was not annotated and the task is not multi-label: the background then holds
                that organ unmarked.
        """
        target = self.task.targets(batch["label"])
        annotated = batch.get("annotated")
        if annotated is not None and not bool(annotated.all()):
            if not self.task.multi_label:
                raise ValueError(
                    "an organ is not annotated in some of the cases, so that a multi-class task can not tell it from "
                    "background: set multi_label to true, or leave that organ or those cases out."
                )
            absent = ~annotated.bool()[:, :, None, None, None]
            logits = logits.masked_fill(absent, _CERTAINLY_ABSENT)
            target = target.masked_fill(absent, 0)
        return self.loss(logits, target)
