"""Loading weights with a report of every tensor, and building the network that a file belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.config import PathLike
from monai.utils import ensure_tuple
from torch import nn

from pgl_ext.networks.base import FeatureNetwork, encoder_of
from pgl_ext.networks.build import ENCODERS, NETWORKS, build
from pgl_ext.weights.files import load_state
from pgl_ext.weights.public import PublicWeights, read_public
from pgl_ext.weights.records import EncoderRecord, ModelRecord

__all__ = [
    "LoadReport",
    "build_encoder",
    "build_network",
    "compare_states",
    "load_decoder",
    "load_encoder",
    "load_model",
    "network_of",
]


@dataclass
class LoadReport:
    """Which tensors of a file of weights were loaded.

    Attributes:
        loaded: tensors copied into the network.
        missing: the network's tensors that the file lacks.
        unexpected: the file's tensors that the network lacks.
        mismatched: tensors of another shape, as ``name: file shape, network's shape``.
        repeated: those loaded that were made for one channel, repeated for several and divided by their number.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        texts = [f"{len(self.loaded)} of {total} tensors loaded"]
        for name in ("missing", "unexpected", "mismatched", "repeated"):
            if keys := getattr(self, name):
                texts.append(f"{name} ({len(keys)}): {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}")
        return "; ".join(texts)


