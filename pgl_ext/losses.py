"""Losses of the self-supervised methods."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["LocalConsistencyLoss", "MaskedRestorationLoss", "NTXentLoss", "VoxelContrastLoss"]


class LocalConsistencyLoss(nn.Module):
    """Squared distance of channel-normalised features, averaged over samples and cells (PGL paper, equation 8).

    ``mean over n, d, h, w of || norm(prediction) - stop_gradient(norm(target)) ||^2``, in [0, 4], computed in float32.

    Example:
        >>> loss = LocalConsistencyLoss()
        >>> features = torch.rand(2, 256, 6, 6, 2)
        >>> float(loss(features, features)) < 1e-6
        True
    """

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Scalar loss of features (B, C, ...) of the same shape; a ValueError where the shapes differ."""
        _check_same_shape("prediction and target", prediction, target)
        with torch.autocast(prediction.device.type, enabled=False):
            # eps keeps constant features (crops of nothing but air) free of NaN.
            prediction = F.normalize(prediction.float(), dim=1, eps=1e-6)
            target = F.normalize(target.detach().float(), dim=1, eps=1e-6)
            return (prediction - target).square().sum(dim=1).mean()


class MaskedRestorationLoss(nn.Module):
    """Mean squared error of the voxels that were hidden, averaged over samples, each of which counts alike.

    Computed in float32; a sample in which nothing was hidden has 0.

    Example:
        >>> loss = MaskedRestorationLoss()
        >>> hidden = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
        >>> hidden[..., 0] = True
        >>> float(loss(torch.zeros(1, 1, 4, 4, 4), hidden.float() * 3, hidden))
        9.0
    """

    def forward(self, restored: torch.Tensor, original: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Scalar loss of (B, C, X, Y, Z), with a mask (B, 1, X, Y, Z); a ValueError where the shapes differ."""
        _check_same_shape("restored and original views", restored, original)
        with torch.autocast(restored.device.type, enabled=False):
            errors = (restored.float() - original.float()).square() * hidden
            voxels = hidden.flatten(1).sum(dim=1).clamp(min=1) * original.shape[1]
            return (errors.flatten(1).sum(dim=1) / voxels).mean()


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross-entropy: each sample picks out its partner among all others.

    ``mean over i of -log(exp(cos(z_i, z_p(i)) / t) / sum over j != i of exp(cos(z_i, z_j) / t))``, where i and j run
    over the 2 N samples of both views and p(i) is i in the other view (Chen et al. 2020, SimCLR, equation 1). In [0,
    log(1 + (2 N - 2) exp(2 / t))]; 0 for a single pair. Computed in float32.

    Args:
        temperature: t; the smaller, the more the most similar of the others count.

    Raises:
        ValueError: where the temperature is not positive.

    Example:
        >>> features = torch.eye(4)
        >>> float(NTXentLoss()(features, features)) < 1e-3
        True
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Scalar loss of features (N, C) of both views, in the same order; a ValueError where the shapes differ."""
        _check_same_shape("the features of both views", first, second)
        with torch.autocast(first.device.type, enabled=False):
            features = F.normalize(torch.cat([first, second]).float(), dim=1, eps=1e-6)
            logits = (features @ features.T / self.temperature).fill_diagonal_(-torch.inf)
            partner = torch.arange(len(features), device=features.device).roll(len(first))
            return F.cross_entropy(logits, partner)


class VoxelContrastLoss(NTXentLoss):
    """:class:`NTXentLoss` whose samples are cells: each picks out the same cell of the other view.

    The others are all other cells of the batch, in both views; memory grows with the square of their number.

    Args:
        temperature: see :class:`NTXentLoss`.
    """

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Scalar loss of features (B, C, X, Y, Z) of both views on one grid; a ValueError where the shapes differ."""
        _check_same_shape("the features of both views", first, second)
        return super().forward(*(features.movedim(1, -1).flatten(0, -2) for features in (first, second)))


def _check_same_shape(names: str, first: torch.Tensor, second: torch.Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"{names} must have the same shape, got {tuple(first.shape)} and {tuple(second.shape)}.")
