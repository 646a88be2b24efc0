"""Weights that others have published: recognised by their names of tensors, and renamed to those of the networks here.

==========================  ==============  =====================================================================
layout                      family          files
==========================  ==============  =====================================================================
MONAI's SegResNetDS         segresnet_ds    CT-FM: the encoder alone, the whole network, or a Lightning checkpoint
nnU-Net's ResEnc U-Net      resenc          checkpoints of nnU-Net and of nnssl (OpenMind)
nnU-Net's plain U-Net       dynunet         checkpoints of nnU-Net
MONAI's ResNet              resnet          MONAI's and MedicalNet's
MONAI's SwinTransformer     swinunetr       self-supervised weights of SwinUNETR, whole networks
==========================  ==============  =====================================================================

Checkpoints of nnU-Net and nnssl are of volumes with the axes z, y, x: their kernels are turned to x, y, z.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from pgl_ext.weights.records import InputRecord

__all__ = ["LAYOUTS", "Layout", "PublicWeights", "plain_unet_names", "read_public", "turned"]

_State = dict[str, torch.Tensor]
# Where files have their tensors, and what wrappers of networks put before their names.
_WITHIN = ("state_dict", "network_weights", "model")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


@dataclass(frozen=True)
class Layout:
    """Names of tensors that published files have.

    Args:
        name: for messages.
        family: of the network that the weights are for.
        anchor: the end of a name that every such file has, and no file of another layout.
        encoder: what precedes the encoder's names in the network here.
        arguments: of the network, from its tensors.
        renamed: patterns in names, and what replaces them.
        parts: pattern of the encoder's names, where a file of the encoder alone has others too, of pre-training.
    """

    name: str
    family: str
    anchor: str
    encoder: str
    arguments: Callable[[_State], dict[str, Any]]
    renamed: Mapping[str, str] = field(default_factory=dict)
    parts: str = ""

    def state(self, state: _State) -> _State | None:
        """The tensors as the network here names them; None where they are of another layout.

        Of several encoders, such as an online and a target one, it is that with the shortest name.
        """
        ends = [key.removesuffix(self.anchor) for key in state if f".{key}".endswith(f".{self.anchor}")]
        if not ends:
            return None
        before = min(ends, key=len)
        whole = before.endswith(self.encoder)
        base = before.removesuffix(self.encoder) if whole else before
        named = {}
        for key, value in state.items():
            if key.startswith(base):
                inner = key.removeprefix(base)
                for pattern, new in self.renamed.items():
                    inner = re.sub(pattern, new, inner)
                is_named = whole or not re.search(self.parts, inner)
                named[inner if is_named else self.encoder + inner] = value
        return named


@dataclass(frozen=True)
class PublicWeights:
    """What a file of weights holds.

    Args:
        state: the tensors, as the networks here name them where the layout is known.
        layout: None where it is none of :data:`LAYOUTS`.
        input: how the file says that its volumes were prepared; None where it says nothing.
    """

    state: _State
    layout: Layout | None = None
    input: InputRecord | None = None

    @property
    def architecture(self) -> dict[str, Any] | None:
        """Family and arguments of the network, as its tensors tell; None where the layout is not known."""
        if self.layout is None:
            return None
        return {"family": self.layout.family, "arguments": self.layout.arguments(self.state)}


def read_public(content: Mapping[str, Any]) -> PublicWeights:
    """Recognise the content of a file; of an unknown layout, and of our own, names stay as they are."""
    within = next((content[name] for name in _WITHIN if isinstance(content.get(name), Mapping)), content)
    state = {_WRAPPERS.sub("", key): value for key, value in within.items() if isinstance(value, torch.Tensor)}
    plans, configuration = _plans(content)
    for layout in LAYOUTS:
        named = layout.state(state)
        if named is None:
            continue
        if "network_weights" in content:
            axes = _axes(plans)
            named = {key: turned(value, axes) for key, value in named.items()}
        if layout.family == "dynunet":
            named = _plain_unet(named)
        return PublicWeights(named, layout, _input(plans, configuration) if plans else None)
    return PublicWeights(state)


def turned(tensor: torch.Tensor, axes: Sequence[int] = (2, 1, 0)) -> torch.Tensor:
    """The weights (out, in, x, y, z) of a convolution for volumes with their axes in another order; others as are."""
    return tensor.permute(0, 1, *(2 + axis for axis in axes)).contiguous() if tensor.ndim == 5 else tensor


# --- what checkpoints of nnU-Net and nnssl say ----------------------------------------------------------------------


def _plans(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The plans in a checkpoint, and their configuration that was trained; empty where there are none."""
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        if "nnssl_adaptation_plan" in content:
            adaptation = content["nnssl_adaptation_plan"]
            plans = {**adaptation["pretrain_plan"], "channels": adaptation["pretrain_num_input_channels"]}
            (configuration,) = plans["configurations"].values()
        else:
            plans = content["init_args"]["plans"]
            configuration = plans["configurations"][content["init_args"]["configuration"]]
            while parent := configuration.get("inherits_from"):
                rest = {name: value for name, value in configuration.items() if name != "inherits_from"}
                configuration = {**plans["configurations"][parent], **rest}
        _axes(plans)  # raises where they are none
        return plans, configuration
    return {}, {}


