"""Dense features: the encoder's deepest feature map as a network of its own."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["DenseFeatures"]


class DenseFeatures(nn.Module):
    """The deepest feature map of an encoder.

    Feature j lies on input voxel ``stride * j``, per axis. The module can be scripted.

    Args:
        encoder: maps (B, C, X, Y, Z) to its feature maps, finest first; has ``stride``.

    Attributes:
        stride: output stride per axis, in voxels.

    Example:
        >>> network = DenseFeatures(ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.25))
        >>> network(torch.rand(1, 1, 64, 48, 16)).shape
        torch.Size([1, 128, 4, 3, 2])
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.stride = tuple(encoder.stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map volumes (B, C, X, Y, Z) to features (B, F, ceil(X / s_x), ceil(Y / s_y), ceil(Z / s_z))."""
        return self.encoder(x)[-1]
