"""Features of a frozen encoder at the voxels of whole volumes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

__all__ = ["Statistics", "features_at", "re_estimate_batch_norm"]

# A channel that is constant, such as one that a ReLU keeps shut, has no scale: it is centred only.
_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of every channel of some feature maps, one after another.

    Args:
        mean: (F,).
        deviation: (F,).
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    @classmethod
    def of_maps(cls, maps: Sequence[torch.Tensor]) -> Statistics:
        """Over all places of the maps (1, C, x, y, z) of one volume."""
        deviations, means = zip(*(torch.std_mean(m[0].flatten(1), dim=1, correction=0) for m in maps), strict=True)
        return cls(torch.cat(means), torch.cat(deviations))

    @classmethod
    def pooled(cls, some: Sequence[Statistics]) -> Statistics:
        """Over several volumes, each with the same weight."""
        means = torch.stack([part.mean for part in some])
        variance = torch.stack([part.deviation.square() for part in some]).mean(0) + means.var(0, correction=0)
        return cls(means.mean(0), variance.sqrt())

    def standardise(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, F) with mean 0 and standard deviation 1."""
        return (features - self.mean) / self._scale

    def standardise_maps(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same of maps (1, C, x, y, z)."""
        channels = [m.shape[1] for m in maps]
        parts = zip(maps, self.mean.split(channels), self._scale.split(channels), strict=True)
        return [(m - mean.view(-1, 1, 1, 1)) / scale.view(-1, 1, 1, 1) for m, mean, scale in parts]

    @property
    def _scale(self) -> torch.Tensor:
        return torch.where(self.deviation < _LEAST_DEVIATION, 1.0, self.deviation)


def features_at(maps: Sequence[torch.Tensor], strides: Sequence[Sequence[int]], voxels: torch.Tensor) -> torch.Tensor:
    """Features of some voxels, interpolated linearly in each map.

    Feature j of a map with stride s is centred on voxel s * j; beyond the last one it is repeated.

    Args:
        maps: (1, C, x, y, z) each.
        strides: of each map, in voxels per axis.
        voxels: indices (N, 3).

    Returns:
        (N, F), the maps' channels one after another.
    """
    return torch.cat([_features_of_map(m, stride, voxels) for m, stride in zip(maps, strides, strict=True)], dim=1)


def _features_of_map(features: torch.Tensor, stride: Sequence[int], voxels: torch.Tensor) -> torch.Tensor:
    last = torch.tensor(features.shape[2:], device=voxels.device) - 1
    places = voxels / torch.tensor(stride, device=voxels.device)
    # grid_sample counts from -1 to 1 and takes z first; an axis of one feature has nowhere to go.
    grid = (2 * places / last.clamp_min(1) - 1).flip(-1)[None, :, None, None]
    return F.grid_sample(features, grid, padding_mode="border", align_corners=True)[0, :, :, 0, 0].T


def re_estimate_batch_norm(encoder: nn.Module, volumes: Iterable[torch.Tensor]) -> None:
    """Replace the batch-norm statistics of an encoder by those of whole volumes, averaged over them, in place.

    An encoder of random weights has none yet, and one that was pre-trained has those of its patches.

    Args:
        encoder: the encoder.
        volumes: (1, C, X, Y, Z) each, on the encoder's device.
    """
    update_bn(volumes, encoder)
