"""What PGL and BYOL share: an online network that predicts the features of a slowly moving target network."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import nn

from pgl_ext.losses import LocalConsistencyLoss
from pgl_ext.methods.base import Method, check_two_views, feature_std
from pgl_ext.networks.base import FeatureNetwork

__all__ = ["OnlineTargetMethod"]


class OnlineTargetMethod(Method):
    """Online features of one view predict the target's features of the other.

    The online path is encoder, projector, :meth:`match`, predictor; the target path is the same without a predictor,
    gets no gradient and follows the online one by an exponential moving average (``handlers.TargetEMA``), but for its
    batch-norm statistics.

    Args:
        encoder: the network whose encoder is pre-trained; a decoder of it stays as it is.
        projector: maps the deepest features to those that are compared, (B, feature_channels, ...).
        predictor: maps those onto the target's, in the online path alone.
        feature_channels: channels of the features that are compared.
    """

    def __init__(
        self, encoder: FeatureNetwork, projector: nn.Module, predictor: nn.Module, feature_channels: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.train_encoder_alone()
        self.projector = projector
        self.predictor = predictor
        self.target_encoder = encoder.encoder_copy().requires_grad_(False)
        self.target_projector = deepcopy(projector).requires_grad_(False)
        self.loss = LocalConsistencyLoss()
        self.feature_channels = feature_channels

    def match(self, projected: torch.Tensor, batch: dict) -> torch.Tensor:
        """Make the features of both views comparable, (2 B, feature_channels, ...); by default they are."""
        return projected

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Compute the symmetric loss, each view predicting the other: the sum of two terms in [0, 4].

        Args:
            batch: ``views`` (B, 2, C, X, Y, Z) and whatever :meth:`match` needs.

        Returns:
            ``loss`` and ``feature_std`` of the online projections.

        Raises:
            ValueError: where there are not two views.
        """
        views = batch["views"]
        check_two_views(self, views)
        loss, projected = self.consistency(self.encoder.features(views.flatten(0, 1))[-1], batch)
        return {"loss": loss, "feature_std": feature_std(projected)}

    def consistency(self, features: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The symmetric loss, and the online projections, of the deepest online features (2 B, C, x, y, z)."""
        projected = self.projector(features)
        prediction = self.predictor(self.match(projected, batch))
        with torch.no_grad():
            whole = self.target_encoder.features(batch["views"].flatten(0, 1))[-1]
            target = self.match(self.target_projector(whole), batch)
        return self.loss(prediction[0::2], target[1::2]) + self.loss(prediction[1::2], target[0::2]), projected

    def momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield from zip(self.encoder.encoder_modules(), self.target_encoder.encoder_modules(), strict=True)
        yield self.projector, self.target_projector
