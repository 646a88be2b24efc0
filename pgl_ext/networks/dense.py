"""Dense features: the encoder's deepest feature map as a network of its own."""

from __future__ import annotations

import torch
from torch import nn

from pgl_ext.networks.base import FeatureNetwork

__all__ = ["DenseFeatures"]


class DenseFeatures(nn.Module):
    """The deepest feature map of an encoder.

    Feature j lies on input voxel ``stride * j + centre``, per axis. The module can be scripted.

    Args:
        encoder: the network whose deepest map is wanted.

    Example:
        >>> network = DenseFeatures(ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.25))
        >>> network(torch.rand(1, 1, 64, 48, 16)).shape
        torch.Size([1, 128, 4, 3, 2])
    """

    def __init__(self, encoder: FeatureNetwork) -> None:
        super().__init__()
        self.encoder = encoder
        self.stride, self.centre = tuple(encoder.level_strides[-1]), tuple(encoder.centres[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map volumes (B, C, X, Y, Z) to features (B, F, ceil(X / s_x), ceil(Y / s_y), ceil(Z / s_z))."""
        return self.encoder.features(x)[-1]
