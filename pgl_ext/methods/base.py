"""What every self-supervised method offers to the trainer and its handlers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Method", "check_two_views", "feature_std"]


class Method(nn.Module):
    """A self-supervised method: an ``nn.Module`` that turns a batch into a loss.

    Attributes:
        encoder: the encoder that is pre-trained, and exported when training ends.
        feature_channels: channels of the features whose ``feature_std`` is logged.
        logged: names of further scalars of ``forward``, which the log has columns for.
    """

    encoder: nn.Module
    feature_channels: int
    logged: tuple[str, ...] = ()

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch.

        Args:
            batch: ``views`` (B, V, C, X, Y, Z) and ``affines`` (B, V, 4, 4), view voxel index to source voxel index.

        Returns:
            ``loss``, a scalar with gradient, ``feature_std`` and those of ``logged``, scalars without.
        """
        raise NotImplementedError

    @property
    def healthy_std(self) -> float:
        """``feature_std`` of features that have not collapsed: 1 / sqrt(feature_channels)."""
        return 1 / math.sqrt(self.feature_channels)

    def momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Pairs (online, target) of modules where the target follows the online one; none by default."""
        return iter(())


def check_two_views(method: Method, views: torch.Tensor) -> None:
    """Raise a ValueError where ``views`` are not (B, 2, C, X, Y, Z)."""
    if views.ndim != 6 or views.shape[1] != 2:
        raise ValueError(
            f"{type(method).__name__} compares two views: expected views (B, 2, C, X, Y, Z), got {tuple(views.shape)}."
        )


def feature_std(features: torch.Tensor) -> torch.Tensor:
    """Standard deviation of normalised features (B, C, ...), averaged over channels; a scalar without gradient.

    About 1 / sqrt(C) where features spread over the sphere, 0 where all are the same: collapse.
    """
    normalised = F.normalize(features.detach().float(), dim=1, eps=1e-6).transpose(0, 1).flatten(1)
    return normalised.std(dim=1, unbiased=False).mean()
