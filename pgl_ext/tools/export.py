"""Encoders, decoders and networks as files of their own, for other programs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.config import PathLike

from pgl_ext.files import read_json, write_atomically, write_json
from pgl_ext.networks.base import SegmentationNetwork
from pgl_ext.networks.build import ENCODERS, NETWORKS, build
from pgl_ext.tools.nnunet import FAMILIES, PLANS, nnunet_checkpoint
from pgl_ext.weights import EncoderRecord, load_state, save_weights

__all__ = ["PROGRAMS", "export_decoder", "export_encoder", "export_nnunet"]

logger = logging.getLogger(__name__)

PROGRAMS = ("pgl", "monai", "nnunet")
"""What files are written for."""

# What precedes a network's names of tensors in the checkpoints of methods, the longest first.
_WITHIN = ("encoder.encoder.", "encoder.", "")


def export_encoder(checkpoint: PathLike, out: PathLike, to: str = "pgl") -> Path:
    """Write the encoder of a training checkpoint, or of an encoder file, to a file of its own.

    Args:
        checkpoint: a file written during pre-training, or an encoder file with its JSON beside it.
        out: file to write, ending in ``.pt`` or ``.safetensors``; its JSON is written beside it.
        to: ``"pgl"`` for the names that encoder files have, which for a network of a library are the library's;
            ``"monai"`` for those of MONAI's class, which of ResNets are others: they load with ``strict=True`` into
            ``monai.networks.nets.resnet50(feed_forward=False, ...)`` for the default encoder.

    Returns:
        the path written.

    Raises:
        FileNotFoundError: where the file, or the JSON of an encoder file, is missing.
        ImportError: ``safetensors`` is needed and not installed.
        ValueError: where it is damaged or holds no encoder, or MONAI has no such network.
    """
    state, record = _read(checkpoint)
    encoder = build(ENCODERS, record.architecture, checkpoint)
    if to == "monai" and encoder.family == "resenc":
        raise ValueError(f"{checkpoint} holds a {encoder.family}, a network of nnU-Net's: give --to nnunet, or pgl.")
    part = _part(state, encoder.encoder_keys(), checkpoint, "encoder")
    prefix = "" if to == "monai" else encoder.key_prefix
    save_weights({prefix + key: value for key, value in part.items()}, out, record)
    return Path(out)


def export_nnunet(checkpoint: PathLike, out: PathLike, plans: PathLike | None = None) -> Path:
    """Write encoder and decoder as ``nnUNetv2_train -pretrained_weights`` takes them, and ``pglPlans.json`` beside.

    Where the method has pre-trained no decoder, it has random weights.

    Args:
        checkpoint: see :func:`export_encoder`; the decoder of an encoder file is ``pgl_decoder.pt`` beside it.
        out: file to write, such as ``pgl.pth``.
        plans: ``nnUNetPlans.json`` of the data set to train on, which a configuration is added to.

    Returns:
        the path written.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where one is damaged or holds no encoder, or nnU-Net has no such network.
    """
    out = Path(out)
    if out.suffix in (".json", ".safetensors"):
        raise ValueError(f"nnU-Net reads no {out.suffix}: let {out} end in .pth.")
    state, record = _read(checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(ENCODERS, record.architecture, checkpoint)
    network.load_state_dict(_part(state, network.encoder_keys(), checkpoint, "encoder"), strict=False)
    if network.family in FAMILIES:
        beside = Path(checkpoint).with_name("pgl_decoder.pt")
        state = load_state(beside) if Path(checkpoint).name == "pgl_encoder.pt" and beside.is_file() else state
        try:
            network.load_state_dict(_part(state, network.decoder_keys(), checkpoint, "decoder"), strict=False)
        except ValueError:
            logger.warning("%s has no decoder: that in %s has random weights, as nnU-Net's has", checkpoint, out)
    given = None if plans is None else read_json(plans, "Plans", "give nnUNetPlans.json of nnUNetv2_plan_experiment")
    content = nnunet_checkpoint(network, record.input, given, checkpoint)
    write_atomically(lambda file: torch.save(content, file), out)
    write_json(out.with_name(f"{PLANS}.json"), content["init_args"]["plans"])
    return out


def export_decoder(checkpoint: PathLike, out: PathLike) -> Path:
    """Write the decoder of a checkpoint of a method that pre-trains one, or of a decoder file, to a file of its own.

    Args, returns and errors are those of :func:`export_encoder`.
    """
    state, record = _read(checkpoint)
    network = build(ENCODERS, record.architecture, checkpoint)
    network = network if isinstance(network, SegmentationNetwork) else NETWORKS[network.family]
    parts, head = (tuple(f"{name}." for name in names) for names in (network.decoder_parts, network.head_parts))
    names = [key.removeprefix("encoder.") for key in state]
    names = [name for name in names if name.startswith(parts) and not name.startswith(head)]
    save_weights(_part(state, names, checkpoint, "decoder"), out, record)
    return Path(out)


def _read(source: PathLike) -> tuple[dict[str, torch.Tensor], EncoderRecord]:
    """The tensors of a checkpoint, or of an encoder or decoder file, and the record."""
    content = load_state(source)
    if "network" in content:
        return content["network"], EncoderRecord.from_json(content.get("description"), source)
    return content, EncoderRecord.load(source)


def _part(state: dict[str, torch.Tensor], keys: Sequence[str], source: PathLike, name: str) -> dict[str, torch.Tensor]:
    """The tensors of some names, which checkpoints of methods precede with where the network is."""
    for prefix in _WITHIN:
        if keys and all(prefix + key in state for key in keys):
            return {key: state[prefix + key] for key in keys}
    raise ValueError(
        f"{source} holds no {name} (keys: {sorted(state)[:8]}): give a training checkpoint, or the {name} file of one."
    )
