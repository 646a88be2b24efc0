"""Model cards: what somebody who downloads an encoder or a model must know, in the form of the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pgl_ext.files import write_text
from pgl_ext.metrics import METRICS
from pgl_ext.summary import AVERAGE
from pgl_ext.weights import load_state, read_description

__all__ = ["write_model_card"]

_TEMPLATES = Path(__file__).parent / "templates"
_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


def write_model_card(
    weights: str | os.PathLike,
    out: str | os.PathLike = "README.md",
    evaluation: str | os.PathLike | None = None,
    license: str = "apache-2.0",
) -> Path:
    """Write the model card of an encoder file or a model file, from the JSON beside it.

    Args:
        weights: encoder file of pre-training, or model file of fine-tuning.
        out: Markdown file to write; as the ``README.md`` of a repository on the Hub, it is the page that people see.
        evaluation: output folder of an evaluation: of the model, or of a model that was fine-tuned from the encoder.
        license: of the weights, as the Hub names it; what the data allow is for their owner to decide.

    Returns:
        the path written.

    Raises:
        FileNotFoundError: the weights, their JSON, or the report of the evaluation is missing.
        ValueError: a file is damaged, or the JSON describes neither an encoder nor a model.
    """
    weights = Path(weights)
    recorded = read_description(weights)
    if not recorded.keys() & {"architecture", "task"}:
        raise ValueError(
            f"{weights.with_suffix('.json')} describes neither an encoder nor a model: give a file that pre-training "
            "or fine-tuning wrote, with its JSON."
        )
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(cell=_cell, words=_words)
    is_model = "task" in recorded
    text = environment.get_template("model_card.md").render(
        header=_header(is_model, license),
        file=weights.name,
        is_model=is_model,
        recorded=recorded,
        parameters=_parameters(load_state(weights)),
        settings=_settings(recorded),
        scores=None if evaluation is None else _scores(Path(evaluation)),
        metrics=METRICS,
    )
    out = Path(out)
    write_text(out, text)
    return out


def _header(is_model: bool, license: str) -> str:
    tags = ["monai", "medical", "3d", "segmentation" if is_model else "self-supervised-learning"]
    entries = {
        "license": license,
        "library_name": "monai",
        "pipeline_tag": "image-segmentation" if is_model else "image-feature-extraction",
        "tags": tags,
    }
    return yaml.safe_dump(entries, sort_keys=False)


def _parameters(state: Mapping[str, torch.Tensor]) -> int:
    return sum(value.numel() for key, value in state.items() if not key.endswith(_STATISTICS))


def _settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """How it was trained: whatever is recorded that no other section of the card shows."""
    settings = {}
    for name in ("method", "pretrained_encoder", "pretrained_decoder"):
        if recorded.get(name):
            settings[name] = Path(recorded[name]).name  # where it lay is nobody's concern
    for name in ("steps", "pairs", "epoch", "view_size", "patch_size", "views", "optimizer", "lr", "seed"):
        if recorded.get(name) is not None:
            settings[name] = recorded[name]
    return {**settings, **recorded.get("data", {})}


def _scores(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no summary.json: finish 'run evaluating --output_dir {folder}' first.")
    summary = json.loads(path.read_text(encoding="utf-8"))
    return {"cases": summary["cases"], "rows": {**summary["organs"], AVERAGE: summary[AVERAGE]}}


def _cell(score: Mapping[str, Any], metric: str) -> str:
    """Mean and, where there is one, confidence interval."""
    if score["mean"] is None:
        return "n/a"
    digits = 1 if metric.endswith("_mm") else 3
    interval = "" if score["ci95"] is None else " ({:.{d}f} to {:.{d}f})".format(*score["ci95"], d=digits)
    return f"{score['mean']:.{digits}f}{interval}"


def _words(value: Any) -> str:
    """A recorded value in one cell of a table."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_words(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return str(value)
