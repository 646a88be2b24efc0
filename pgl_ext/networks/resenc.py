"""nnU-Net's residual-encoder U-Net, at full resolution and with instance norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pgl_ext.networks.base import SegmentationNetwork, crop_to, level_strides, pad_to_multiple, stack_levels

__all__ = ["ResidualEncoderUNet"]


class ResidualEncoderUNet(SegmentationNetwork):
    """nnU-Net's ``ResidualEncoderUNet`` in 3D (Isensee et al. 2024), with its names of tensors, for inputs of any size.

    It consists of the parts of the class in ``dynamic-network-architectures``, with nnU-Net's convolutions, instance
    norm and leaky ReLU. Heads of coarser levels that nothing would use are left out.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, one per class.
        features_per_stage: channels of each level, finest first.
        strides: of each level's first convolution, per axis; the first is 1, the output has the grid of the input.
        n_blocks_per_stage: residual blocks of each level of the encoder.
        n_conv_per_stage_decoder: convolutions of each level of the decoder.
        kernel_sizes: of each level's convolutions, odd; or of all.
        deep_supervision: in training, return the logits of all levels of the decoder, resized to the input's grid: (B,
            levels, out_channels, X, Y, Z).

    Raises:
        ImportError: ``dynamic-network-architectures`` is not installed.

    Example:
        >>> network = ResidualEncoderUNet(1, 3, (8, 16, 32), (1, 2, 2), n_blocks_per_stage=(1, 1, 1))
        >>> network(torch.rand(1, 1, 33, 20, 17)).shape
        torch.Size([1, 3, 33, 20, 17])
    """

    family = "resenc"
    encoder_parts = ("encoder",)
    decoder_parts = ("decoder.stages", "decoder.transpconvs")
    head_parts = ("decoder.seg_layers",)

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 14,
        features_per_stage: Sequence[int] = (32, 64, 128, 256, 320, 320),
        strides: Sequence[Sequence[int] | int] = (1, 2, 2, 2, 2, 2),
        n_blocks_per_stage: Sequence[int] = (1, 3, 4, 6, 6, 6),
        n_conv_per_stage_decoder: Sequence[int] | int = 1,
        kernel_sizes: Sequence[Sequence[int] | int] | int = 3,
        deep_supervision: bool = False,
    ) -> None:
        levels = len(features_per_stage)
        if level_strides(strides[:1])[0] != (1, 1, 1) or not levels == len(strides) == len(n_blocks_per_stage):
            raise ValueError(
                f"strides and n_blocks_per_stage have to give as many as there are features_per_stage, {levels}, and "
                f"strides begin with 1, since the output has the input's grid; got {strides}, {n_blocks_per_stage}."
            )
        super().__init__()
        self.arguments = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "features_per_stage": list(features_per_stage),
            "strides": [stride if isinstance(stride, int) else tuple(stride) for stride in strides],
            "n_blocks_per_stage": list(n_blocks_per_stage),
            "n_conv_per_stage_decoder": n_conv_per_stage_decoder,
            "kernel_sizes": kernel_sizes,
            "deep_supervision": deep_supervision,
        }
        parts = _library_network(self.arguments)
        self.deep_supervision = deep_supervision
        # Without the library's forward, and with heads by name, TorchScript compiles it and no head is unused.
        self.encoder = nn.ModuleDict(dict(parts.encoder.named_children()))
        decoder = {**dict(parts.decoder.named_children()), "encoder": self.encoder}
        heads = {str(number): head for number, head in enumerate(parts.decoder.seg_layers)}
        used = heads if deep_supervision else {str(levels - 2): heads[str(levels - 2)]}
        self.decoder = nn.ModuleDict({**decoder, "seg_layers": nn.ModuleDict(used)})
        self.level_channels = tuple(features_per_stage)
        self.level_strides = level_strides(strides)
        # Shortcuts pool and convolutions do not; as measured in tests/networks/test_centres.py.
        self.centres = tuple(tuple(min(0.15 * (s - 1), 0.45) for s in stride) for stride in self.level_strides)
        self.multiple = list(self.level_strides[-1])

    @staticmethod
    def with_deep_supervision(arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {**arguments, "deep_supervision": True}

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, features_per_stage[i], ...), finest first, of (B, in_channels, X, Y, Z)."""
        x = self.encoder["stem"](pad_to_multiple(x, self.multiple))
        maps: list[torch.Tensor] = []
        for stage in self.encoder["stages"]:
            x = stage(x)
            maps.append(x)
        return maps

    def features_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps = self.features(x)
        levels = [maps[-1]]
        # TorchScript's zip knows no "strict".
        for index, (up, stage) in enumerate(zip(self.decoder["transpconvs"], self.decoder["stages"])):  # noqa: B905
            levels.append(stage(torch.cat([up(levels[-1]), maps[len(maps) - 2 - index]], dim=1)))
        heads = len(self.decoder["seg_layers"])
        logits: list[torch.Tensor] = []
        for index, head in enumerate(self.decoder["seg_layers"].values()):
            if self.training or index == heads - 1:
                logits.insert(0, head(levels[len(levels) - heads + index]))
        stacked = stack_levels(logits) if self.training and self.deep_supervision else logits[0]
        return maps, crop_to(stacked, x.shape[2:])


def _library_network(arguments: Mapping[str, Any]) -> nn.Module:
    """The library's network of some arguments, which TorchScript may compile the blocks of."""
    try:
        from dynamic_network_architectures.architectures import unet
        from dynamic_network_architectures.initialization.weight_init import InitWeights_He
    except ImportError as error:
        raise ImportError(
            "ResidualEncoderUNet needs the package 'dynamic-network-architectures': pip install "
            '"dynamic-network-architectures<0.4", or nnunetv2, which brings it'
        ) from error
    sizes = {name: arguments[name] for name in arguments if name not in ("in_channels", "out_channels", "strides")}
    network = unet.ResidualEncoderUNet(
        input_channels=arguments["in_channels"],
        num_classes=arguments["out_channels"],
        n_stages=len(arguments["features_per_stage"]),
        strides=[list(stride) if isinstance(stride, tuple) else stride for stride in arguments["strides"]],
        conv_op=nn.Conv3d,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **sizes,
    )
    # Not nnU-Net's zeros in the residual branches: the shortcuts alone, which pool, would have other centres.
    network.apply(InitWeights_He(1e-2))
    for block in [module for module in network.modules() if isinstance(module, unet.BasicBlockD)]:
        for name in ("skip", "drop_path", "squeeze_excitation"):
            if not isinstance(getattr(block, name, None), nn.Module):
                setattr(block, name, nn.Identity())
    return network
