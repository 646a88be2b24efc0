"""Models Genesis: restoring patches from their deformed copies (Zhou et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from pgl_ext.methods.base import Method, feature_std
from pgl_ext.networks.segmentation import SegmentationNet
from pgl_ext.transforms.deformations import rescale_to_unit

__all__ = ["ModelsGenesis"]


class ModelsGenesis(Method, SegmentationNet):
    """Restoration of the views from their deformed copies by the segmentation network, encoder and decoder alike.

    L = mean over patches, channels and voxels of (sigmoid(f(deformed)) - original)^2, in [0, 1]: f is the segmentation
    network with one output per channel of the input, the original is the view rescaled to [0, 1] by its own smallest
    and largest value. The views of a pair are two patches, whose overlap is not used.

    Args:
        encoder: returns a feature pyramid, finest first, and has ``channels`` and ``strides``.
        aspp_channels: channels of the pyramid pooling.
        decoder_channels: channels of the decoder's three levels, coarse to fine.
    """

    def __init__(
        self, encoder: nn.Module, aspp_channels: int = 256, decoder_channels: Sequence[int] = (256, 128, 32)
    ) -> None:
        channels = encoder.conv1.in_channels
        super().__init__(channels, channels, encoder, aspp_channels=aspp_channels, decoder_channels=decoder_channels)
        self.feature_channels = encoder.channels[-1]

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """``loss`` and deepest ``feature_std`` of a batch of ``views`` and ``deformed``, both (B, V, C, X, Y, Z)."""
        if "deformed" not in batch:
            raise ValueError(
                f"Models Genesis restores the entry 'deformed', but the batch has {sorted(batch)}: let "
                "RandDeformedCopyd follow the views in train#preprocessing, as in methods/models_genesis.yaml."
            )
        original, _, _ = rescale_to_unit(batch["views"].flatten(0, 1))
        deformed = batch["deformed"].flatten(0, 1)
        features = self.encoder(deformed)
        restored = self.decode(features, deformed.shape[2:]).float().sigmoid()
        return {"loss": F.mse_loss(restored, original), "feature_std": feature_std(features[-1])}
