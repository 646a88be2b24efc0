"""MONAI's DynUNet: the plain U-Net of nnU-Net, at full resolution and with instance norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.nets.dynunet import DynUNet as MonaiDynUNet
from torch import nn

from pgl_ext.networks.base import SegmentationNetwork, crop_to, level_strides, pad_to_multiple, stack_levels

__all__ = ["DynUNet"]


class DynUNet(SegmentationNetwork, MonaiDynUNet):
    """MONAI's ``DynUNet`` in 3D, with its names of tensors, for inputs of any size.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, one per class.
        filters: channels of each level, finest first.
        strides: of each level's first convolution, per axis; the first is 1, the output has the grid of the input.
        kernel_size: of each level's convolutions, odd; default: 3.
        deep_supervision: in training, return the logits of ``deep_supr_num`` coarser levels too, resized to the
            input's grid: (B, 1 + deep_supr_num, out_channels, X, Y, Z).
        deep_supr_num: see there.
        kwargs: further arguments of MONAI's ``DynUNet``, such as ``norm_name``, ``res_block`` and ``dropout``.

    Example:
        >>> network = DynUNet(1, 3, filters=(8, 16, 32), strides=(1, 2, 2))
        >>> network(torch.rand(1, 1, 33, 20, 17)).shape
        torch.Size([1, 3, 33, 20, 17])
    """

    family = "dynunet"
    encoder_parts = ("input_block", "downsamples", "bottleneck")
    decoder_parts = ("upsamples",)
    head_parts = ("output_block", "deep_supervision_heads")

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 14,
        filters: Sequence[int] = (32, 64, 128, 256, 320, 320),
        strides: Sequence[Sequence[int] | int] = (1, 2, 2, 2, 2, 2),
        kernel_size: Sequence[Sequence[int] | int] | int = 3,
        deep_supervision: bool = False,
        deep_supr_num: int = 1,
        **kwargs: Any,
    ) -> None:
        if level_strides(strides[:1])[0] != (1, 1, 1) or len(strides) != len(filters):
            raise ValueError(
                f"strides has to give as many as there are filters, {len(filters)}, and begin with 1, since the output "
                f"has the input's grid; got {strides}."
            )
        kernels = [kernel_size] * len(filters) if isinstance(kernel_size, int) else list(kernel_size)
        arguments = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "filters": list(filters),
            "strides": [stride if isinstance(stride, int) else tuple(stride) for stride in strides],
            "kernel_size": kernels,
            "deep_supervision": deep_supervision,
            "deep_supr_num": deep_supr_num,
            **kwargs,
        }
        # Its own deep supervision does not script: the heads are called here.
        super().__init__(spatial_dims=3, upsample_kernel_size=strides[1:], **{**arguments, "deep_supervision": False})
        self.arguments = arguments
        self.deep_supervision = deep_supervision
        self.deep_supervision_heads = nn.ModuleList()
        if deep_supervision:
            self.check_deep_supr_num()
            self.deep_supervision_heads = self.get_deep_supervision_heads()
            self.deep_supervision_heads.apply(self.initialize_weights)
        self.level_channels = tuple(filters)
        self.level_strides = level_strides(strides)
        self.centres = ((0.0, 0.0, 0.0),) * len(filters)
        self.multiple = list(self.level_strides[-1])

    @staticmethod
    def with_deep_supervision(arguments: Mapping[str, Any]) -> dict[str, Any]:
        heads = max(1, min(3, len(arguments["filters"]) - 3))
        return {**arguments, "deep_supervision": True, "deep_supr_num": heads}

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, filters[i], ...), finest first, of (B, in_channels, X, Y, Z)."""
        maps = [self.input_block(pad_to_multiple(x, self.multiple))]
        for down in self.downsamples:
            maps.append(down(maps[-1]))
        maps.append(self.bottleneck(maps[-1]))
        return maps

    def features_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps = self.features(x)
        levels = [maps[-1]]
        for index, up in enumerate(self.upsamples):
            levels.append(up(levels[-1], maps[len(maps) - 2 - index]))
        logits = self.output_block(levels[-1])
        if self.training and self.deep_supervision:
            heads = [logits]
            for index, head in enumerate(self.deep_supervision_heads):
                heads.append(head(levels[len(levels) - 2 - index]))
            logits = stack_levels(heads)
        return maps, crop_to(logits, x.shape[2:])
