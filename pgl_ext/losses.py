"""Losses of the self-supervised methods and of segmentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pgl_ext.task import SegmentationTask

__all__ = ["LocalConsistencyLoss", "SegmentationLoss"]

# A sigmoid of it is 1e-13: neither the overlap nor the cross-entropy with "absent" notices, and no gradient flows back.
_CERTAINLY_ABSENT = -30.0


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


class SegmentationLoss(nn.Module):
    """Has a segmentation loss compare logits with a label map, in the organs that were annotated.

    Where an organ was not annotated in a sample, neither its logits nor its labels count: absent from the label map
    does not mean absent from the patient.

    Args:
        task: the organs; says how label maps become targets.
        loss: compares logits with targets of the same shape (B, out_channels, X, Y, Z), such as MONAI's ``DiceCELoss``
            with ``sigmoid=True`` for a multi-label task and ``softmax=True`` for a multi-class one.

    Example:
        >>> from monai.losses import DiceCELoss
        >>> task = SegmentationTask({"spleen": [1]}, multi_label=True)
        >>> loss = SegmentationLoss(task, DiceCELoss(sigmoid=True, batch=True))
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
