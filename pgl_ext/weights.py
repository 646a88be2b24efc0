"""Encoder and decoder files: what pre-training leaves behind and fine-tuning starts from.

An encoder file is a plain state dict with keys ``encoder.*``; a JSON file of the same name beside it says how to build
the encoder and how its input was prepared. A decoder file has keys ``aspp.*`` and ``decoder.*``, and the same JSON.
Files ending in ``.safetensors`` are in that format, with the JSON's content in their metadata too; all others are
PyTorch's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pgl_ext.files import write_atomically

__all__ = [
    "LoadReport",
    "compare_states",
    "export_decoder",
    "export_encoder",
    "load_decoder",
    "load_encoder",
    "load_state",
    "read_description",
    "save_decoder",
    "save_encoder",
    "save_weights",
]

_PREFIX = "encoder."
_DECODER_PREFIXES = ("aspp.", "decoder.")
_HEAD_PREFIX = "decoder.head."
_SAFETENSORS = ".safetensors"
# What the keys of an exported encoder begin with.
_LAYOUTS = {"pgl": _PREFIX, "monai_resnet": "", "flexible_unet": _PREFIX}


def save_encoder(encoder: nn.Module, path: str | os.PathLike, description: Mapping[str, Any]) -> None:
    """Write ``path`` (keys ``encoder.*``) and the description as JSON beside it.

    Args:
        encoder: the encoder; its tensors are stored on the CPU.
        path: file to write, ending in ``.pt``.
        description: architecture, stride, normalization, spacing, method, steps, data, version.
    """
    save_weights(encoder.state_dict(), path, description, _PREFIX)


def save_decoder(network: nn.Module, path: str | os.PathLike, description: Mapping[str, Any]) -> None:
    """Write ``path`` (keys ``aspp.*`` and ``decoder.*``) and the description as JSON beside it.

    Args:
        network: has ``.aspp`` and ``.decoder``; their tensors are stored on the CPU.
        path: file to write, ending in ``.pt``.
        description: as of the encoder that it was trained with.
    """
    save_weights(_decoder_state(network), path, description)


def _decoder_state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in network.state_dict().items() if key.startswith(_DECODER_PREFIXES)}


def save_weights(
    state: Mapping[str, torch.Tensor], path: str | os.PathLike, description: Mapping, prefix: str = ""
) -> None:
    """Write a state dict, its keys after a prefix, and its description as JSON beside it."""
    path = Path(path)
    state = {prefix + key: value.detach().cpu().contiguous() for key, value in state.items()}
    text = json.dumps(dict(description), indent=4) + "\n"
    if path.suffix == _SAFETENSORS:
        # "format" is what readers of the format look for first.
        content = _safetensors().save(state, metadata={"format": "pt", "description": text})
        write_atomically(lambda file: file.write(content), path)
    else:
        write_atomically(lambda file: torch.save(state, file), path)
    write_atomically(lambda file: file.write(text.encode()), path.with_suffix(".json"))


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Files ending in .safetensors need the package 'safetensors': pip install safetensors"
        ) from error
    return safetensors.torch


def read_description(path: str | os.PathLike) -> dict[str, Any]:
    """Read the JSON beside an encoder or model file.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is damaged.
    """
    weights, path = Path(path), Path(path).with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(f"no description {path} beside {weights.name}: copy both, they belong together.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged, no JSON ({error}): copy it again, together with {weights.name}."
        ) from error
    if not isinstance(description, dict):
        raise ValueError(
            f"{path} holds a {type(description).__name__}, no description of {weights.name}: copy it again."
        )
    return description


def load_state(path: str | os.PathLike) -> dict[str, Any]:
    """``torch.load`` on the CPU, tensors and plain values only, with an error that names the file.

    A file ending in ``.safetensors`` is read as such.

    Raises:
        FileNotFoundError: where the file is missing.
        ImportError: ``safetensors`` is needed and not installed.
        ValueError: where it is truncated, damaged, holds more than tensors and plain values, or no dict of names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}.")
    if path.suffix == _SAFETENSORS:
        read = _safetensors().load_file
    else:
        read = partial(torch.load, map_location="cpu", weights_only=True)
    try:
        content = read(path)
    except Exception as error:
        # The error about an empty file has no message.
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(
            f"{path} can not be read as PyTorch weights ({reason}). It is damaged, incomplete, or not a weights file: "
            "copy or export it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of names: give a state dict's file.")
    return content


