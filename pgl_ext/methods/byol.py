"""BYOL: bootstrap your own latent (Grill et al. 2020)."""

from __future__ import annotations

from torch import nn

from pgl_ext.methods.online_target import OnlineTargetMethod
from pgl_ext.networks.base import FeatureNetwork
from pgl_ext.networks.heads import MLPHead

__all__ = ["BYOL"]


class BYOL(OnlineTargetMethod):
    """Global consistency of two views: their pooled features agree.

    The online path (encoder, global average pool, projector, predictor) predicts the target path's projection of the
    other view; the loss 2 - 2 cos, both ways, lies in [0, 8]. The PGL paper compares the two with the same encoder and
    views (section 5.2).

    Args:
        encoder: the network whose encoder is pre-trained.
        hidden_channels: channels inside projector and predictor.
        out_channels: channels of the features that are compared.
    """

    def __init__(self, encoder: FeatureNetwork, hidden_channels: int = 4096, out_channels: int = 256) -> None:
        projector = nn.Sequential(
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), MLPHead(encoder.level_channels[-1], hidden_channels, out_channels)
        )
        predictor = MLPHead(out_channels, hidden_channels, out_channels)
        super().__init__(encoder, projector, predictor, out_channels)
