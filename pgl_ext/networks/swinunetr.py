"""MONAI's SwinUNETR: a transformer with shifted windows, and a convolutional decoder at full resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
from monai.utils import optional_import

from pgl_ext.networks.base import SegmentationNetwork, crop_to, level_strides, pad_to_multiple, require_tracing

__all__ = ["SwinUNETR"]


class SwinUNETR(SegmentationNetwork, MonaiSwinUNETR):
    """MONAI's ``SwinUNETR`` in 3D (Hatamizadeh et al. 2022), with its names of tensors, for inputs of any size.

    The encoder is the transformer, ``swinViT``. Instance norm needs more than a single cell of the deepest map: more
    than 32 voxels along some axis. TorchScript cannot compile it; a trace is of one size.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, one per class.
        feature_size: channels of the finest level, a multiple of 12; they double with each of the others.
        depths: transformer blocks of each of the four stages.
        num_heads: of the attention, of each stage.
        window_size: tokens per axis of the windows in which there is attention.
        kwargs: further arguments of MONAI's ``SwinUNETR``, such as ``use_v2`` and ``use_checkpoint``.

    Raises:
        ImportError: ``einops`` is not installed.

    Example:
        >>> network = SwinUNETR(1, 3, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)
        >>> network(torch.rand(1, 1, 33, 20, 17)).shape
        torch.Size([1, 3, 33, 20, 17])
    """

    family = "swinunetr"
    encoder_parts = ("swinViT",)
    decoder_parts = (
        *(f"encoder{number}" for number in (1, 2, 3, 4, 10)),
        *(f"decoder{number}" for number in (1, 2, 3, 4, 5)),
    )
    head_parts = ("out",)
    __prepare_scriptable__ = require_tracing

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 14,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        **kwargs: Any,
    ) -> None:
        if not optional_import("einops")[1]:
            raise ImportError("SwinUNETR needs the package 'einops': pip install einops")
        arguments = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "feature_size": feature_size,
            "depths": list(depths),
            "num_heads": list(num_heads),
            "window_size": window_size,
            **kwargs,
        }
        # MONAI looks at values of a tensor, which a network without memory has none of.
        device = torch.get_default_device()
        with torch.device("cpu"):
            super().__init__(spatial_dims=3, **arguments)
        self.to(device)
        self.arguments = arguments
        self.level_channels = tuple(feature_size * 2**level for level in range(5))
        self.level_strides = level_strides([2] * 5)
        self.centres = tuple(((stride - 1) / 2,) * 3 for stride, *_ in self.level_strides)
        self.multiple = list(self.level_strides[-1])

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, level_channels[i], ...), finest first, of (B, in_channels, X, Y, Z)."""
        return self.swinViT(pad_to_multiple(x, self.multiple), self.normalize)

    def features_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps = self.features(x)
        level = self.decoder5(self.encoder10(maps[4]), maps[3])
        level = self.decoder4(level, self.encoder4(maps[2]))
        level = self.decoder3(level, self.encoder3(maps[1]))
        level = self.decoder2(level, self.encoder2(maps[0]))
        level = self.decoder1(level, self.encoder1(pad_to_multiple(x, self.multiple)))
        return maps, crop_to(self.out(level), x.shape[2:])
