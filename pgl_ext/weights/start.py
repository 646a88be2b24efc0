"""Weights that a training starts from: loaded with a report, and compared in how their input was prepared."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import PathLike
from torch import nn

from pgl_ext.networks.build import NETWORKS
from pgl_ext.weights.files import load_state
from pgl_ext.weights.loading import compare_states, load_decoder, load_encoder
from pgl_ext.weights.public import read_public
from pgl_ext.weights.records import EncoderRecord, InputRecord

__all__ = ["decoder_file", "load_pretrained", "recorded_architecture", "recorded_input", "start_method"]

logger = logging.getLogger(__name__)


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
        if path is not None:
            _check_channels(path, input)
            logger.info("%s: %s", path, load(network, path))
    for path in dict.fromkeys(path for path in (encoder, decoder) if path is not None):
        _warn_of_other_input(path, input)
    network.register_load_state_dict_pre_hook(_check_loading)
    return network


def start_method(method: nn.Module, pretrained: PathLike | None = None, input: Mapping | None = None) -> nn.Module:
    """Load what pre-training is to go on from, and warn where its input was prepared otherwise.

    Target networks become copies of the online ones again.

    Args:
        method: the self-supervised method.
        pretrained: see :func:`load_encoder`; a decoder in it or beside it is loaded too, where the method has one and
            as far as it fits. None: random initialisation.
        input: see :func:`load_pretrained`.

    Returns:
        the same method.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or the encoder does not fit.
    """
    if pretrained is None:
        return method
    _check_channels(pretrained, input)
    logger.info("%s: %s", pretrained, load_encoder(method, pretrained))
    decoder = decoder_file(pretrained)
    if decoder is not None and method.decoder_state():
        try:
            logger.info("%s, decoder: %s", decoder, load_decoder(method, decoder))
        except ValueError as error:
            logger.warning("the decoder starts from random weights: %s", error)
    _warn_of_other_input(pretrained, input)
    for online, target in method.momentum_pairs():
        target.load_state_dict(online.state_dict())
    return method


def _check_channels(path: PathLike, input: Mapping | None) -> None:
    if Path(path).with_suffix(".json").is_file() and (recorded := InputRecord.load(path)) is not None:
        recorded.check_channels(InputRecord(**(input or {})).channel_names, path)


def _warn_of_other_input(path: PathLike, input: Mapping | None) -> None:
    recorded = recorded_input(path)
    if recorded is not None:
        differences = recorded.differences(InputRecord(**(input or {})))
    elif Path(path).with_suffix(".json").is_file():
        differences = ["the JSON beside it says nothing of its normalisation and spacing"]
    else:
        differences = ["there is no JSON beside it, so that its normalisation and spacing are not known"]
    for difference in differences:
        logger.warning("%s was pre-trained on other input: %s", path, difference)


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


def recorded_input(path: PathLike) -> InputRecord | None:
    """How volumes were prepared for weights, by the JSON beside them or by a published file itself; None: not said."""
    if Path(path).with_suffix(".json").is_file():
        return InputRecord.load(path)
    return read_public(load_state(path)).input


def recorded_architecture(path: PathLike) -> Mapping[str, Any]:
    """Family and arguments of an encoder file's network, by the JSON beside it or by the tensors of a published file.

    Raises:
        FileNotFoundError: there is no JSON, and the layout is none that is known.
    """
    if not Path(path).with_suffix(".json").is_file() and (found := read_public(load_state(path)).architecture):
        return found
    return EncoderRecord.load(path).architecture


def decoder_file(path: PathLike) -> Path | None:
    """The file that has the decoder for an encoder file: that beside it, or itself; None where there is none."""
    path = Path(path)
    beside = path.with_name("pgl_decoder.pt")
    if path.name == "pgl_encoder.pt" and beside.is_file():
        return beside
    weights = read_public(load_state(path))
    if weights.layout is None:
        return None
    parts = tuple(f"{part}." for part in NETWORKS[weights.layout.family].decoder_parts)
    return path if any(key.startswith(parts) for key in weights.state) else None
