"""Records of small encoders and networks, as pre-training and fine-tuning write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgl_ext.task import SegmentationTask
from pgl_ext.weights import EncoderRecord, InputRecord, ModelRecord


def input_record(**entries: Any) -> InputRecord:
    """Scans clipped to the paper's window, at their own spacing."""
    return InputRecord(**{"hu_window": [-1024, 325], "patch_size": [32, 32, 16], **entries})


def encoder_record(encoder: nn.Module, **entries: Any) -> EncoderRecord:
    """What pre-training would record of an encoder."""
    known = {"architecture": encoder.architecture, "stride": list(encoder.stride), "channels": list(encoder.channels)}
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
