"""The ``train.json`` of a bundle for one task, and the model that its training would start from.

Programs that take a bundle as it is, such as MONAI Label, read ``train.json`` and no overlays, and need a model file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from pgl_ext.files import read_json
from pgl_ext.networks.base import FeatureNetwork, SegmentationNetwork
from pgl_ext.networks.build import ENCODERS, NETWORKS, build
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.bundles import bundle_folder, config_path
from pgl_ext.tools.study.configs import merged_config
from pgl_ext.weights import InputRecord, ModelRecord, load_encoder, recorded_architecture, recorded_input, save_weights

__all__ = ["task_config", "write_initial_model"]

# Entries of train.json that are arguments of the task, and of the input's record.
_TASK = ("organs", "background_values", "multi_label", "ignore_label")
_INPUT = ("hu_window", "spacing", "patch_size", "channel_names")
# Arguments of networks that are entries of train.json; the last two of the paper's network alone.
_OF_THE_DATA = {"in_channels": "$len(@channel_names)", "out_channels": "$@task.out_channels"}
_OF_THE_PAPER = {"encoder": "@encoder", "dropout": "@dropout"}


def task_config(
    configs: str | os.PathLike,
    overlays: Sequence[str] = (),
    model: str | os.PathLike | None = None,
    encoder: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """``train.json`` of pgl_segmentation with overlays in it, and such that weights fit its network.

    What is recorded beside a model overrides the overlays: task, preprocessing and network are then those of the model.
    The network of the overlays is kept where it takes the encoder file; if not, family and layout are the file's.

    Args:
        configs: folder of ``train.json`` and of the overlays.
        overlays: names of overlays in that folder, such as ``tasks/openkbp.yaml``, or paths of others.
        model: model file of fine-tuning, its JSON beside it.
        encoder: encoder file of pre-training, its JSON beside it, or a published one.

    Returns:
        the config, not evaluated.

    Raises:
        FileNotFoundError: an overlay or a JSON does not exist.
        ValueError: model and encoder are of different layouts, a file does not describe what it should, or there is no
            segmentation network for the encoder.
    """
    default = merged_config([config_path("train.json", configs)]).get()["network_def"]
    config = merged_config([config_path(name, configs) for name in ("train.json", *overlays)]).get()
    of_file = None
    if encoder is not None:
        of_file = _without_memory(ENCODERS, recorded_architecture(encoder), encoder)
        if (recorded := recorded_input(encoder)) is not None:
            config["channel_names"] = recorded.channel_names
    if model is not None:
        record = ModelRecord.load(model)
        network = _without_memory(NETWORKS, record.network, model)
        if of_file is not None and _layout(network.feature_network) != _layout(of_file):
            raise ValueError(
                f"{encoder} does not fit {model}: the one is an encoder of {of_file.architecture}, the other has one "
                f"of {network.feature_network.architecture}. Package them one by one, or choose those that belong "
                "together."
            )
        config |= {**record.task, **{name: getattr(record.input, name) for name in _INPUT}}
        _use(config, network)
    elif of_file is not None and not _takes(config, of_file):
        _use_encoder(config, of_file, default, encoder)
    return config


def write_initial_model(
    config: Mapping[str, Any], path: str | os.PathLike, encoder: str | os.PathLike | None = None
) -> None:
    """Write the network that training with a config would start from as a model file, its JSON beside it.

    Args:
        config: from :func:`task_config`.
        path: file to write, ending in ``.pt``.
        encoder: encoder file whose weights the network has; everything else is random, the same each time.

    Raises:
        ValueError: the network is of no family that records know, or the encoder does not fit.
    """
    config = _with_organs(config)
    task = SegmentationTask(**{name: config[name] for name in _TASK})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _network(config)
    if type(network) not in NETWORKS.values():
        raise ValueError(
            f"network_def is a {type(network).__name__}, which the JSON beside a model can not describe: choose one of "
            f"{', '.join(kind.__name__ for kind in NETWORKS.values())}, as the overlays in configs/networks do."
        )
    if encoder is not None:
        load_encoder(network, encoder)
    record = ModelRecord(
        task=task.description(),
        network=network.architecture,
        input=InputRecord(**{name: config[name] for name in _INPUT}),
        pretrained_encoder=None if encoder is None else Path(encoder).name,
    )
    save_weights(network.state_dict(), path, record)


def _without_memory(classes: Mapping[str, type[FeatureNetwork]], architecture: Mapping, source: Any) -> FeatureNetwork:
    """A network without values, to look at its layout."""
    with torch.device("meta"):
        return build(classes, architecture, source)


def _with_organs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a task; where it leaves the organs to the data, that of the bundle's metadata."""
    if config["organs"] is not None:
        return dict(config)
    metadata = read_json(bundle_folder("pgl_segmentation") / "configs" / "metadata.json")
    return {**config, **SegmentationTask.of_channels(metadata).description()}


def _network(config: Mapping[str, Any]) -> torch.nn.Module:
    """The network of a config."""
    try:
        return ConfigParser(deepcopy(_with_organs(config))).get_parsed_content("network_def")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"network_def, {config['network_def']}, can not be built: {error.__cause__ or error}. After small.yaml "
            "the overlay of a network is followed by that of the same name with _small."
        ) from error


def _layout(encoder: FeatureNetwork) -> tuple:
    """What two encoders that take the same file, and make the same of it, have in common."""
    state = encoder.state_dict()
    return {key: tuple(state[key].shape) for key in encoder.encoder_keys()}, list(map(tuple, encoder.level_strides))


def _takes(config: Mapping[str, Any], encoder: FeatureNetwork) -> bool:
    """Whether the network of a config has such an encoder."""
    try:
        with torch.device("meta"):
            network = _network(config)
    except ValueError:
        return False
    return isinstance(network, SegmentationNetwork) and _layout(network.feature_network) == _layout(encoder)


def _use_encoder(config: dict[str, Any], encoder: FeatureNetwork, default: Mapping[str, Any], source: Any) -> None:
    """Make the network of a config one that has an encoder."""
    family = NETWORKS[encoder.family]
    if isinstance(encoder, family):
        _use(config, encoder)
        return
    config["encoder"] = _without_channels(encoder.arguments)
    if config["network_def"].get("_target_") != default["_target_"]:
        config["network_def"] = dict(default)
    with torch.device("meta"):
        try:
            _network(config)
        except ValueError as error:
            raise ValueError(f"{source} can not be packaged with a segmentation network: {error}") from error


def _use(config: dict[str, Any], network: SegmentationNetwork) -> None:
    """Make a network that of a config, with the outputs of the config's task."""
    arguments = {**network.arguments, **_OF_THE_DATA}
    if network.feature_network is not network:
        config["encoder"] = _without_channels(arguments["encoder"])
        arguments |= _OF_THE_PAPER
    config["network_def"] = {"_target_": f"pgl_ext.networks.{type(network).__name__}", **arguments}


def _without_channels(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an encoder but for its channels, which the network gives it."""
    return {name: value for name, value in arguments.items() if name != "in_channels"}