def compare_states(state: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> LoadReport:
    """Which tensors of a file's state dict fit those of a network's; ``loaded`` are those that can be loaded."""
    report = LoadReport(unexpected=sorted(set(state) - set(target)))
    for key, value in target.items():
        if key not in state:
            report.missing.append(key)
        elif state[key].shape != value.shape:
            report.mismatched.append(f"{key}: {tuple(state[key].shape)}, {tuple(value.shape)}")
        else:
            report.loaded.append(key)
    return report


# --- into a network -------------------------------------------------------------------------------------------------


def load_encoder(network: nn.Module, path: PathLike) -> LoadReport:
    """Load an encoder file into a network's encoder: all of its tensors, or none.

    Args:
        network: a network with ``.encoder``, or an encoder.
        path: an encoder file, the state dict of the network's class in its library, or one of the published layouts of
            :mod:`pgl_ext.weights.public`. Where it was trained on one channel and the network takes several,
            convolutions of the input are repeated and divided by the number of channels: of several that are alike, the
            encoder makes what it made of one.

    Returns:
        the report; what does not belong to an encoder, such as a decoder, is listed as unexpected.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, a tensor of the encoder is missing from it or has another shape, or it holds a
            larger encoder.
    """
    encoder = encoder_of(network)
    content = _load(path, "Encoder file", "the one that pre-training wrote, with --pretrained_encoder FILE")
    weights = read_public(content)
    prefix = encoder.key_prefix
    prefixed = {key.removeprefix(prefix): value for key, value in weights.state.items() if key.startswith(prefix)}
    target = _named_once(encoder, encoder.encoder_keys())
    state = _without_shortcut_bias(_first_names(encoder, prefixed or weights.state), target)
    repeated = _repeat_input(state, target, encoder.arguments["in_channels"])
    report = compare_states(state, target)
    report.repeated = repeated
    # A decoder is left out. More of what the encoder has as well, such as blocks of a stage, is a larger encoder.
    larger = any(key.startswith(tuple(f"{part}." for part in encoder.encoder_parts)) for key in report.unexpected)
    if report.missing or report.mismatched or larger:
        raise ValueError(f"{path} does not fit the encoder: {report}. {_remedy(path, weights, report)}")
    encoder.load_state_dict({key: state[key] for key in target}, strict=False)
    return report


def _repeat_input(state: dict[str, torch.Tensor], target: Mapping[str, torch.Tensor], channels: int) -> list[str]:
    """Repeat, in place, the weights of convolutions whose one channel the network has several of; their names."""
    names = []
    for key in set(state) & set(target):
        if state[key].shape[1:2] == (1,) and target[key].shape[1:2] == (channels,) != (1,):
            state[key] = state[key].repeat(1, channels, *[1] * (state[key].ndim - 2)) / channels
            names.append(key)
    return sorted(names)


def _remedy(path: PathLike, weights: PublicWeights, report: LoadReport) -> str:
    """What helps where a file does not fit an encoder."""
    if report.missing and all(".downsample." in key for key in report.missing):
        return (
            "Its shortcuts have no parameters (type A of ResNets), those here have (type B): choose a file of type B, "
            "such as MedicalNet's resnet_10 or resnet_50."
        )
    if weights.layout is not None and not Path(path).with_suffix(".json").is_file():
        with suppress(KeyError):  # not even that is whole
            return (
                f"Its names are those of {weights.layout.name}: build the encoder that its tensors are of, "
                f"{weights.architecture}."
            )
    return (
        f"Build the encoder with the architecture recorded in {Path(path).with_suffix('.json').name}, or choose the "
        "file that belongs to it."
    )


def load_decoder(network: nn.Module, path: PathLike) -> LoadReport:
    """Load whatever fits of a decoder file into a network's decoder.

    The last convolution, which was trained for another task's classes, is never loaded. A decoder of another layout,
    such as one without skips, fits in part.

    Args:
        network: the segmentation network, or a method that pre-trains a decoder.
        path: a decoder file, or one of a whole network, see :func:`load_encoder`.

    Returns:
        the report; what is missing or mismatched keeps its values.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or nothing of it fits.
    """
    content = _load(path, "Decoder file", "the one that pre-training wrote, with --pretrained_decoder FILE")
    named = network if isinstance(network, FeatureNetwork) else network.encoder
    aliases = named.aliases()
    target = {key: value for key, value in network.decoder_state().items() if key not in aliases}
    # Of a whole network, the encoder is another matter.
    encoder = set(named.encoder_keys()) - set(target)
    state = _first_names(named, read_public(content).state)
    report = compare_states({key: value for key, value in state.items() if key not in encoder}, target)
    # Counts of batches are single numbers, which fit everywhere.
    if all(key.endswith("num_batches_tracked") for key in report.loaded):
        raise ValueError(
            f"nothing of {path} fits the decoder: {report}. Give the pgl_decoder.pt of a method that pre-trains a "
            "decoder, and build the network with the same widths (of the paper's: aspp_channels, decoder_channels)."
        )
    for key in report.loaded:  # these are the network's own tensors
        target[key].copy_(state[key])
    return report


def load_model(
    network: nn.Module,
    path: PathLike | Sequence[PathLike],
    device: torch.device | str = "cpu",
    encoder_only: bool = False,
) -> nn.Module:
    """Load a file of weights into the network it belongs to, all of its tensors.

    Args:
        network: moved to the device, and returned in evaluation mode.
        path: model file, or encoder file where only the encoder is loaded, see :func:`load_encoder`; or several model
            files, of which the first is loaded into the network.
        device, encoder_only: what the network is moved to, and what is loaded.

    Returns:
        the network; of several files a ``ModuleList`` of it and of those that are recorded beside the others.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged or does not fit.
    """
    path, *others = ensure_tuple(path)
    if others:
        return nn.ModuleList([load_model(network, path, device), *(build_network(other, device) for other in others)])
    if encoder_only:
        load_encoder(network, path)
        return network.to(device).eval()
    state = _load(path, "Model file", "the one that fine-tuning wrote, with --model_path FILE")
    report = compare_states(state, network.state_dict())
    if report.missing or report.unexpected or report.mismatched:
        raise ValueError(
            f"{path} does not fit the network: {report}. Keep the JSON that was written with it beside it, or give the "
            "file that belongs to it."
        )
    network.load_state_dict(state)
    return network.to(device).eval()


def _named_once(network: FeatureNetwork, keys: Sequence[str]) -> dict[str, torch.Tensor]:
    """Tensors of some names, without the further names that a tensor has."""
    state, aliases = network.state_dict(), network.aliases()
    return {key: state[key] for key in keys if key not in aliases}


def _first_names(network: FeatureNetwork, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict whose tensors have the first of the names that the network has for them."""
    aliases = network.aliases()
    return {aliases.get(key, key): value for key, value in state.items()}


def _load(path: PathLike, kind: str, remedy: str) -> dict:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{kind} {Path(path).absolute()} does not exist: give {remedy}.")
    state = load_state(path)
    if isinstance(state.get("network"), Mapping):
        raise ValueError(
            f"{path} is a checkpoint, which holds all of a training, not weights alone: give {remedy}, or what 'pgl "
            f"export {path} OUT' writes of a checkpoint of pre-training."
        )
    return state


def _without_shortcut_bias(state: dict[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> dict:
    """Subtract the biases that MONAI's ResNet has in its shortcuts from the running means, which contain them."""
    for key in [key for key in state if key.endswith(".downsample.0.bias") and key not in target]:
        mean = key.removesuffix("0.bias") + "1.running_mean"
        if mean in state:
            state[mean] = state[mean] - state.pop(key)
    return state


# --- networks of files ----------------------------------------------------------------------------------------------


def build_encoder(path: PathLike | None = None, load: bool = True, **overrides: Any) -> nn.Module:
    """Build the encoder that an encoder file belongs to, and load the file.

    Args:
        path: encoder file, with the architecture in the JSON beside it; None, or without JSON: the default ResNet-50.
        load: whether to load the weights too. Without, the file need not exist.
        overrides: arguments of the encoder that replace the recorded ones.

    Raises:
        FileNotFoundError: the file does not exist, and its weights are to be loaded.
        ValueError: the weights do not fit the architecture, or the architecture is not known.
    """
    architecture = EncoderRecord.load_or_default(path).architecture
    encoder = build(ENCODERS, architecture, f"encoder file {path}", **overrides)
    if path is not None and load:
        load_encoder(encoder, path)
    return encoder


def build_network(path: PathLike, device: torch.device | str = "cpu") -> nn.Module:
    """Build the segmentation network that a model file belongs to, as recorded beside it, with its weights.

    Raises:
        FileNotFoundError: the file or its record is missing.
        ValueError: one is damaged, they do not fit, or the architecture is not known.
    """
    return load_model(network_of(ModelRecord.load(path), path), path, device)


def network_of(record: ModelRecord, source: PathLike = "a model") -> nn.Module:
    """Build the segmentation network of a record with random weights; errors name the source."""
    return build(NETWORKS, record.network, f"model file {source}")
