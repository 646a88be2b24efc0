"""Files of weights: plain state dicts, with a record as JSON beside them.

Tensors are named as in the segmentation network: ``encoder.*`` of the paper's, and its library's names of any other.
Files ending in ``.safetensors`` are in that format, with the record in their metadata too; all others are PyTorch's.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from monai.config import PathLike
from monai.utils import ensure_tuple

from pgl_ext.files import pointer_problem, write_atomically, write_text
from pgl_ext.networks.base import FeatureNetwork, SegmentationNetwork
from pgl_ext.weights.records import EncoderRecord, ModelRecord

__all__ = ["load_state", "model_files", "save_decoder", "save_encoder", "save_weights"]

_SAFETENSORS = ".safetensors"


def save_encoder(network: FeatureNetwork, path: PathLike, record: EncoderRecord) -> None:
    """Write the encoder of a network, tensors on the CPU, with its record beside it."""
    state = network.state_dict()
    save_weights({network.key_prefix + key: state[key] for key in network.encoder_keys()}, path, record)


def save_decoder(network: SegmentationNetwork, path: PathLike, record: EncoderRecord) -> None:
    """Write a network's decoder, or that which a method pre-trains, without its head, with the encoder's record."""
    save_weights(network.decoder_state(), path, record)


def save_weights(state: Mapping[str, torch.Tensor], path: PathLike, record: EncoderRecord | ModelRecord) -> None:
    """Write a state dict, and its record as JSON beside it.

    Raises:
        ImportError: ``safetensors`` is needed and not installed.
    """
    path = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    text = json.dumps(record.to_json(), indent=4) + "\n"
    if path.suffix == _SAFETENSORS:
        # "format" is what readers of the format look for first.
        # Tensors that have several names are written under each.
        copies = {key: value.clone() for key, value in state.items()}
        content = _safetensors().save(copies, metadata={"format": "pt", "description": text})
        write_atomically(lambda file: file.write(content), path)
    else:
        write_atomically(lambda file: torch.save(state, file), path)
    write_text(path.with_suffix(".json"), text)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Files ending in .safetensors need the package 'safetensors': pip install safetensors"
        ) from error
    return safetensors.torch


def _check_sums(path: Path) -> None:
    """Compare what PyTorch has written with its checksums, which PyTorch itself does not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} in it is wrong")


def load_state(path: PathLike) -> dict:
    """Read a PyTorch file, tensors and plain values only, or a ``.safetensors`` file; tensors are on the CPU.

    Raises:
        FileNotFoundError: the file is missing.
        ImportError: ``safetensors`` is needed and not installed.
        ValueError: it is truncated, damaged, holds more than tensors and plain values, or no dict of names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}.")
    if path.suffix == _SAFETENSORS:
        read = _safetensors().load_file
    else:
        read = partial(torch.load, map_location="cpu", weights_only=True)
    if pointer := pointer_problem(path):
        raise ValueError(f"{path} {pointer}")
    try:
        _check_sums(path)
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


def model_files(path: PathLike | Sequence[PathLike]) -> list[str]:
    """The model files that are meant by one, by several, or by the folder of a training with folds."""
    paths = [Path(part) for part in ensure_tuple(path)]
    folds = len(list(paths[0].glob("fold_*"))) if len(paths) == 1 else 0
    return [str(paths[0] / f"fold_{fold}" / "models" / "model.pt") for fold in range(folds)] or list(map(str, paths))
