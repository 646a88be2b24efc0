"""Logistic regression on the features of a frozen encoder, standardised over the labelled cases together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pgl_ext.geometry import upsample_features

__all__ = ["LinearClassifier", "Statistics", "fit_linear"]

_MAX_STEPS = 100
# A channel that is constant, such as one that a ReLU keeps shut, has no scale: it is centred only.
_LEAST_DEVIATION = 1e-6


class Statistics(NamedTuple):
    """Mean and standard deviation of every channel of several feature maps, one map after another, (F,) each."""

    mean: torch.Tensor
    deviation: torch.Tensor

    @classmethod
    def of_maps(cls, maps: Sequence[torch.Tensor]) -> Statistics:
        """Over all places of the maps (1, C, x, y, z) of one volume."""
        deviations, means = zip(*(torch.std_mean(m[0].flatten(1), dim=1, correction=0) for m in maps), strict=True)
        return cls(torch.cat(means), torch.cat(deviations))

    @classmethod
    def pooled(cls, volumes: Sequence[Statistics]) -> Statistics:
        """Over several volumes, each with the same weight: variance = mean of the variances + variance of the means."""
        means, deviations = map(torch.stack, zip(*volumes, strict=True))
        variance = deviations.square().mean(0) + means.var(0, correction=0)
        return cls(means.mean(0), variance.sqrt())


class LinearClassifier(NamedTuple):
    """Logits = (features - mean) / scale @ weight + bias; shapes (F,), (F,), (F, out_channels), (out_channels,)."""

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def logits_of_volume(
        self, maps: Sequence[torch.Tensor], strides: Sequence[Sequence[int]], size: Sequence[int]
    ) -> torch.Tensor:
        """Logits (1, out_channels, X, Y, Z) of a volume of a size (X, Y, Z) in voxels.

        The maps (1, C, x, y, z), with strides in voxels per axis, are interpolated linearly between their places.
        """
        parameters = (values[..., None, None, None] for values in (self.mean, self.scale, self.weight))
        channels = [m.shape[1] for m in maps]
        of_maps = zip(*(values.split(channels) for values in parameters), strict=True)
        total = self.bias.view(1, -1, 1, 1, 1)
        # A linear classifier and linear interpolation commute, and there are fewer logits than features to interpolate.
        for features, stride, (mean, scale, weight) in zip(maps, strides, of_maps, strict=True):
            logits = F.conv3d((features - mean) / scale, weight.transpose(0, 1))
            total = total + upsample_features(logits, size, stride)
        return total


def fit_linear(
    features: torch.Tensor,
    statistics: Statistics,
    targets: torch.Tensor,
    weights: torch.Tensor,
    multi_label: bool,
    l2: float,
) -> LinearClassifier:
    """Fit logistic regression: multinomial, or of a multi-label task one binary regression per organ.

    Minimises the weighted mean cross-entropy (of a multi-label task its sum over the organs) + l2 / 2 * |weight|^2 by
    L-BFGS. Biases are not penalised.

    Args:
        features: (N, F).
        statistics: that features are standardised with.
        targets: 0 or 1 (N, out_channels).
        weights: (N, out_channels), 0 where a channel is not known; of a multi-class task all channels have the same.
        multi_label: whether channels are decided each by itself; otherwise exactly one is 1.
        l2: strength of the penalty.
    """
    scale = torch.where(statistics.deviation < _LEAST_DEVIATION, 1.0, statistics.deviation)
    standardised = (features - statistics.mean) / scale
    parameters = features.new_zeros(features.shape[1] + 1, targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=_MAX_STEPS, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
        if multi_label:
            losses = F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="none")
            # There is nothing to learn about an organ that is annotated nowhere.
            return (losses.sum(0) / weights.sum(0).clamp_min(1e-12)).sum()
        losses = weights[:, 0] * F.cross_entropy(logits, targets, reduction="none")
        return losses.sum() / weights[:, 0].sum()

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(parameters[-1], standardised, parameters[:-1])
        loss = cross_entropy(logits) + 0.5 * l2 * parameters[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return LinearClassifier(statistics.mean, scale, parameters.detach()[:-1], parameters.detach()[-1])
