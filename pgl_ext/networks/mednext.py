"""MONAI's MedNeXt: a U-Net of ConvNeXt blocks, at full resolution and with a group norm for each channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.nets.mednext import MedNeXt as MonaiMedNeXt

from pgl_ext.networks.base import (
    SegmentationNetwork,
    crop_to,
    level_strides,
    pad_to_multiple,
    require_tracing,
    stack_levels,
)

__all__ = ["MedNeXt"]


class MedNeXt(SegmentationNetwork, MonaiMedNeXt):
    """MONAI's ``MedNeXt`` in 3D (Roy et al. 2023), with its names of tensors, for inputs of any size.

    TorchScript cannot compile it; a trace is good for any size.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, one per class.
        init_filters: channels of the finest level; they double with each of the others.
        blocks_down: blocks of each level of the encoder but the deepest, finest first.
        blocks_bottleneck: blocks of the deepest level.
        blocks_up: the same of the decoder, coarse to fine; as many levels as ``blocks_down``.
        kernel_size: of the convolutions, odd.
        use_residual_connection: around each block, as in all of the paper's networks.
        deep_supervision: in training, return the logits of all levels, resized to the input's grid: (B, levels,
            out_channels, X, Y, Z).
        kwargs: further arguments of MONAI's ``MedNeXt``, such as ``encoder_expansion_ratio``.

    Example:
        >>> network = MedNeXt(1, 3, init_filters=4, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 1))
        >>> network(torch.rand(1, 1, 33, 20, 17)).shape
        torch.Size([1, 3, 33, 20, 17])
    """

    family = "mednext"
    encoder_parts = ("stem", "enc_stages", "down_blocks", "bottleneck")
    decoder_parts = ("up_blocks", "dec_stages")
    __prepare_scriptable__ = require_tracing

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 14,
        init_filters: int = 32,
        blocks_down: Sequence[int] = (2, 2, 2, 2),
        blocks_bottleneck: int = 2,
        blocks_up: Sequence[int] = (2, 2, 2, 2),
        kernel_size: int = 3,
        use_residual_connection: bool = True,
        deep_supervision: bool = False,
        **kwargs: Any,
    ) -> None:
        if len(blocks_up) != len(blocks_down):
            raise ValueError(
                f"blocks_up has to give as many numbers as blocks_down, got {blocks_up} and {blocks_down}."
            )
        arguments = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "init_filters": init_filters,
            "blocks_down": list(blocks_down),
            "blocks_bottleneck": blocks_bottleneck,
            "blocks_up": list(blocks_up),
            "kernel_size": kernel_size,
            "use_residual_connection": use_residual_connection,
            "deep_supervision": deep_supervision,
            **kwargs,
        }
        super().__init__(spatial_dims=3, **arguments)
        self.arguments = arguments
        self.head_parts = ("out_0", *["out_blocks"] * deep_supervision)
        levels = len(blocks_down) + 1
        self.level_channels = tuple(init_filters * 2**level for level in range(levels))
        self.level_strides = level_strides([1] + [2] * (levels - 1))
        self.centres = ((0.0, 0.0, 0.0),) * levels
        self.multiple = list(self.level_strides[-1])

    @staticmethod
    def with_deep_supervision(arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {**arguments, "deep_supervision": True}

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, level_channels[i], ...), finest first, of (B, in_channels, X, Y, Z)."""
        x = self.stem(pad_to_multiple(x, self.multiple))
        maps = []
        for stage, down in zip(self.enc_stages, self.down_blocks, strict=True):
            maps.append(stage(x))
            x = down(maps[-1])
        return [*maps, self.bottleneck(x)]

    def features_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps = self.features(x)
        levels = [maps[-1]]
        for up, stage, skip in zip(self.up_blocks, self.dec_stages, maps[-2::-1], strict=True):
            levels.append(stage(up(levels[-1]) + skip))
        logits = self.out_0(levels[-1])
        if self.training and self.do_ds:
            coarse = [head(level) for head, level in zip(self.out_blocks, levels[:-1], strict=True)]
            logits = stack_levels([logits, *coarse[::-1]])
        return maps, crop_to(logits, x.shape[2:])
