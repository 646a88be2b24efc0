"""MONAI's UNet: strided convolutions with residual units, half the resolution at its finest level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets.unet import UNet as MonaiUNet
from torch import nn

from pgl_ext.networks.base import SegmentationNetwork, crop_to, level_strides, pad_to_multiple

__all__ = ["UNet"]


class UNet(SegmentationNetwork, MonaiUNet):
    """MONAI's ``UNet`` in 3D with residual units, with its names of tensors, for inputs of any size.

    Its last level, which has the most channels, has the stride of the one before.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, one per class.
        channels: of each level, finest first.
        strides: of the first convolution of each level but the last, per axis.
        num_res_units: convolutions of each residual unit; 0: convolutions that are not residual.
        kwargs: further arguments of MONAI's ``UNet``, such as ``norm``, ``act`` and ``dropout``.

    Example:
        >>> network = UNet(1, 3, channels=(8, 16, 32), strides=(2, 2))
        >>> network(torch.rand(1, 1, 33, 20, 17)).shape
        torch.Size([1, 3, 33, 20, 17])
    """

    family = "unet"
    # The finest level has the outputs' channels from its first convolution on.
    head_parts = ("model.2",)

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 14,
        channels: Sequence[int] = (32, 64, 128, 256, 320),
        strides: Sequence[Sequence[int] | int] = (2, 2, 2, 2),
        num_res_units: int = 2,
        **kwargs: Any,
    ) -> None:
        if len(strides) != len(channels) - 1:
            raise ValueError(f"strides has to give one less than channels, got {strides} and {channels}.")
        arguments = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "strides": [stride if isinstance(stride, int) else tuple(stride) for stride in strides],
            "num_res_units": num_res_units,
            **kwargs,
        }
        super().__init__(spatial_dims=3, **arguments)
        self.arguments = arguments
        levels = ["model" + ".1.submodule" * level for level in range(len(channels))]
        self.encoder_parts = (*(f"{level}.0" for level in levels[:-1]), levels[-1])
        self.decoder_parts = tuple(f"{level}.2" for level in levels[1:-1])
        self.level_channels = tuple(channels)
        self.level_strides = level_strides([*strides, 1])
        self.centres = ((0.0, 0.0, 0.0),) * len(channels)
        self.multiple = list(self.level_strides[-1])

    def _get_connection_block(self, down_path: nn.Module, up_path: nn.Module, subblock: nn.Module) -> nn.Module:
        return _Level(down_path, up_path, subblock)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, channels[i], ...), finest first, of (B, in_channels, X, Y, Z)."""
        return self.model.encode(pad_to_multiple(x, self.multiple))

    def features_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps = self.features(x)
        return maps, crop_to(self.model.decode(maps), x.shape[2:])


class _Level(nn.Sequential):
    """A level and those below it: MONAI's connection block, which can be run down and up again one after the other."""

    __constants__ = ("last",)  # TorchScript compiles one branch of each

    def __init__(self, down: nn.Module, up: nn.Module, below: nn.Module) -> None:
        super().__init__(down, SkipConnection(below), up)
        self.last = not isinstance(below, _Level)

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The maps of this level and of those below it, finest first."""
        x = self[0](x)
        below = [self[1].submodule(x)] if self.last else self[1].submodule.encode(x)
        return [x] + below  # noqa: RUF005, TorchScript unpacks no list

    def decode(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """What goes up from this level, of the maps of :meth:`encode`."""
        below = maps[1] if self.last else self[1].submodule.decode(maps[1:])
        return self[2](torch.cat([maps[0], below], dim=1))
