"""Losses of the self-supervised methods."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["LocalConsistencyLoss"]


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
