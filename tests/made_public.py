"""Stand-ins for published weights: tensors of the stock classes, with the names and wrappers of the published files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from made_weights import as_trained
from monai.networks.nets import ResNet, SegResNetDS, SwinUNETR, resnet50
from torch import nn

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
KERNELS = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
OF_NNUNET = {
    "conv_op": nn.Conv3d,
    "conv_bias": True,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}


class Published(NamedTuple):
    """A stock network, and the content of a file of its weights.

    Args:
        family: of the network here.
        features: of the stock network for a volume (B, C, X, Y, Z), finest first, as the network here has them.
        content: of the file.
        unexpected: names of what it holds besides the encoder, at least these.
    """

    family: str
    features: Callable[[torch.Tensor], list[torch.Tensor]]
    content: dict[str, Any]
    unexpected: tuple[str, ...] = ()


def ct_fm(wrapped: bool = False) -> Published:
    """CT-FM's encoder: that of SegResNetDS; within a Lightning checkpoint of SimCLR, or a whole network."""
    stock = as_trained(SegResNetDS(3, 8, 1, 2, blocks_down=(1, 1, 2), dsdepth=2)).eval()
    if wrapped:
        state = {f"model.backbone.{key}": value for key, value in stock.encoder.state_dict().items()}
        content = {"state_dict": {**state, "model.projection_head.layers.0.weight": torch.ones(2, 2)}, "epoch": 3}
        return Published("segresnet_ds", stock.encoder, content)
    return Published("segresnet_ds", stock.encoder, stock.state_dict(), ("up_layers.0.blocks.0.conv1.weight",))


def res_enc(of_nnssl: bool = True) -> Published:
    """nnssl's and nnU-Net's ResEnc U-Net, which sees arrays z, y, x."""
    stock = ResidualEncoderUNet(1, 3, [4, 6, 8], kernel_sizes=KERNELS, strides=STRIDES, n_blocks_per_stage=[1, 1, 2],
                                num_classes=1, n_conv_per_stage_decoder=[1, 1], **OF_NNUNET)  # fmt: skip
    return Published(
        "resenc", _of_arrays(as_trained(stock).eval()), _checkpoint(stock, of_nnssl), ("decoder.seg_layers.0.bias",)
    )


def plain_unet(kernels: list[list[int]] = KERNELS) -> Published:
    """nnU-Net's plain U-Net."""
    stock = PlainConvUNet(1, 3, [4, 6, 8], kernel_sizes=kernels, strides=STRIDES, n_conv_per_stage=[2, 2, 2],
                          num_classes=2, n_conv_per_stage_decoder=[2, 2], **OF_NNUNET)  # fmt: skip
    return Published(
        "dynunet", _of_arrays(as_trained(stock).eval()), _checkpoint(stock, False), ("output_block.conv.conv.bias",)
    )


def medical_net(biases: bool = False) -> Published:
    """MedicalNet's, with its decoder; or MONAI's, with biases in the shortcuts and a classifier."""
    stock = as_trained(ResNet("basic", [1, 2, 1, 1], [8, 16, 32, 64], n_input_channels=1, conv1_t_stride=(2, 2, 1),
                              num_classes=2, bias_downsample=biases)).eval()  # fmt: skip

    def features(x: torch.Tensor) -> list[torch.Tensor]:
        maps = [stock.act(stock.bn1(stock.conv1(x)))]
        for stage in (nn.Sequential(stock.maxpool, stock.layer1), stock.layer2, stock.layer3):
            maps.append(stage(maps[-1]))
        return maps  # the last stage is dilated here

    state = stock.state_dict()
    if biases:
        return Published("resnet", features, state, ("fc.bias",))
    state = {f"module.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    return Published(
        "resnet", features, {"state_dict": {**state, "module.conv_seg.0.bias": torch.ones(2)}}, ("conv_seg.0.bias",)
    )


def swin_ssl() -> Published:
    """Self-supervised weights of SwinUNETR's transformer, as MONAI's ``load_from`` takes them."""
    stock = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)
    for parameter in stock.parameters():
        parameter.data.normal_(std=0.2)
    state = {key.replace("mlp.linear", "mlp.fc"): value for key, value in stock.swinViT.state_dict().items()}
    state |= {"mask_token": torch.ones(12), "norm.weight": torch.ones(96), "rotation_head.bias": torch.ones(4)}
    content = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    return Published("swinunetr", stock.swinViT.eval(), content, ("mask_token", "norm.weight", "rotation_head.bias"))


PUBLISHED: dict[str, Callable[[], Published]] = {
    "CT-FM, whole": ct_fm,
    "CT-FM, Lightning": lambda: ct_fm(wrapped=True),
    "nnssl": res_enc,
    "nnU-Net, ResEnc": lambda: res_enc(of_nnssl=False),
    "nnU-Net, plain": plain_unet,
    "MedicalNet": medical_net,
    "MONAI's ResNet": lambda: medical_net(biases=True),
    "SwinUNETR": swin_ssl,
}


FULL_SIZE: dict[str, Callable[[], dict[str, Any]]] = {
    "CT-FM": lambda: SegResNetDS(3, 32, 1, 2, blocks_down=(1, 2, 2, 4, 4)).encoder.state_dict(),
    "ResEnc-L": lambda: {"network_weights": _res_enc_l().state_dict()},
    "resnet_50": lambda: resnet50(n_input_channels=1, feed_forward=False, bias_downsample=False).state_dict(),
}


def _res_enc_l() -> nn.Module:
    return ResidualEncoderUNet(1, 6, [32, 64, 128, 256, 320, 320], kernel_sizes=[[3] * 3] * 6,
                               strides=[[1] * 3, *[[2] * 3] * 5], n_blocks_per_stage=[1, 3, 4, 6, 6, 6], num_classes=1,
                               n_conv_per_stage_decoder=[1] * 5, **OF_NNUNET)  # fmt: skip


def _of_arrays(stock: nn.Module) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """The encoder's features of x, y, z from a network of z, y, x."""
    return lambda x: [level.permute(0, 1, 4, 3, 2) for level in stock.encoder(x.permute(0, 1, 4, 3, 2))]


def _checkpoint(stock: nn.Module, of_nnssl: bool) -> dict[str, Any]:
    """What nnssl, or nnU-Net, writes: its plans, and numbers of NumPy in the log."""
    configuration = {
        "spacing": [3.0, 1.0, 1.5],
        "patch_size": [8, 32, 16],
        "normalization_schemes": ["ZScoreNormalization"] if of_nnssl else ["CTNormalization"],
    }
    plans = {"transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2]}
    content = {"network_weights": stock.state_dict(), "logging": {"train_losses": [np.float64(0.5)]}}
    if of_nnssl:
        adaptation = {
            "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None},
            "pretrain_plan": {**plans, "configurations": {"onemmiso": configuration}},
            "pretrain_num_input_channels": 1,
            "key_to_encoder": "encoder.stages",
            "key_to_stem": "encoder.stem",
            "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
        }
        return {**content, "trainer_name": "BaseMAETrainer", "nnssl_adaptation_plan": adaptation}
    plans |= {
        "configurations": {"3d_fullres": configuration, "3d_big": {"inherits_from": "3d_fullres"}},
        "foreground_intensity_properties_per_channel": {"0": {"percentile_00_5": -900, "percentile_99_5": 1200.5}},
    }
    init = {"plans": plans, "configuration": "3d_big", "fold": 0, "device": torch.device("cpu")}
    return {**content, "trainer_name": "nnUNetTrainer", "init_args": init}
