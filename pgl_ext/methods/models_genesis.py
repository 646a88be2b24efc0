"""Models Genesis: restoring patches from their deformed copies (Zhou et al. 2019)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pgl_ext.methods.base import Method, feature_std
from pgl_ext.networks.base import SegmentationNetwork
from pgl_ext.transforms.deformations import rescale_to_unit

__all__ = ["ModelsGenesis"]


class ModelsGenesis(Method):
    """Restoration of the views from their deformed copies by the segmentation network, encoder and decoder alike.

    L = mean over patches, channels and voxels of (sigmoid(f(deformed)) - original)^2, in [0, 1]: f is the segmentation
    network with one output per channel of the input, the original is the view rescaled to [0, 1] by its own smallest
    and largest value. The views of a pair are two patches, whose overlap is not used.

    Args:
        network: the segmentation network, with as many channels of output as of input.
    """

    pretrains_decoder = True

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.encoder = network
        self.feature_channels = network.level_channels[-1]
        self.register_load_state_dict_pre_hook(_within_network)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """``loss`` and deepest ``feature_std`` of a batch of ``views`` and ``deformed``, both (B, V, C, X, Y, Z)."""
        if "deformed" not in batch:
            raise ValueError(
                f"Models Genesis restores the entry 'deformed', but the batch has {sorted(batch)}: let "
                "RandDeformedCopyd follow the views in train#preprocessing, as in methods/models_genesis.yaml."
            )
        original, _, _ = rescale_to_unit(batch["views"].flatten(0, 1))
        deformed = batch["deformed"].flatten(0, 1)
        features, logits = self.encoder.features_and_logits(deformed)
        restored = logits.float().sigmoid()
        return {"loss": F.mse_loss(restored, original), "feature_std": feature_std(features[-1])}


def _within_network(method: nn.Module, state: dict[str, torch.Tensor], *_: Any) -> None:
    """Rename the tensors of earlier checkpoints, in which the method was the paper's network itself."""
    if any(key.startswith("aspp.") for key in state):
        for key in list(state):
            state[f"encoder.{key}"] = state.pop(key)
