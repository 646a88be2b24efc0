"""MONAI's SegResNet: a residual U-Net with a wide encoder and a slim decoder, at full resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets.segresnet import SegResNet as MonaiSegResNet

from pgl_ext.networks.base import SegmentationNetwork, crop_to, level_strides, pad_to_multiple

__all__ = ["SegResNet"]


class SegResNet(SegmentationNetwork, MonaiSegResNet):
    """MONAI's ``SegResNet`` in 3D (Myronenko 2018), with its names of tensors, for inputs of any size.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, one per class.
        init_filters: channels of the finest level; they double with each of the others.
        blocks_down: residual blocks of each level of the encoder, finest first.
        blocks_up: the same of the decoder, coarse to fine; one level less.
        kwargs: further arguments of MONAI's ``SegResNet``, such as ``norm``, ``dropout_prob`` and ``upsample_mode``.

    Example:
        >>> network = SegResNet(1, 3, init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1))
        >>> network(torch.rand(1, 1, 33, 20, 17)).shape
        torch.Size([1, 3, 33, 20, 17])
    """

    family = "segresnet"
    encoder_parts = ("convInit", "down_layers")
    decoder_parts = ("up_layers", "up_samples", "conv_final")
    head_parts = ("conv_final.2",)

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 14,
        init_filters: int = 32,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: Sequence[int] = (1, 1, 1),
        **kwargs: Any,
    ) -> None:
        arguments = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "init_filters": init_filters,
            "blocks_down": list(blocks_down),
            "blocks_up": list(blocks_up),
            **kwargs,
        }
        if len(blocks_up) != len(blocks_down) - 1:
            raise ValueError(
                f"blocks_up has to give one number less than blocks_down, got {blocks_up} and {blocks_down}."
            )
        super().__init__(spatial_dims=3, **arguments)
        self.arguments = arguments
        levels = len(blocks_down)
        self.level_channels = tuple(init_filters * 2**level for level in range(levels))
        self.level_strides = level_strides([1] + [2] * (levels - 1))
        self.centres = ((0.0, 0.0, 0.0),) * levels
        self.multiple = list(self.level_strides[-1])

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, level_channels[i], ...), finest first, of (B, in_channels, X, Y, Z)."""
        return self.encode(pad_to_multiple(x, self.multiple))[1]

    def features_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps = self.features(x)
        logits = self.decode(maps[-1], maps[::-1])
        return maps, crop_to(logits, x.shape[2:])
