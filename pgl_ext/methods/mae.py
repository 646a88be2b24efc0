"""Masked restoration with the whole segmentation network (after He et al. 2022)."""

from __future__ import annotations

import torch

from pgl_ext.losses import MaskedRestorationLoss
from pgl_ext.methods.base import Method, feature_std, hide
from pgl_ext.networks.base import SegmentationNetwork

__all__ = ["MAE"]


class MAE(Method):
    """The segmentation network restores views from what is left of them, encoder and decoder alike.

    Blocks of the views are set to 0, the mean of standardised volumes; the loss is the mean squared error of the hidden
    voxels alone. The views of a pair are two patches, whose overlap is not used. Everything but the last convolution
    can be fine-tuned from.

    Args:
        network: the segmentation network, with as many channels of output as of input.
    """

    pretrains_decoder = True

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.encoder = network
        self.loss = MaskedRestorationLoss()
        self.feature_channels = network.level_channels[-1]

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """``loss`` and deepest ``feature_std`` of ``views`` (B, V, C, X, Y, Z) with ``mask`` (B, V, 1, X, Y, Z)."""
        views, masked, hidden = hide(self, batch)
        features, restored = self.encoder.features_and_logits(masked)
        return {"loss": self.loss(restored, views, hidden), "feature_std": feature_std(features[-1])}
