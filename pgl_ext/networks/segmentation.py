"""The segmentation network: encoder, atrous spatial pyramid pooling, and a light decoder with three skips."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pgl_ext.networks.base import FeatureNetwork, SegmentationNetwork, crop_to
from pgl_ext.networks.resnet import ResNetEncoder, initialise_convolutions

__all__ = ["ASPP", "Decoder", "PlainDecoder", "SegmentationNet"]


class SegmentationNet(SegmentationNetwork):
    """Encoder, ASPP and a light decoder with three skips (PGL paper, section 3.4), for inputs of any size.

    With the default encoder and 14 classes it has 48,536,270 parameters, 2,381,198 of them in ASPP and decoder, as in
    the paper, which does not give the layout. Convolutions are initialised Kaiming-uniformly.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, one per class.
        encoder: an encoder module, used as it is; or arguments of :class:`ResNetEncoder` to build one with; None: the
            ResNet-50 of the paper.
        dropout: probability of dropping a channel before the decoder, and again before the last convolution.
        aspp_channels: channels of the pyramid pooling.
        decoder_channels: channels of the decoder's three levels, coarse to fine.

    Raises:
        ValueError: the encoder takes another number of channels than ``in_channels``, or its levels do not follow each
            other by factors of two.

    Example:
        >>> network = SegmentationNet(1, 3, encoder={"layers": (1, 1, 1, 1), "block": "basic", "widen_factor": 0.25})
        >>> network(torch.rand(1, 1, 33, 50, 21)).shape
        torch.Size([1, 3, 33, 50, 21])
    """

    family = "resnet"
    encoder_parts = ("encoder",)
    decoder_parts = ("aspp", "decoder")
    head_parts = ("decoder.head",)

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 14,
        encoder: ResNetEncoder | Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        aspp_channels: int = 256,
        decoder_channels: Sequence[int] = (256, 128, 32),
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            encoder = ResNetEncoder(**{"in_channels": in_channels, **(encoder or {})})
        _check_encoder(encoder, in_channels)
        self.encoder = encoder
        self.level_channels, self.level_strides = encoder.level_channels, encoder.level_strides
        self.centres = encoder.centres
        stem, stage1, stage2, _, deepest = encoder.level_channels
        self.aspp = ASPP(deepest, aspp_channels)
        self.dropout = nn.Dropout3d(dropout)
        self.decoder = Decoder(aspp_channels, (stage2, stage1, stem), decoder_channels, out_channels, dropout)
        self.arguments = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "encoder": getattr(encoder, "arguments", None),
            "dropout": dropout,
            "aspp_channels": aspp_channels,
            "decoder_channels": list(decoder_channels),
        }
        self.stem_stride = [float(s) for s in encoder.level_strides[0]]
        initialise_convolutions(self.aspp)
        initialise_convolutions(self.decoder)

    @property
    def feature_network(self) -> FeatureNetwork:
        return self.encoder

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.encoder.features(x)

    def features_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        features = self.features(x)
        return features, self.decode(features, x.shape[2:])

    def decode(self, features: list[torch.Tensor], size: list[int]) -> torch.Tensor:
        """Logits (B, out_channels, *size) of the encoder's feature maps, finest first, for its input's size."""
        deepest = self.dropout(self.aspp(features[4]))
        logits = self.decoder(deepest, [features[2], features[1], features[0]])
        # To the size itself would stretch the map where the stride does not divide it.
        return crop_to(F.interpolate(logits, scale_factor=self.stem_stride, mode="trilinear"), size)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling of (B, in_channels, X, Y, Z) to (B, channels, X, Y, Z).

    A 1x1x1 convolution reduces the channels. The branches are a 1x1x1 convolution, separable 3x3x3 convolutions of
    several dilations (in cells), and the global mean; a last 1x1x1 convolution joins them.
    """

    def __init__(self, in_channels: int, channels: int = 256, dilations: Sequence[int] = (2, 4, 8)) -> None:
        super().__init__()
        self.reduce = _conv(in_channels, channels)
        self.branches = nn.ModuleList(
            [_conv(channels, channels), *(_separable_conv(channels, dilation) for dilation in dilations)]
        )
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.pooled = _conv(channels, channels)
        self.join = _conv((len(dilations) + 2) * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.reduce(x)
        outputs = [branch(x) for branch in self.branches]
        # Expanded before its batch norm, which refuses a single value per channel: a batch of one.
        outputs.append(self.pooled(self.pool(x).expand_as(x)))
        return self.join(torch.cat(outputs, dim=1))


class Decoder(nn.Module):
    """Three times: double the resolution, add the projected skip, refine; then one convolution to the classes.

    Args:
        in_channels: channels of the map to start from.
        skip_channels: channels of the encoder's maps that are added, coarse to fine.
        channels: channels of each level, coarse to fine.
        out_channels: number of classes.
        dropout: probability of dropping a channel before the last convolution.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: Sequence[int],
        channels: Sequence[int],
        out_channels: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        levels = zip(itertools.pairwise([in_channels, *channels]), skip_channels, strict=True)
        self.levels = nn.ModuleList(_DecoderLevel(*widths, skip) for widths, skip in levels)
        self.dropout = nn.Dropout3d(dropout)
        self.head = nn.Conv3d(channels[-1], out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor, skips: list[torch.Tensor]) -> torch.Tensor:
        """Logits (B, out_channels, ...) of the size of the last of the skips, which come coarse to fine."""
        for index, level in enumerate(self.levels):
            x = level(x, skips[index].shape[2:], skips[index])
        return self.head(self.dropout(x))


class PlainDecoder(nn.Module):
    """:class:`Decoder` without skips and last convolution, with the same names of tensors; returns every level's map.

    Args:
        in_channels: channels of the map to start from.
        channels: channels of each level, coarse to fine.
    """

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_DecoderLevel(*widths) for widths in itertools.pairwise([in_channels, *channels]))

    def forward(self, x: torch.Tensor, sizes: list[list[int]]) -> list[torch.Tensor]:
        """The levels' maps (B, channels, *size), coarse to fine, of (B, in_channels, X, Y, Z).

        Sizes are those of the encoder's levels, each up to twice the one before.
        """
        maps = []
        for index, level in enumerate(self.levels):
            x = level(x, sizes[index])
            maps.append(x)
        return maps


class _DecoderLevel(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, skip_channels: int | None = None) -> None:
        super().__init__()
        self.up = _normalised(nn.ConvTranspose3d(in_channels, out_channels, kernel_size=2, stride=2, bias=False))
        self.project = None
        if skip_channels is not None:
            convolution = nn.Conv3d(skip_channels, out_channels, kernel_size=1, bias=False)
            self.project = nn.Sequential(convolution, nn.BatchNorm3d(out_channels))
        self.refine = nn.Sequential(_separable_conv(out_channels), _separable_conv(out_channels))

    def forward(self, x: torch.Tensor, size: list[int], skip: torch.Tensor | None = None) -> torch.Tensor:
        x = crop_to(self.up(x), size)
        if self.project is not None and skip is not None:
            x = x + self.project(skip)
        return x + self.refine(x)


def _conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return _normalised(nn.Conv3d(in_channels, out_channels, kernel_size=1, bias=False))


def _separable_conv(channels: int, dilation: int = 1) -> nn.Sequential:
    """Per channel in space, then across channels in each voxel."""
    depthwise = nn.Conv3d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False)
    return nn.Sequential(depthwise, *_conv(channels, channels))


def _normalised(convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm3d(convolution.out_channels), nn.ReLU(inplace=True))


def _check_encoder(encoder: nn.Module, in_channels: int) -> None:
    if encoder.conv1.in_channels != in_channels:
        raise ValueError(
            f"the encoder takes {encoder.conv1.in_channels} channels, but in_channels is {in_channels}: give both the "
            "same number."
        )
    stem, stage1, stage2, _, deepest = encoder.level_strides
    levels = (deepest, stage2, stage1, stem)
    if any(coarse != tuple(2 * n for n in fine) for coarse, fine in itertools.pairwise(levels)):
        raise ValueError(
            f"the decoder doubles the resolution between the encoder's levels, but their strides are {levels}: build "
            "the encoder with last_stage_stride=1."
        )