@dataclass
class LoadReport:
    """What became of each tensor when an encoder file, a decoder file, or a whole network's, was loaded.

    Attributes:
        loaded: tensors copied into the network.
        missing: the network's tensors that the file lacks.
        unexpected: the file's tensors that the network lacks.
        mismatched: tensors of another shape, as ``name: file shape, network's shape``.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        lines = [f"{len(self.loaded)} of {total} tensors loaded"]
        for name in ("missing", "unexpected", "mismatched"):
            entries = getattr(self, name)
            if entries:
                lines.append(f"{name} ({len(entries)}): {', '.join(entries[:8])}{', ...' if len(entries) > 8 else ''}")
        return "; ".join(lines)


def compare_states(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> LoadReport:
    """Which tensors of a file's state dict fit those of a network's.

    Args:
        state: the file's.
        own: the network's.

    Returns:
        the report; ``loaded`` are those that can be loaded.
    """
    report = LoadReport(unexpected=sorted(set(state) - set(own)))
    for key, value in own.items():
        if key not in state:
            report.missing.append(key)
        elif state[key].shape != value.shape:
            report.mismatched.append(f"{key}: {tuple(state[key].shape)}, {tuple(value.shape)}")
        else:
            report.loaded.append(key)
    return report


def load_encoder(network: nn.Module, path: str | os.PathLike) -> LoadReport:
    """Load an encoder file into a network's encoder: all of its tensors, or none.

    Besides encoder files (keys ``encoder.*``), plain state dicts of MONAI's ResNet are accepted, also those wrapped as
    ``{"state_dict": {"module.*": ...}}`` (MedicalNet).

    Args:
        network: a network with ``.encoder``, or an encoder.
        path: the file.

    Returns:
        the report; everything was loaded, what does not belong to an encoder, such as a classifier, is listed as
        unexpected.

    Raises:
        FileNotFoundError: where the file is missing.
        ValueError: where it is damaged, a tensor of the encoder is missing from it or has another shape, or it holds a
            larger encoder.
    """
    encoder = getattr(network, "encoder", network)
    state = load_state(path)
    state = state.get("state_dict") or state
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if any(key.startswith(_PREFIX) for key in state):
        state = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    own = encoder.state_dict()
    state = _without_shortcut_bias(state, own)
    report = compare_states(state, own)
    # A classifier is left out. More of what the encoder has as well, such as blocks of a stage, is a larger encoder.
    parts = {name for name, _ in encoder.named_children()}
    larger = any(key.split(".")[0] in parts for key in report.unexpected)
    if report.missing or report.mismatched or larger:
        raise ValueError(
            f"{path} does not fit the encoder: {report}. Build the encoder with the architecture recorded in "
            f"{Path(path).with_suffix('.json').name}, or choose the file that belongs to it."
        )
    encoder.load_state_dict({key: state[key] for key in own})
    return report


def load_decoder(network: nn.Module, path: str | os.PathLike) -> LoadReport:
    """Load whatever fits of a decoder file into a network's pyramid pooling and decoder.

    The convolution to the classes is left as it is: what it was trained for is another task's. A decoder of another
    layout, such as one without skips, fits in part.

    Args:
        network: a network with ``.aspp`` and ``.decoder``.
        path: the file.

    Returns:
        the report; what is missing or mismatched keeps its values.

    Raises:
        FileNotFoundError: where the file is missing.
        ValueError: where it is damaged, or nothing of it fits.
    """
    state = {key: value for key, value in load_state(path).items() if isinstance(value, torch.Tensor)}
    own = {key: value for key, value in _decoder_state(network).items() if not key.startswith(_HEAD_PREFIX)}
    report = compare_states(state, own)
    # Counts of batches are single numbers, which fit everywhere.
    if all(key.endswith("num_batches_tracked") for key in report.loaded):
        raise ValueError(
            f"nothing of {path} fits the decoder: {report}. Give the pgl_decoder.pt of a method that pre-trains a "
            "decoder, and build the decoder with the same widths (aspp_channels, decoder_channels)."
        )
    network.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    return report


def _without_shortcut_bias(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict:
    """Take the biases that MONAI's ResNet has in its shortcuts by default off the running mean, which has them too."""
    state = dict(state)
    for key in [key for key in state if key.endswith(".downsample.0.bias") and key not in own]:
        mean = key.removesuffix("0.bias") + "1.running_mean"
        if mean in state:
            state[mean] = state[mean] - state.pop(key)
    return state


def export_encoder(checkpoint: str | os.PathLike, out: str | os.PathLike, layout: str = "pgl") -> Path:
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
    state, description = _part(checkpoint, _PREFIX, "encoder")
    save_weights({key.removeprefix(_PREFIX): value for key, value in state.items()}, out, description, _LAYOUTS[layout])
    return Path(out)


def export_decoder(checkpoint: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Write the decoder of a checkpoint of a method that pre-trains one, or of a decoder file, to a file of its own.

    Args:
        checkpoint: a training checkpoint, or a decoder file with its JSON beside it.
        out: file to write, ending in ``.pt`` or ``.safetensors``; its JSON is written beside it.

    Returns:
        the path written.

    Raises:
        FileNotFoundError: where the file, or the JSON of a decoder file, is missing.
        ImportError: ``safetensors`` is needed and not installed.
        ValueError: where it is damaged or holds no decoder.
    """
    state, description = _part(checkpoint, _DECODER_PREFIXES, "decoder")
    save_weights(state, out, description)
    return Path(out)


def _part(source: str | os.PathLike, prefixes: str | tuple[str, ...], name: str) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of a checkpoint or weights file whose keys begin with a prefix, and the description."""
    content = load_state(source)
    checkpoint = "network" in content
    network = content["network"] if checkpoint else content
    state = {key: value for key, value in network.items() if key.startswith(prefixes)}
    if not state:
        raise ValueError(
            f"{source} holds no {name} (keys: {sorted(network)[:8]}): give a training checkpoint, or the {name} file "
            "of one."
        )
    return state, content["description"] if checkpoint else read_description(source)
