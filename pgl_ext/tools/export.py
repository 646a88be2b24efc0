"""Encoders and decoders as files of their own, in the layouts that other networks load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from monai.config import PathLike

from pgl_ext.networks.base import SegmentationNetwork
from pgl_ext.networks.build import ENCODERS, NETWORKS, build
from pgl_ext.weights.files import load_state, save_weights
from pgl_ext.weights.records import EncoderRecord

__all__ = ["export_decoder", "export_encoder"]

_LAYOUTS = ("pgl", "monai_resnet", "flexible_unet")
# What precedes a network's names of tensors in the checkpoints of methods, the longest first.
_WITHIN = ("encoder.encoder.", "encoder.", "")


def export_encoder(checkpoint: PathLike, out: PathLike, layout: str = "pgl") -> Path:
    """Write the encoder of a training checkpoint, or of an encoder file, to a file of its own.

    Args:
        checkpoint: a file written during pre-training, or an encoder file with its JSON beside it.
        out: file to write, ending in ``.pt`` or ``.safetensors``; its JSON is written beside it.
        layout: ``"pgl"`` for the names that encoder files have, which for a network of a library are the library's.
            For ResNets: ``"monai_resnet"`` for the keys of MONAI's, which loads with ``strict=True`` into
            ``monai.networks.nets.resnet50(feed_forward=False, ...)`` for the default encoder; ``"flexible_unet"`` for
            those of ``monai.networks.nets.FlexibleUNet(backbone="resnet50")``, which calls its encoder what we do.

    Returns:
        the path written.

    Raises:
        FileNotFoundError: where the file, or the JSON of an encoder file, is missing.
        ImportError: ``safetensors`` is needed and not installed.
        ValueError: where it is damaged or holds no encoder, or the layout is unknown.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {_LAYOUTS}, got {layout!r}.")
    state, record = _read(checkpoint)
    encoder = build(ENCODERS, record.architecture, checkpoint)
    if layout != "pgl" and encoder.family != "resnet":
        raise ValueError(f"{checkpoint} holds a {encoder.family}, whose names have one layout: leave --layout out.")
    part = _part(state, encoder.encoder_keys(), checkpoint, "encoder")
    prefix = "" if layout == "monai_resnet" else encoder.key_prefix
    save_weights({prefix + key: value for key, value in part.items()}, out, record)
    return Path(out)


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
