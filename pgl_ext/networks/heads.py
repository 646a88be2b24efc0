"""Projection and prediction heads."""

from __future__ import annotations

from torch import nn

__all__ = ["ConvHead", "MLPHead"]


class ConvHead(nn.Sequential):
    """1x1x1 convolution, batch norm, ReLU, 1x1x1 convolution: PGL's projector and predictor (paper, section 3.3).

    No pooling: (B, in_channels, X, Y, Z) becomes (B, out_channels, X, Y, Z). The first convolution has no bias, since
    the batch norm after it would cancel it.
    """

    def __init__(self, in_channels: int, hidden_channels: int = 4096, out_channels: int = 256) -> None:
        super().__init__(
            nn.Conv3d(in_channels, hidden_channels, kernel_size=1, bias=False),
            nn.BatchNorm3d(hidden_channels),
            nn.ReLU(inplace=True),
            nn.Conv3d(hidden_channels, out_channels, kernel_size=1),
        )


class MLPHead(nn.Sequential):
    """:class:`ConvHead` for pooled features, with linear layers: (B, in_channels) becomes (B, out_channels).

    BYOL's projector and predictor (Grill et al. 2020, section 3.2).
    """

    def __init__(self, in_channels: int, hidden_channels: int = 4096, out_channels: int = 256) -> None:
        super().__init__(
            nn.Linear(in_channels, hidden_channels, bias=False),
            nn.BatchNorm1d(hidden_channels),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_channels, out_channels),
        )
