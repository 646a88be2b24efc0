"""Files of weights: plain state dicts, with a record as JSON beside them.

Tensors are named as in the segmentation network: ``encoder.*`` of the paper's, and its library's names of any other.
Files ending in ``.safetensors`` are in that format, with the record in their metadata too; all others are PyTorch's.
The JSON has the SHA-256 of the file beside it, by its suffix, which is compared where it is read.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import methodcaller
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from monai.config import PathLike
from monai.utils import ensure_tuple

from pgl_ext.files import pointer_problem, read_json, write_atomically, write_json
from pgl_ext.networks.base import FeatureNetwork, SegmentationNetwork
from pgl_ext.weights.records import SHA256, EncoderRecord, ModelRecord

__all__ = ["load_state", "model_files", "save_decoder", "save_encoder", "save_weights"]

_SAFETENSORS = ".safetensors"
# What NumPy's numbers are pickled as, a type and bytes; the function has moved since NumPy 1.
_NUMBER = np.float64().__reduce__()[0]
_NUMBERS = [
    *((_NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}),
]


def save_encoder(network: FeatureNetwork, path: PathLike, record: EncoderRecord) -> None:
    """Write the encoder of a network, tensors on the CPU, with its record beside it."""
    state = network.state_dict()
    save_weights({network.key_prefix + key: state[key] for key in network.encoder_keys()}, path, record)


def save_decoder(network: SegmentationNetwork, path: PathLike, record: EncoderRecord) -> None:
    """Write a network's decoder, or that which a method pre-trains, without its head, with the encoder's record."""
    save_weights(network.decoder_state(), path, record)


def save_weights(state: Mapping[str, torch.Tensor], path: PathLike, record: EncoderRecord | ModelRecord) -> None:
    """Write a state dict, and its record as JSON beside it, with the file's SHA-256.

    Raises:
        ImportError: ``safetensors`` is needed and not installed.
    """
    path = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    content = record.to_json()
    if path.suffix == _SAFETENSORS:
        # "format" is what readers of the format look for first.
        # Tensors that have several names are written under each.
        copies = {key: value.clone() for key, value in state.items()}
        text = json.dumps(content, indent=4) + "\n"
        tensors = _safetensors().save(copies, metadata={"format": "pt", "description": text})
        save = methodcaller("write", tensors)
    else:
        save = partial(torch.save, state)
    beside = path.with_suffix(".json")
    sums = {suffix: value for suffix, value in _recorded_sums(beside).items() if suffix != path.suffix}
    # Without the checksum of a file that is about to be replaced: killed in between, the two must still fit.
    write_json(beside, {**content, SHA256: sums})
    write_atomically(save, path)
    write_json(beside, {**content, SHA256: {**sums, path.suffix: _sha256(path)}})


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Files ending in .safetensors need the package 'safetensors': pip install safetensors"
        ) from error
    return safetensors.torch


def _sha256(path: Path) -> str:
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            content.update(part)
    return content.hexdigest()


def _recorded_sums(record: Path) -> Mapping[str, str]:
    """The checksums in the JSON beside files, by their suffixes."""
    with suppress(OSError, ValueError):  # whoever needs the record says what is wrong with it
        sums = read_json(record).get(SHA256)
        return sums if isinstance(sums, Mapping) else {}
    return {}


def _check_sum_beside(path: Path) -> None:
    """Compare a file with the checksum in the JSON beside it, where there is one."""
    record = path.with_suffix(".json")
    recorded = _recorded_sums(record).get(path.suffix)
    if recorded is not None and recorded != _sha256(path):
        raise ValueError(
            f"{path} is not the file that {record} was written with, its SHA-256 is another: copy both again from "
            "where they were made; one of them is damaged, or of another training."
        )


def _check_sums(path: Path) -> None:
    """Compare what PyTorch has written with its checksums, which PyTorch itself does not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} in it is wrong")


def load_state(path: PathLike) -> dict:
    """Read a PyTorch file, tensors and plain values only, or a ``.safetensors`` file; tensors are on the CPU.

    Numbers may be NumPy's, as in checkpoints of other programs.

    Raises:
        FileNotFoundError: the file is missing.
        ImportError: ``safetensors`` is needed and not installed.
        ValueError: it is truncated, damaged, holds more than tensors and plain values, or no dict of names, or is not
            the file that the JSON beside it was written with.
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
        with torch.serialization.safe_globals(_NUMBERS):
            content = read(path)
    except Exception as error:
        # The error about an empty file has no message.
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(
            f"{path} can not be read as PyTorch weights ({reason}). It is damaged, incomplete, or not a weights file: "
            "copy or export it again."
        ) from error
    _check_sum_beside(path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of names: give a state dict's file.")
    return content


def model_files(path: PathLike | Sequence[PathLike]) -> list[str]:
    """The model files that are meant by one, by several, or by the folder of a training with folds."""
    paths = [Path(part) for part in ensure_tuple(path)]
    folds = len(list(paths[0].glob("fold_*"))) if len(paths) == 1 else 0
    return [str(paths[0] / f"fold_{fold}" / "models" / "model.pt") for fold in range(folds)] or list(map(str, paths))
