"""The ``train.json`` of a bundle for one task, and the model that its training would start from.

Programs that take a bundle as it is, such as MONAI Label, read ``train.json`` and no overlays, and need a model file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pgl_ext.networks.segmentation import SegmentationNet
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.study.configs import config_path, merged_config
from pgl_ext.weights import EncoderRecord, InputRecord, ModelRecord, load_encoder, save_weights

__all__ = ["task_config", "write_initial_model"]

# Entries of train.json that are arguments of the task, of the input's record, and of the network.
_TASK = ("organs", "background_values", "multi_label")
_INPUT = ("hu_window", "spacing", "patch_size")
_NETWORK = ("in_channels", "aspp_channels", "decoder_channels")


def task_config(
    configs: str | os.PathLike,
    overlays: Sequence[str] = (),
    model: str | os.PathLike | None = None,
    encoder: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """``train.json`` of pgl_segmentation with overlays in it, and such that weights fit its network.

    What is recorded beside a model overrides the overlays: task, preprocessing and network are then those of the model.
    The encoder's layout is that of the encoder file.

    Args:
        configs: folder of ``train.json`` and of the overlays.
        overlays: names of overlays in that folder, such as ``tasks/openkbp.yaml``, or paths of others.
        model: model file of fine-tuning, its JSON beside it.
        encoder: encoder file of pre-training, its JSON beside it.

    Returns:
        the config, not evaluated.

    Raises:
        FileNotFoundError: an overlay or a JSON does not exist.
        ValueError: model and encoder are of different layouts, or a file does not describe what it should.
    """
    config = merged_config([config_path(name, configs) for name in ("train.json", *overlays)]).get()
    if encoder is not None:
        config["encoder"] = EncoderRecord.load(encoder).architecture["arguments"]
    if model is not None:
        record = ModelRecord.load(model)
        network = record.network["arguments"]
        if encoder is not None and network["encoder"] != config["encoder"]:
            raise ValueError(
                f"{encoder} does not fit {model}: the one is an encoder of {config['encoder']}, the other has one of "
                f"{network['encoder']}. Package them one by one, or choose those that belong together."
            )
        config |= {**record.task, **{name: getattr(record.input, name) for name in _INPUT}}
        config["encoder"] = network["encoder"]
        config["network_def"] |= {name: network[name] for name in _NETWORK}
    return config


def write_initial_model(
    config: Mapping[str, Any], path: str | os.PathLike, encoder: str | os.PathLike | None = None
) -> None:
    """Write the network that training with a config would start from as a model file, its JSON beside it.

    Args:
        config: from :func:`task_config`.
        path: file to write, ending in ``.pt``.
        encoder: encoder file whose weights the network has; everything else is random, the same each time.
    """
    task = SegmentationTask(**{name: config[name] for name in _TASK})
    arguments = {name: config["network_def"][name] for name in _NETWORK}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SegmentationNet(out_channels=task.out_channels, encoder=config["encoder"], **arguments)
    if encoder is not None:
        load_encoder(network, encoder)
    record = ModelRecord(
        task=task.description(),
        network=network.architecture,
        input=InputRecord(channels=arguments["in_channels"], **{name: config[name] for name in _INPUT}),
        pretrained_encoder=None if encoder is None else Path(encoder).name,
    )
    save_weights(network.state_dict(), path, record)
