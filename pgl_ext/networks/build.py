"""Networks from recorded architectures, and networks made ready to train.

A record is data: its family is looked up in a closed registry and its arguments are checked against the constructor's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pgl_ext.networks.base import FeatureNetwork, SegmentationNetwork
from pgl_ext.networks.dynunet import DynUNet
from pgl_ext.networks.mednext import MedNeXt
from pgl_ext.networks.resenc import ResidualEncoderUNet
from pgl_ext.networks.resnet import ResNetEncoder
from pgl_ext.networks.segmentation import SegmentationNet
from pgl_ext.networks.segresnet import SegResNet
from pgl_ext.networks.segresnet_ds import SegResNetDS
from pgl_ext.networks.swinunetr import SwinUNETR
from pgl_ext.networks.unet import UNet
from pgl_ext.settings import parse_bool

__all__ = ["ENCODERS", "NETWORKS", "build", "fast_half_precision", "prepare_network"]

NETWORKS: dict[str, type[SegmentationNetwork]] = {
    network.family: network
    for network in (SegmentationNet, DynUNet, SegResNet, SegResNetDS, UNet, SwinUNETR, MedNeXt, ResidualEncoderUNet)
}
"""Classes of segmentation networks by family."""

ENCODERS: dict[str, type[FeatureNetwork]] = {**NETWORKS, "resnet": ResNetEncoder}
"""What records of encoders describe, by family: the paper's encoder by itself, and the other networks."""


def build(
    classes: Mapping[str, type[nn.Module]], architecture: Mapping[str, Any], source: Any, **overrides: Any
) -> nn.Module:
    """Build a network with random weights.

    Args:
        classes: :data:`ENCODERS` or :data:`NETWORKS`.
        architecture: ``family`` and ``arguments``, as a record has them.
        source: the file that they are recorded for, for messages.
        overrides: arguments that replace the recorded ones.

    Raises:
        ValueError: the family is unknown, or an argument is not one that its constructor takes.
    """
    family, arguments = architecture.get("family"), architecture.get("arguments")
    if family not in list(classes) or not isinstance(arguments, Mapping):
        raise ValueError(
            f"The architecture {dict(architecture)} of {source} is not known, the families are {', '.join(classes)}: "
            "install the version of pgl_ext that wrote the file."
        )
    network, arguments = classes[family], {**arguments, **overrides}
    try:
        inspect.signature(network).bind(**arguments)
        return network(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The architecture {arguments} of {source} is not one of {network.__name__}: {error}. Install the "
            "version of pgl_ext that wrote the file."
        ) from error


def fast_half_precision(device: torch.device | str) -> bool:
    """Whether bfloat16 is faster than float32 on a device: on GPUs, and on CPUs that have units for it."""
    if torch.device(device).type != "cpu":
        return True
    # Earlier versions of PyTorch do not say.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(unit, False) for unit in ("amx_bf16", "avx512_bf16"))


def prepare_network(
    network: nn.Module,
    device: torch.device | str,
    channels_last: bool = False,
    compile: bool = False,
    sync_batch_norm: bool = False,
) -> nn.Module:
    """Make a method or segmentation network ready to train, in place, and return it; parameters keep their names.

    Args:
        network: what is trained.
        device: where to train.
        channels_last: memory layout ``channels_last_3d``, which tensor cores like.
        compile: ``torch.compile`` the network's parts (not the aligner, whose checks look at values).
        sync_batch_norm: batch-norm statistics over all processes, of online and target networks.
    """
    if parse_bool(sync_batch_norm, "sync_batch_norm"):
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(device)
    if parse_bool(channels_last, "channels_last"):
        network.to(memory_format=torch.channels_last_3d)
    if parse_bool(compile, "compile"):
        for child in network.children():
            for name in ("features", "features_and_logits"):
                if hasattr(child, name):
                    setattr(child, name, torch.compile(getattr(child, name)))
            if list(child.parameters()):
                child.compile()
    return network
