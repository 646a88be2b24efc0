"""Segmentation models: starting from pre-trained weights, and model files with the JSON that says how to use them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgl_ext.flags import as_bool
from pgl_ext.networks.segmentation import SegmentationNet
from pgl_ext.weights import compare_states, load_decoder, load_encoder, load_state, read_description

__all__ = ["build_network", "load_model", "recorded_model", "start_network"]

logger = logging.getLogger(__name__)

# The bundle's default task: BCV, the multi-organ task of the paper.
_DEFAULT = {
    "task": {
        "organs": {
            "spleen": [1],
            "right kidney": [2],
            "left kidney": [3],
            "gallbladder": [4],
            "esophagus": [5],
            "liver": [6],
            "stomach": [7],
            "aorta": [8],
            "inferior vena cava": [9],
            "portal and splenic veins": [10],
            "pancreas": [11],
            "right adrenal gland": [12],
            "left adrenal gland": [13],
        },
        "background_values": [0],
        "multi_label": False,
    },
    "network": {"in_channels": 1, "out_channels": 14},
    "hu_window": [-1024, 325],
    "spacing": None,
    "patch_size": [192, 192, 48],
    "annotated_key": None,
}


def start_network(
    network: nn.Module,
    device: torch.device | str,
    pretrained_encoder: str | os.PathLike | None = None,
    pretrained_decoder: str | os.PathLike | None = None,
    hu_window: Sequence[float] | None = None,
    spacing: Sequence[float] | None = None,
    channels_last: bool = False,
    sync_batch_norm: bool = False,
) -> nn.Module:
    """Make a segmentation network ready for fine-tuning, in place.

    Args:
        network: has ``.encoder``, and ``.aspp`` and ``.decoder`` where a decoder is loaded.
        device: where to train.
        pretrained_encoder: an encoder file of pre-training, or the state dict of a stock MONAI or MedicalNet ResNet;
            None: random initialisation.
        pretrained_decoder: a decoder file of pre-training, of which everything but the last convolution is loaded that
            fits; None: random initialisation.
        hu_window: range in HU that this task clips to; None: not clipped.
        spacing: that this task resamples to, in mm; None: as stored.
        channels_last: memory layout ``channels_last_3d``, which tensor cores like.
        sync_batch_norm: batch-norm statistics over all processes.

    Returns:
        the same network. Of whatever is loaded into it later, as by MONAI Label or federated learning, it logs how many
        tensors were, and raises ``ValueError`` where some of the encoder's were not.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where one is damaged, the encoder does not fit, or nothing of the decoder does; the message lists
            missing, unexpected and mismatched tensors.
    """
    if pretrained_encoder is None:
        logger.info("no pretrained_encoder: random initialisation")
    for path, load in ((pretrained_encoder, load_encoder), (pretrained_decoder, load_decoder)):
        if path is not None:
            logger.info("%s: %s", path, load(network, path))
            for difference in _input_differences(path, hu_window, spacing):
                logger.warning("%s was pre-trained on other input: %s", path, difference)
    if as_bool(sync_batch_norm, "sync_batch_norm"):
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(device)
    if as_bool(channels_last, "channels_last"):
        network.to(memory_format=torch.channels_last_3d)
    network.register_load_state_dict_pre_hook(_check_loading)
    return network


def _check_loading(network: nn.Module, state: Mapping[str, torch.Tensor], *_: Any) -> None:
    """Report what is loaded: with ``strict=False``, as MONAI Label loads, PyTorch says nothing of what is not."""
    report = compare_states(state, network.state_dict())
    lacking = [key for key in report.missing if key.startswith("encoder.")]
    if lacking:
        raise ValueError(
            f"the weights do not fit the network, {len(lacking)} tensors of its encoder are not among them: {report}. "
            "Give an encoder file of pre-training (keys 'encoder.*'), or a model file of fine-tuning."
        )
    encoder = sum(key.startswith("encoder.") for key in report.loaded)
    logger.info("loading weights, all %d tensors of the encoder: %s", encoder, report)


def _input_differences(
    path: str | os.PathLike, hu_window: Sequence[float] | None, spacing: Sequence[float] | None
) -> list[str]:
    """What the JSON beside an encoder or decoder file says of its input that differs from the task's."""
    if not Path(path).with_suffix(".json").is_file():
        return ["there is no JSON beside it, so that its normalisation and spacing are not known"]
    description = read_description(path)
    differences = []
    recorded = description.get("normalization", {}).get("clip_hu")
    if _as_list(recorded) != _as_list(hu_window):
        differences.append(f"clipped to {recorded} HU, here {_as_list(hu_window)} (--hu_window)")
    recorded = description.get("spacing")
    if _as_list(recorded) != _as_list(spacing):
        differences.append(f"spacing {recorded or 'as stored'}, here {_as_list(spacing) or 'as stored'} mm (--spacing)")
    return differences


def _as_list(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def recorded_model(path: str | os.PathLike) -> dict[str, Any]:
    """How a model is built, what it segments and how its input is prepared, from the JSON beside its file.

    Args:
        path: model file (``.pt``); neither it nor the JSON need exist.

    Returns:
        ``task`` and ``network``: arguments of ``SegmentationTask`` and ``SegmentationNet``; ``hu_window`` in HU or
        None, ``spacing`` in mm or None, ``patch_size`` in voxels, and ``annotated_key``, the field of its data list
        that says which organs were annotated, or None. Without a JSON those of the bundle's default task.
    """
    if not Path(path).with_suffix(".json").is_file():
        return dict(_DEFAULT)
    description = read_description(path)
    missing = sorted({"task", "network", "normalization", "patch_size"} - set(description))
    if missing:
        raise ValueError(
            f"{Path(path).with_suffix('.json')} does not describe a segmentation model, it lacks {missing}: give the "
            "models/model.pt that fine-tuning wrote, with its JSON beside it."
        )
    return {
        "task": description["task"],
        "network": description["network"],
        "hu_window": description["normalization"].get("clip_hu"),
        "spacing": description.get("spacing"),
        "patch_size": description["patch_size"],
        "annotated_key": description.get("annotated_key"),
    }


def build_network(path: str | os.PathLike) -> SegmentationNet:
    """Build the network that a model file belongs to, with random weights; the file need not exist.

    Raises:
        ValueError: the recorded architecture has arguments that are not known.
    """
    arguments: Mapping[str, Any] = recorded_model(path)["network"]
    try:
        return SegmentationNet(**arguments)
    except TypeError as error:
        raise ValueError(
            f"The architecture {dict(arguments)} of model file {path} is not one of SegmentationNet: {error}. Install "
            "the version of pgl_ext that wrote the file."
        ) from error


def load_model(network: nn.Module, path: str | os.PathLike, device: torch.device | str = "cpu") -> nn.Module:
    """Load a model file into a network, all of its tensors, and move the network to a device.

    Args:
        network: the network.
        path: model file (``.pt``), a state dict.
        device: where the network goes.

    Returns:
        the same network, in evaluation mode.

    Raises:
        FileNotFoundError: where the file is missing.
        ValueError: where it is damaged or does not fit.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"Model file {Path(path).absolute()} does not exist: give the one that fine-tuning wrote, with "
            "--model_path FILE."
        )
    state = load_state(path)
    report = compare_states(state, network.state_dict())
    if report.missing or report.unexpected or report.mismatched:
        raise ValueError(
            f"{path} does not fit the network: {report}. Keep the JSON that was written with it beside it, or give the "
            "file that belongs to it."
        )
    network.load_state_dict(state)
    return network.to(device).eval()
