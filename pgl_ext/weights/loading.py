"""Loading weights with a report of every tensor, and building the network that a file belongs to."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.config import PathLike
from monai.utils import ensure_tuple
from torch import nn

from pgl_ext.networks.base import FeatureNetwork, SegmentationNetwork
from pgl_ext.networks.build import ENCODERS, NETWORKS, build
from pgl_ext.weights.files import load_state
from pgl_ext.weights.records import EncoderRecord, InputRecord, ModelRecord

__all__ = [
    "LoadReport",
    "build_encoder",
    "build_network",
    "compare_states",
    "load_decoder",
    "load_encoder",
    "load_model",
    "load_pretrained",
    "network_of",
]

logger = logging.getLogger(__name__)


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
        path: an encoder file, or the state dict of the network's class in its library, also wrapped as
            ``{"state_dict": {"module.*": ...}}`` (MedicalNet). Where it was trained on one channel and the network
            takes several, convolutions of the input are repeated and divided by the number of channels: of several that
            are alike, the encoder makes what it made of one.

    Returns:
        the report; what does not belong to an encoder, such as a decoder, is listed as unexpected.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, a tensor of the encoder is missing from it or has another shape, or it holds a
            larger encoder.
    """
    encoder = getattr(network, "encoder", network)
    state = _load(path, "Encoder file", "the one that pre-training wrote, with --pretrained_encoder FILE")
    state = state.get("state_dict") or state
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    prefix = encoder.key_prefix
    prefixed = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    target = _named_once(encoder, encoder.encoder_keys())
    state = _without_shortcut_bias(_first_names(encoder, prefixed or state), target)
    repeated = _repeat_input(state, target, encoder.arguments["in_channels"])
    report = compare_states(state, target)
    report.repeated = repeated
    # A decoder is left out. More of what the encoder has as well, such as blocks of a stage, is a larger encoder.
    larger = any(key.split(".")[0] in encoder.encoder_parts for key in report.unexpected)
    if report.missing or report.mismatched or larger:
        raise ValueError(
            f"{path} does not fit the encoder: {report}. Build the encoder with the architecture recorded in "
            f"{Path(path).with_suffix('.json').name}, or choose the file that belongs to it."
        )
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


def load_decoder(network: SegmentationNetwork, path: PathLike) -> LoadReport:
    """Load whatever fits of a decoder file into a network's decoder.

    The last convolution, which was trained for another task's classes, is never loaded. A decoder of another layout,
    such as one without skips, fits in part.

    Args:
        network: the segmentation network.
        path: a decoder file.

    Returns:
        the report; what is missing or mismatched keeps its values.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or nothing of it fits.
    """
    state = _load(path, "Decoder file", "the one that pre-training wrote, with --pretrained_decoder FILE")
    state = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    target = _named_once(network, network.decoder_keys())
    report = compare_states(_first_names(network, state), target)
    # Counts of batches are single numbers, which fit everywhere.
    if all(key.endswith("num_batches_tracked") for key in report.loaded):
        raise ValueError(
            f"nothing of {path} fits the decoder: {report}. Give the pgl_decoder.pt of a method that pre-trains a "
            "decoder, and build the network with the same widths (of the paper's: aspp_channels, decoder_channels)."
        )
    network.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
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


# --- to fine-tune from ----------------------------------------------------------------------------------------------


def load_pretrained(
    network: nn.Module, encoder: PathLike | None = None, decoder: PathLike | None = None, input: Mapping | None = None
) -> nn.Module:
    """Load what a segmentation network is to start from, and warn where its input was prepared otherwise.

    Args:
        network: the segmentation network.
        encoder: see :func:`load_encoder`; None: random initialisation.
        decoder: see :func:`load_decoder`; None: random initialisation.
        input: how volumes are prepared here, arguments of :class:`~pgl_ext.weights.InputRecord`.

    Returns:
        the same network. Of whatever is loaded into it later, as by MONAI Label or federated learning, it logs how many
        tensors were, and raises ``ValueError`` where some of the encoder's were not.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged, the encoder does not fit, or nothing of the decoder does; or it was trained on more
            than one channel, and on another number of them, or on these in another order.
    """
    if encoder is None:
        logger.info("no pretrained_encoder: random initialisation")
    for path, load in ((encoder, load_encoder), (decoder, load_decoder)):
        if path is None:
            continue
        here = InputRecord(**(input or {}))
        differences = _input_differences(path, here)
        logger.info("%s: %s", path, load(network, path))
        for difference in differences:
            logger.warning("%s was pre-trained on other input: %s", path, difference)
    network.register_load_state_dict_pre_hook(_check_loading)
    return network


def _input_differences(path: PathLike, here: InputRecord) -> list[str]:
    """What is said of a file's input that differs from the input here, or that nothing is said."""
    if not Path(path).with_suffix(".json").is_file():
        return ["there is no JSON beside it, so that its normalisation and spacing are not known"]
    recorded = InputRecord.load(path)
    if recorded is None:
        return ["the JSON beside it says nothing of its normalisation and spacing"]
    recorded.check_channels(here.channel_names, path)
    return recorded.differences(here)


def _check_loading(network: nn.Module, state: Mapping[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Report what is loaded: with ``strict=False``, as MONAI Label loads, PyTorch says nothing of what is not."""
    # It has a prefix where the network is part of a module, such as the average of its weights.
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    report = compare_states(state, network.state_dict())
    encoder_keys = set(network.encoder_keys())
    lacking = [key for key in report.missing if key in encoder_keys]
    if lacking:
        raise ValueError(
            f"the weights do not fit the network, {len(lacking)} tensors of its encoder are not among them: {report}. "
            "Give an encoder file of pre-training, or a model file of fine-tuning."
        )
    logger.info("loading weights, all %d tensors of the encoder: %s", len(encoder_keys), report)


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
