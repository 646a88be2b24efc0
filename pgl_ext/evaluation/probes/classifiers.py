"""From features to logits: logistic regression, and votes of the nearest labelled voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pgl_ext.evaluation.probes.features import features_at
from pgl_ext.geometry import upsample_features

__all__ = ["LabelledFeatures", "LinearClassifier", "NearestNeighbours"]

_MAX_STEPS = 100
_QUERIES_AT_A_TIME = 4096
# The temperature of the votes in Wu et al. 2018, which k-NN probes have used since.
_TEMPERATURE = 0.07
_LEAST_SHARE = 1e-6


@dataclass(frozen=True)
class LabelledFeatures:
    """What a classifier is fitted on.

    Args:
        features: (N, F).
        targets: 0 or 1 (N, channels).
        weights: of the voxels, and 0 where a channel is not known, (N, channels).
        multi_label: whether channels are decided each by itself; otherwise exactly one is 1.
    """

    features: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    multi_label: bool


class LinearClassifier:
    """Logistic regression: multinomial, or of a multi-label task one binary regression per organ.

    Minimises the weighted mean cross-entropy, of a multi-label task its sum over the organs, + l2 / 2 * |weight|^2 by
    L-BFGS; biases are not penalised.

    Args:
        labelled: features with their targets.
        strength: l2.

    Attributes:
        weight: (F, channels).
        bias: (channels,).
    """

    strengths = (1.0, 0.1, 0.01, 0.001)
    """To choose from."""
    default = 0.01
    """Where there is nothing to choose by."""

    def __init__(self, labelled: LabelledFeatures, strength: float) -> None:
        self.strength = strength
        features = labelled.features
        parameters = features.new_zeros(features.shape[1] + 1, labelled.targets.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [parameters], max_iter=_MAX_STEPS, tolerance_change=1e-6, line_search_fn="strong_wolfe"
        )

        def objective() -> torch.Tensor:
            optimizer.zero_grad()
            logits = torch.addmm(parameters[-1], features, parameters[:-1])
            loss = _cross_entropy(logits, labelled) + 0.5 * strength * parameters[:-1].square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(objective)
        self.weight, self.bias = parameters.detach()[:-1], parameters.detach()[-1]

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, channels) of features (N, F)."""
        return torch.addmm(self.bias, features, self.weight)

    def logits_of_volume(
        self, maps: Sequence[torch.Tensor], strides: Sequence[Sequence[int]], size: Sequence[int]
    ) -> torch.Tensor:
        """Logits at every voxel (1, channels, X, Y, Z) of feature maps (1, C, x, y, z).

        A linear classifier and linear interpolation commute: logits are interpolated, which are few, and not features.
        """
        total = self.bias.view(1, -1, 1, 1, 1)
        weights = self.weight.split([m.shape[1] for m in maps])
        for features, stride, weight in zip(maps, strides, weights, strict=True):
            total = total + upsample_features(F.conv3d(features, weight.T[..., None, None, None]), size, stride)
        return total


def _cross_entropy(logits: torch.Tensor, labelled: LabelledFeatures) -> torch.Tensor:
    if labelled.multi_label:
        losses = F.binary_cross_entropy_with_logits(logits, labelled.targets, labelled.weights, reduction="none")
        # There is nothing to learn about an organ that is annotated nowhere.
        return (losses.sum(0) / labelled.weights.sum(0).clamp_min(1e-12)).sum()
    weights = labelled.weights[:, 0]
    return (weights * F.cross_entropy(logits, labelled.targets, reduction="none")).sum() / weights.sum()


class NearestNeighbours:
    """Votes of the k labelled voxels of the highest cosine similarity s, each with weight * exp(s / 0.07).

    The temperature is that of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    CVPR 2018. Logits are the logarithms of the classes' shares of the votes, of a multi-label task of their odds.

    Args:
        labelled: features with their targets.
        strength: k.
    """

    strengths = (320, 80, 20, 5)
    """To choose from."""
    default = 80
    """Where there is nothing to choose by."""

    def __init__(self, labelled: LabelledFeatures, strength: int) -> None:
        self.strength = strength
        self.labelled = labelled
        self._directions = F.normalize(labelled.features, dim=1)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, channels) of features (N, F)."""
        return torch.cat([self._logits(part) for part in features.split(_QUERIES_AT_A_TIME)])

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        similarity = F.normalize(features, dim=1) @ self._directions.T
        nearest, indices = similarity.topk(min(int(self.strength), similarity.shape[1]), dim=1)
        # Relative to the nearest one, lest the exponential vanish for all of them.
        votes = ((nearest - nearest[:, :1]) / _TEMPERATURE).exp()[..., None] * self.labelled.weights[indices]
        targets = self.labelled.targets[indices]
        positive, negative = (votes * targets).sum(1), (votes * (1 - targets)).sum(1)
        share = (positive / (positive + negative).clamp_min(1e-12)).clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)
        return torch.logit(share) if self.labelled.multi_label else share.log()

    def logits_of_volume(
        self, maps: Sequence[torch.Tensor], strides: Sequence[Sequence[int]], size: Sequence[int]
    ) -> torch.Tensor:
        """Logits at every voxel (1, channels, X, Y, Z) of feature maps (1, C, x, y, z).

        Voxels at the places of the finest map vote; in between logits are interpolated. To ask the neighbours of every
        voxel would take some 30 times longer.
        """
        grid = torch.meshgrid(
            *(torch.arange(n) * s for n, s in zip(maps[0].shape[2:], strides[0], strict=True)), indexing="ij"
        )
        places = torch.stack([axis.flatten() for axis in grid], dim=1).to(maps[0].device)
        logits = self.logits(features_at(maps, strides, places))
        return upsample_features(logits.T.reshape(1, -1, *maps[0].shape[2:]), size, strides[0])
