"""Records of small encoders and networks, as pre-training and fine-tuning write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgl_ext.networks.base import FeatureNetwork, SegmentationNetwork
from pgl_ext.networks.build import NETWORKS
from pgl_ext.task import SegmentationTask
from pgl_ext.weights import EncoderRecord, InputRecord, ModelRecord

# Arguments of a small network of every family.
SMALL = {
    "resnet": {
        "encoder": {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 0.0625},
        "aspp_channels": 8,
        "decoder_channels": [8, 6, 4],
    },
    "dynunet": {"filters": [4, 6, 8], "strides": [1, 2, [2, 2, 1]]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1, 2], "blocks_up": [1, 1]},
    "segresnet_ds": {"init_filters": 8, "blocks_down": [1, 1, 1, 1]},
    "unet": {"channels": [4, 6, 8], "strides": [2, [2, 2, 1]]},
    "swinunetr": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
    "mednext": {"init_filters": 4, "blocks_down": [1, 1], "blocks_bottleneck": 1, "blocks_up": [1, 1]},
    "resenc": {"features_per_stage": [4, 6, 8], "strides": [1, 2, [2, 2, 1]], "n_blocks_per_stage": [1, 1, 2]},
}
# Families whose classes TorchScript cannot compile.
TRACED = ("swinunetr", "mednext")


def small_network(family: str, in_channels: int = 1, out_channels: int = 3, **arguments: Any) -> SegmentationNetwork:
    """A network of a family with the weights of a seed."""
    torch.manual_seed(3)
    return NETWORKS[family](in_channels, out_channels, **{**SMALL[family], **arguments})


def input_record(**entries: Any) -> InputRecord:
    """Scans clipped to the paper's window, at their own spacing."""
    return InputRecord(**{"hu_window": [-1024, 325], "patch_size": [32, 32, 16], **entries})


def encoder_record(encoder: FeatureNetwork, **entries: Any) -> EncoderRecord:
    """What pre-training would record of an encoder."""
    known = {
        "architecture": encoder.architecture,
        "stride": list(encoder.level_strides[-1]),
        "channels": list(encoder.level_channels),
    }
    return EncoderRecord(**{**known, "input": input_record(), "method": "PGL", "steps": 12, **entries})


def model_record(network: nn.Module, task: SegmentationTask, **entries: Any) -> ModelRecord:
    """What fine-tuning would record of a segmentation network."""
    known = {"task": task.description(), "network": network.architecture, "input": input_record()}
    return ModelRecord(**{**known, **entries})


def checkpoint_content(network: nn.Module, record: EncoderRecord, step: int = 12) -> dict[str, Any]:
    """What of a training checkpoint exports read."""
    return {"network": network.state_dict(), "description": record.to_json(), "step": step}


def as_trained(network: nn.Module) -> nn.Module:
    """The same network with random values everywhere, so that no tensor has its initial ones."""
    for value in network.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else torch.tensor(12))
    return network


def edit_json(path: Path, **entries: Any) -> None:
    """Change entries of the JSON beside a file of weights."""
    path = Path(path).with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
