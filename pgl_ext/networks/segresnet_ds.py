"""MONAI's SegResNetDS: SegResNet with deep supervision and a finer-grained encoder, which CT-FM's weights are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.nets.segresnet_ds import SegResNetDS as MonaiSegResNetDS

from pgl_ext.networks.base import SegmentationNetwork, crop_to, level_strides, pad_to_multiple, stack_levels

__all__ = ["SegResNetDS"]


class SegResNetDS(SegmentationNetwork, MonaiSegResNetDS):
    """MONAI's ``SegResNetDS`` in 3D, with its names of tensors, for inputs of any size.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, one per class.
        init_filters: channels of the finest level; they double with each of the others.
        blocks_down: residual blocks of each level of the encoder, finest first.
        dsdepth: levels whose logits are returned in training, resized to the input's grid: (B, dsdepth, out_channels,
            X, Y, Z); 1: those of the finest alone, as in evaluation.
        kwargs: further arguments of MONAI's ``SegResNetDS``, such as ``norm``, ``blocks_up`` and ``resolution``.

    Example:
        >>> network = SegResNetDS(1, 3, init_filters=8, blocks_down=(1, 1, 1))
        >>> network(torch.rand(1, 1, 33, 20, 17)).shape
        torch.Size([1, 3, 33, 20, 17])
    """

    family = "segresnet_ds"
    encoder_parts = ("encoder",)
    decoder_parts = ("up_layers",)

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 14,
        init_filters: int = 32,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        dsdepth: int = 1,
        **kwargs: Any,
    ) -> None:
        levels = len(blocks_down)
        if not 1 <= dsdepth < levels:
            raise ValueError(f"dsdepth has to be from 1 to {levels - 1}, the levels of the decoder, got {dsdepth}.")
        arguments = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "init_filters": init_filters,
            "blocks_down": list(blocks_down),
            "dsdepth": dsdepth,
            **kwargs,
        }
        super().__init__(spatial_dims=3, **arguments)
        self.arguments = arguments
        self.head_parts = tuple(f"up_layers.{level}.head" for level in range(levels - 1))
        self.level_channels = tuple(init_filters * 2**level for level in range(levels))
        scales = self.anisotropic_scales or [(2, 2, 2)] * levels
        self.level_strides = level_strides([1, *(tuple(map(int, scale)) for scale in scales[: levels - 1])])
        self.centres = ((0.0, 0.0, 0.0),) * levels
        self.multiple = list(self.level_strides[-1])

    @staticmethod
    def with_deep_supervision(arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {**arguments, "dsdepth": max(1, min(4, len(arguments["blocks_down"]) - 2))}

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, level_channels[i], ...), finest first, of (B, in_channels, X, Y, Z)."""
        return self.encoder(pad_to_multiple(x, self.multiple))

    def features_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps = self.features(x)
        level = maps[-1]
        logits: list[torch.Tensor] = []
        for index, up in enumerate(self.up_layers):
            level = up["blocks"](up["upsample"](level) + maps[len(maps) - 2 - index])
            remaining = len(maps) - 1 - index
            if remaining == 1 or (self.training and remaining <= self.dsdepth):
                logits.insert(0, up["head"](level))
        stacked = stack_levels(logits) if len(logits) > 1 else logits[0]
        return maps, crop_to(stacked, x.shape[2:])
