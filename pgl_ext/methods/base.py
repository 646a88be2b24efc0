"""What every self-supervised method offers to the trainer and its handlers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from pgl_ext.networks.base import FeatureNetwork

__all__ = ["Method", "check_two_views", "feature_std", "hide"]


class Method(nn.Module):
    """A self-supervised method: an ``nn.Module`` that turns a batch into a loss.

    Attributes:
        encoder: the network whose encoder is pre-trained, and written when training ends.
        feature_channels: channels of the features whose ``feature_std`` is logged.
        pretrains_decoder: whether ``encoder`` is a segmentation network whose decoder is pre-trained, and written, too.
        logged: names of further scalars of ``forward``, which the log has columns for.
    """

    encoder: FeatureNetwork
    feature_channels: int
    pretrains_decoder: bool = False
    logged: tuple[str, ...] = ()

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch.

        Args:
            batch: ``views`` (B, V, C, X, Y, Z) and ``affines`` (B, V, 4, 4), view voxel index to source voxel index.

        Returns:
            ``loss``, a scalar with gradient, ``feature_std`` and those of ``logged``, scalars without.
        """
        raise NotImplementedError

    def decoder_state(self) -> dict[str, torch.Tensor]:
        """Tensors of the decoder that is pre-trained, named as in the segmentation network; none without one."""
        return self.encoder.decoder_state() if self.pretrains_decoder else {}

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


def hide(method: Method, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a batch, the same with their hidden voxels set to 0, and where those are.

    Returns:
        Two tensors (B V, C, X, Y, Z), and a mask (B V, 1, X, Y, Z).

    Raises:
        ValueError: the batch has no mask.
    """
    if "mask" not in batch:
        raise ValueError(
            f"{type(method).__name__} restores what the entry 'mask' hides, but the batch has {sorted(batch)}: let "
            "RandBlockMaskd follow the views in train#preprocessing, as in methods/mae.yaml."
        )
    views, hidden = batch["views"].flatten(0, 1), batch["mask"].flatten(0, 1)
    return views, views.masked_fill(hidden, 0), hidden


def feature_std(features: torch.Tensor) -> torch.Tensor:
    """Standard deviation of normalised features (B, C, ...), averaged over channels; a scalar without gradient.

    About 1 / sqrt(C) where features spread over the sphere, 0 where all are the same: collapse.
    """
    normalised = F.normalize(features.detach().float(), dim=1, eps=1e-6).transpose(0, 1).flatten(1)
    return normalised.std(dim=1, unbiased=False).mean()
