"""Dense features: the encoder's deepest feature map as a network of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pgl_ext.networks.base import FeatureNetwork

__all__ = ["DenseFeatures"]


class DenseFeatures(nn.Module):
    """The deepest feature map of an encoder.

    Feature j lies on input voxel ``stride * j + centre``, per axis. The module can be scripted. Its state dict has the
    names of encoder files, so that those who load a file by its names alone, as MONAI's exports do, load all of it.

    Args:
        encoder: the network whose deepest map is wanted; what is not of its encoder is left out.

    Example:
        >>> network = DenseFeatures(ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.25))
        >>> network(torch.rand(1, 1, 64, 48, 16)).shape
        torch.Size([1, 128, 4, 3, 2])
    """

    def __init__(self, encoder: FeatureNetwork) -> None:
        super().__init__()
        self.encoder = encoder.encoder_copy()
        # TorchScript compiles what is called forward, of which the parts are gone.
        self.encoder.forward = self.encoder.features
        self.stride, self.centre = tuple(encoder.level_strides[-1]), tuple(encoder.centres[-1])
        self._aliases = encoder.aliases()
        if not encoder.key_prefix:
            self.register_state_dict_post_hook(_without_prefix)
            self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map volumes (B, C, X, Y, Z) to features (B, F, ceil(X / s_x), ceil(Y / s_y), ceil(Z / s_z))."""
        return self.encoder.features(x)[-1]


_PREFIX = "encoder."


def _without_prefix(network: DenseFeatures, state: dict[str, torch.Tensor], prefix: str, _: Any) -> None:
    """Name tensors as the encoder's files do."""
    for key in [key for key in state if key.startswith(prefix + _PREFIX)]:
        state[prefix + key.removeprefix(prefix + _PREFIX)] = state.pop(key)


def _with_prefix(network: DenseFeatures, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """The reverse; further names of a tensor, which other parts of the whole network have, are left out."""
    own = network.encoder.state_dict()
    for key in [key for key in state if key.startswith(prefix)]:
        value, name = state.pop(key), key.removeprefix(prefix)
        if name in own or name not in network._aliases:
            state[prefix + _PREFIX + name] = value