def _axes(plans: Mapping[str, Any]) -> list[int]:
    """Which axis of the network is x, y and z: plans transpose arrays z, y, x."""
    return [list(plans.get("transpose_forward", (0, 1, 2))).index(2 - axis) for axis in range(3)]


def _input(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> InputRecord | None:
    """How plans have volumes prepared, which keep the axes of files."""
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        axes, schemes = _axes(plans), configuration["normalization_schemes"]
        spacing, patch = ([configuration[name][axis] for axis in axes] for name in ("spacing", "patch_size"))
        window = None
        if schemes[0] == "CTNormalization":
            values = plans["foreground_intensity_properties_per_channel"]["0"]
            window = [float(values[f"percentile_{name}"]) for name in ("00_5", "99_5")]
        return InputRecord(
            hu_window=window,
            spacing=[float(value) for value in spacing],
            patch_size=[int(value) for value in patch],
            channels=int(plans.get("channels", len(schemes))),
            orientation="as stored",
        )
    return None


# --- names and arguments --------------------------------------------------------------------------------------------


def plain_unet_names(levels: int) -> dict[str, str]:
    """Names of the modules with tensors of MONAI's DynUNet, and those that nnU-Net's plain U-Net has for them."""
    blocks = {block: f"encoder.stages.{level}.0" for level, block in enumerate(_blocks(levels))}
    blocks |= {f"upsamples.{index}.conv_block": f"decoder.stages.{index}" for index in range(levels - 1)}
    names = {f"upsamples.{i}.transp_conv.conv": f"decoder.transpconvs.{i}" for i in range(levels - 1)}
    for ours, theirs in blocks.items():
        for number in (1, 2):
            names[f"{ours}.conv{number}.conv"] = f"{theirs}.convs.{number - 1}.conv"
            names[f"{ours}.norm{number}"] = f"{theirs}.convs.{number - 1}.norm"
    return names | {"output_block.conv.conv": f"decoder.seg_layers.{levels - 2}"}


def _blocks(levels: int) -> list[str]:
    return ["input_block", *(f"downsamples.{index}" for index in range(levels - 2)), "bottleneck"]


def _plain_unet(state: _State) -> _State:
    """Tensors of nnU-Net's plain U-Net as DynUNet names them, without biases that instance norm takes away again."""
    names = {theirs: ours for ours, theirs in plain_unet_names(_count(state, r"^encoder\.stages\.(\d+)\.")).items()}
    named = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if module in names and not (leaf == "bias" and module.endswith(".conv")):
            named[f"{names[module]}.{leaf}"] = value
        elif module.startswith("decoder.seg_layers."):
            named[key] = value
    return named


def _count(state: _State, pattern: str) -> int:
    """One more than the largest number that a pattern finds in names."""
    return max((int(found[1]) + 1 for key in state if (found := re.search(pattern, key))), default=0)


def _size(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape[2:])


def _segresnet_ds(state: _State) -> dict[str, Any]:
    first = state["encoder.conv_init.weight"]
    levels = range(_count(state, r"^encoder\.layers\.(\d+)\."))
    return {
        "in_channels": first.shape[1],
        "init_filters": first.shape[0],
        "blocks_down": [_count(state, rf"^encoder\.layers\.{level}\.blocks\.(\d+)\.") for level in levels],
        "norm": "batch" if "encoder.layers.0.blocks.0.norm1.running_mean" in state else "instance",
    }


def _strides(state: _State, name: str, levels: int) -> list[list[int]]:
    """Of each level of a U-Net, as its decoder's transposed convolutions have them; without those, 2."""
    ups = [state.get(name.format(level)) for level in reversed(range(levels - 1))]
    return [[1, 1, 1], *([2, 2, 2] if up is None else _size(up) for up in ups)]


def _resenc(state: _State) -> dict[str, Any]:
    levels = range(_count(state, r"^encoder\.stages\.(\d+)\."))
    first = [state[f"encoder.stages.{level}.blocks.0.conv1.conv.weight"] for level in levels]
    decoder = [_count(state, rf"^decoder\.stages\.{level}\.convs\.(\d+)\.") for level in levels[:-1]]
    return {
        "in_channels": state["encoder.stem.convs.0.conv.weight"].shape[1],
        "features_per_stage": [tensor.shape[0] for tensor in first],
        "strides": _strides(state, "decoder.transpconvs.{}.weight", len(levels)),
        "n_blocks_per_stage": [_count(state, rf"^encoder\.stages\.{level}\.blocks\.(\d+)\.") for level in levels],
        "n_conv_per_stage_decoder": decoder if all(decoder) else 1,
        "kernel_sizes": [_size(tensor) for tensor in first],
    }


def _dynunet(state: _State) -> dict[str, Any]:
    levels = _count(state, r"^downsamples\.(\d+)\.") + 2
    first = [state[f"{block}.conv1.conv.weight"] for block in _blocks(levels)]
    return {
        "in_channels": first[0].shape[1],
        "filters": [tensor.shape[0] for tensor in first],
        "strides": _strides(state, "upsamples.{}.transp_conv.conv.weight", levels),
        "kernel_size": [_size(tensor) for tensor in first],
        "trans_bias": "upsamples.0.transp_conv.conv.bias" in state,
    }


def _resnet(state: _State) -> dict[str, Any]:
    first = state["encoder.conv1.weight"]
    return {
        "in_channels": first.shape[1],
        "layers": [_count(state, rf"^encoder\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "block": "bottleneck" if "encoder.layer1.0.conv3.weight" in state else "basic",
        "widen_factor": first.shape[0] / 64,
    }


def _swinunetr(state: _State) -> dict[str, Any]:
    first = state["swinViT.patch_embed.proj.weight"]
    tables = [state[f"swinViT.layers{n}.0.blocks.0.attn.relative_position_bias_table"] for n in (1, 2, 3, 4)]
    return {
        "in_channels": first.shape[1],
        "feature_size": first.shape[0],
        "depths": [_count(state, rf"^swinViT\.layers{stage}\.0\.blocks\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "num_heads": [table.shape[1] for table in tables],
        # A table has (2 window - 1) ** 3 rows.
        "window_size": (round(tables[0].shape[0] ** (1 / 3)) + 1) // 2,
        "use_v2": any(key.startswith("swinViT.layers1c.") for key in state),
    }


LAYOUTS = (
    Layout("MONAI's SegResNetDS", "segresnet_ds", "conv_init.weight", "encoder.", _segresnet_ds),
    Layout("nnU-Net's ResEnc U-Net", "resenc", "stem.convs.0.conv.weight", "encoder.", _resenc),
    Layout("nnU-Net's plain U-Net", "dynunet", "stages.0.0.convs.0.conv.weight", "encoder.", _dynunet),
    Layout("MONAI's ResNet", "resnet", "layer1.0.conv1.weight", "encoder.", _resnet),
    Layout(
        "MONAI's SwinTransformer",
        "swinunetr",
        "patch_embed.proj.weight",
        "swinViT.",
        _swinunetr,
        {r"\bmlp\.fc([12])\.": r"mlp.linear\1.", r"\b(layers\d)\.0\.0\.": r"\1.0."},
        r"^(patch_embed|layers\dc?)\.",
    ),
)
"""What is recognised; a file is of the first layout whose anchor it has."""
