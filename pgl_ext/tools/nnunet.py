"""Pre-trained networks as nnU-Net takes them: ``nnUNetv2_train ... -pretrained_weights FILE``, with plans that fit.

nnU-Net wants every tensor of its network but those of the heads, and lets volumes have the axes z, y, x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pgl_ext.networks.base import SegmentationNetwork
from pgl_ext.weights import InputRecord
from pgl_ext.weights.public import plain_unet_names, turned

__all__ = ["CONFIGURATION", "FAMILIES", "PLANS", "nnunet_checkpoint"]

PLANS, CONFIGURATION = "pglPlans", "3d_pgl"
"""Names of the plans, and of their configuration."""

# Arguments that the networks of both have, but for those of heads, and for dropout, which has no weights.
_OF_DYNUNET = {"in_channels", "out_channels", "filters", "strides", "kernel_size"}
_OF_DYNUNET |= {"deep_supervision", "deep_supr_num", "trans_bias", "dropout"}
_MODULES = {
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "dropout_op": None,
    "nonlin": "torch.nn.LeakyReLU",
}


def nnunet_checkpoint(
    network: SegmentationNetwork, input: InputRecord, plans: Mapping[str, Any] | None, source: Any
) -> dict[str, Any]:
    """What nnU-Net loads, with plans as ``init_args``.

    Args:
        network: with the weights, a ``ResidualEncoderUNet`` or a ``DynUNet``.
        input: how its volumes were prepared.
        plans: of the data set to train on, as nnU-Net makes them, which a configuration is added to; None: that
            configuration alone.
        source: of the weights, for messages.

    Returns:
        The checkpoint: ``network_weights``, and ``init_args`` with the plans.

    Raises:
        ValueError: nnU-Net has no such network.
    """
    plans = dict(plans or {})
    # Axis i of nnU-Net's network is axis axes[i] here.
    axes = [2 - axis for axis in plans.get("transpose_forward", (0, 1, 2))]
    architecture, state = FAMILIES[network.family](network, axes) if network.family in FAMILIES else (None, {})
    if architecture is None:
        raise ValueError(
            f"{source} holds a {network.family}, which nnU-Net does not have: pre-train with --architecture resenc, or "
            "dynunet with the same kernel_size on all levels and no further arguments."
        )
    configuration = {
        "inherits_from": "3d_fullres",
        "data_identifier": f"{PLANS}_{CONFIGURATION}",
        "architecture": architecture,
    }
    if input.patch_size is not None:
        configuration["patch_size"] = [input.patch_size[axis] for axis in axes]
    if input.spacing is not None:
        configuration["spacing"] = [input.spacing[axis] for axis in axes]
    if input.hu_window is None:
        configuration["normalization_schemes"] = ["ZScoreNormalization"] * input.channels
        configuration["use_mask_for_norm"] = [False] * input.channels
    plans["plans_name"] = PLANS
    plans["configurations"] = {**plans.get("configurations", {}), CONFIGURATION: configuration}
    return {
        "network_weights": {key: turned(value, axes) for key, value in state.items()},
        "trainer_name": "pgl_ext",
        "init_args": {"plans": plans, "configuration": CONFIGURATION},
    }


def _resenc(network: SegmentationNetwork, axes: Sequence[int]) -> tuple[dict, dict]:
    arguments = network.arguments
    levels = len(arguments["features_per_stage"])
    sizes = {
        "n_blocks_per_stage": list(arguments["n_blocks_per_stage"]),
        "n_conv_per_stage_decoder": _each(arguments["n_conv_per_stage_decoder"], levels - 1),
    }
    widths, kernels = arguments["features_per_stage"], arguments["kernel_sizes"]
    return _architecture(
        "ResidualEncoderUNet", widths, kernels, arguments["strides"], axes, sizes
    ), network.state_dict()


def _dynunet(network: SegmentationNetwork, axes: Sequence[int]) -> tuple[dict | None, dict]:
    """Convolutions get biases of 0, which instance norm would take away again."""
    arguments = network.arguments
    levels = len(arguments["filters"])
    kernels = _each(arguments["kernel_size"], levels)
    # DynUNet's decoder has the kernels of the coarser of two levels, nnU-Net's those of the finer one.
    if set(arguments) - _OF_DYNUNET or any(kernel != kernels[0] for kernel in kernels):
        return None, {}
    given, state = network.state_dict(), {}
    for ours, theirs in plain_unet_names(levels).items():
        weight = given[f"{ours}.weight"]
        outputs = weight.shape[1 if "transp" in ours else 0]
        values = {"weight": weight, "bias": given.get(f"{ours}.bias", torch.zeros(outputs))}
        # The names that nnU-Net has for one tensor.
        names = [theirs]
        for end, alias in ((".conv", ".all_modules.0"), (".norm", ".all_modules.1")):
            names += [theirs.removesuffix(end) + alias] * theirs.endswith(end)
        names += [f"decoder.{name}" for name in names if name.startswith("encoder.")]
        state |= {f"{name}.{leaf}": value for name in names for leaf, value in values.items()}
    sizes = {"n_conv_per_stage": [2] * levels, "n_conv_per_stage_decoder": [2] * (levels - 1)}
    return _architecture("PlainConvUNet", arguments["filters"], kernels, arguments["strides"], axes, sizes), state


FAMILIES = {"resenc": _resenc, "dynunet": _dynunet}
"""Of networks that nnU-Net has, what makes its architecture and its tensors of them."""


def _architecture(
    name: str, widths: Sequence[int], kernels: Any, strides: Any, axes: Sequence[int], sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """What plans say of a network."""
    kernels, strides = ([_each(v, 3) for v in _each(values, len(widths))] for values in (kernels, strides))
    arguments = {
        "n_stages": len(widths),
        "features_per_stage": list(widths),
        "kernel_sizes": [[kernel[axis] for axis in axes] for kernel in kernels],
        "strides": [[stride[axis] for axis in axes] for stride in strides],
        **sizes,
        **_MODULES,
        "conv_bias": True,
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op_kwargs": None,
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": arguments,
        "_kw_requires_import": list(_MODULES),
    }


def _each(value: Any, count: int) -> list[Any]:
    """One value for each of several, where it is given for all."""
    return [value] * count if isinstance(value, int) else list(value)
