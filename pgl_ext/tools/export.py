"""Encoders and decoders as files of their own, in the layouts that other networks load."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.config import PathLike

from pgl_ext.weights.files import DECODER_PREFIXES, ENCODER_PREFIX, load_state, save_weights
from pgl_ext.weights.records import EncoderRecord

__all__ = ["export_decoder", "export_encoder"]

# What the keys of an exported encoder begin with.
_LAYOUTS = {"pgl": ENCODER_PREFIX, "monai_resnet": "", "flexible_unet": ENCODER_PREFIX}


def export_encoder(checkpoint: PathLike, out: PathLike, layout: str = "pgl") -> Path:
    """Write the encoder of a training checkpoint, or of an encoder file, to a file of its own.

    Args:
        checkpoint: a file written during pre-training, or an encoder file with its JSON beside it.
        out: file to write, ending in ``.pt`` or ``.safetensors``; its JSON is written beside it.
        layout: ``"pgl"`` for keys ``encoder.*``; ``"monai_resnet"`` for the keys of MONAI's ResNet, which loads with
            ``strict=True`` into ``monai.networks.nets.resnet50(feed_forward=False, ...)`` for the default encoder;
            ``"flexible_unet"`` for the keys of ``monai.networks.nets.FlexibleUNet(backbone="resnet50")``, which calls
            its encoder what we do.

    Returns:
        the path written.

    Raises:
        FileNotFoundError: where the file, or the JSON of an encoder file, is missing.
        ImportError: ``safetensors`` is needed and not installed.
        ValueError: where it is damaged or holds no encoder, or the layout is unknown.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {tuple(_LAYOUTS)}, got {layout!r}.")
    state, record = _part(checkpoint, ENCODER_PREFIX, "encoder")
    save_weights(
        {key.removeprefix(ENCODER_PREFIX): value for key, value in state.items()}, out, record, _LAYOUTS[layout]
    )
    return Path(out)


def export_decoder(checkpoint: PathLike, out: PathLike) -> Path:
    """Write the decoder of a checkpoint of a method that pre-trains one, or of a decoder file, to a file of its own.

    Args, returns and errors are those of :func:`export_encoder`.
    """
    state, record = _part(checkpoint, DECODER_PREFIXES, "decoder")
    save_weights(state, out, record)
    return Path(out)


def _part(
    source: PathLike, prefixes: str | tuple[str, ...], name: str
) -> tuple[dict[str, torch.Tensor], EncoderRecord]:
    """The tensors of a checkpoint or weights file whose keys begin with a prefix, and the record."""
    content = load_state(source)
    checkpoint = "network" in content
    network = content["network"] if checkpoint else content
    state = {key: value for key, value in network.items() if key.startswith(prefixes)}
    if not state:
        raise ValueError(
            f"{source} holds no {name} (keys: {sorted(network)[:8]}): give a training checkpoint, or the {name} file "
            "of one."
        )
    record = EncoderRecord.from_json(content.get("description"), source) if checkpoint else EncoderRecord.load(source)
    return state, record
