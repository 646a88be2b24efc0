"""A cell of a study, the smallest part that is run by itself: its commands, and what it leaves in its folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgl_ext.checkpoints import CheckpointFolder
from pgl_ext.files import write_text
from pgl_ext.tools.study.configs import Layer
from pgl_ext.evaluation.summary import AVERAGE
from pgl_ext.weights import read_description

__all__ = ["Cell", "Stage", "bundle_command", "labels_text"]


@dataclass(frozen=True)
class Stage:
    """One command of a bundle.

    Args:
        section: of the config that is run, such as ``training``.
        layers: config files and settings that override those before, in their order; the last are settings.
    """

    section: str
    layers: tuple[Layer, ...]

    def with_settings(self, **settings: Any) -> Stage:
        """The same command with further settings."""
        *others, last = self.layers
        return Stage(self.section, (*others, {**last, **settings}))

    def files(self, folder: Path) -> list[tuple[str, Layer]]:
        """The layers as files; settings have theirs in a folder, written by :meth:`Cell.start`."""
        return [
            (layer if isinstance(layer, str) else str(folder / f"{self.section}_{number}.json"), layer)
            for number, layer in enumerate(self.layers)
        ]


@dataclass(frozen=True, eq=False)
class Cell:
    """A pre-training, or a fine-tuning with its evaluation.

    In its folder lie ``started.json`` (fingerprint, and when it was run), ``cell.json`` (its results, written last: the
    mark of a finished cell), ``log.txt``, the settings of its commands, and what these write.

    Args:
        folder: of the cell.
        name: its path within the study's folder.
        method: name of the method.
        seed: of the cell.
        stages: its commands in their order.
        labels: number (int) or fraction (float) of labelled cases; None of a pre-training.
        lr: learning rate of the pre-training that was chosen among several; None where there was no choice.
        pretraining: whose encoder it starts from, if any.
    """

    folder: Path
    name: str
    method: str
    seed: int
    stages: tuple[Stage, ...]
    labels: float | None = None
    lr: float | None = None
    pretraining: Cell | None = None

    def __str__(self) -> str:
        what = "pre-training" if self.labels is None else labels_text(self.labels)
        rate = "" if self.lr is None else f", learning rate {self.lr:g}"
        return f"{self.method}{rate}, {what}, seed {self.seed}"

    @property
    def is_pretraining(self) -> bool:
        return self.labels is None

    @property
    def is_finished(self) -> bool:
        return (self.folder / "cell.json").is_file()

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def result(self) -> dict[str, Any]:
        """What a finished cell noted: its cost, steps and mean scores."""
        return json.loads((self.folder / "cell.json").read_text(encoding="utf-8"))

    def fingerprint(self) -> dict[str, Any] | None:
        """That of the code, settings and data that the cell was started with; None if it was not."""
        return self._record().get("fingerprint")

    def lock(self) -> int | None:
        """Claim the cell for this process and those that inherit the descriptor.

        Returns:
            Descriptor to close in the end; None while another study, or a process that one left behind, has the cell.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def start(self, fingerprint: Mapping[str, Any], cores: float) -> None:
        """Note that the cell is being run, and write the settings of its commands.

        Args:
            fingerprint: of code and settings.
            cores: CPU cores, or GPUs, that the cell has for itself; a share of a GPU where cells share it.
        """
        runs = [*self._runs(), [time.time(), None, cores]]
        _write_json(self.folder / "started.json", {"fingerprint": fingerprint, "runs": runs})
        for stage in self.stages:
            for path, layer in stage.files(self.folder):
                if not isinstance(layer, str):
                    _write_json(Path(path), layer)

    def has_done(self, stage: Stage) -> bool:
        """Whether an evaluation is complete. A training finds by itself that nothing is left to do."""
        return stage.section == "evaluating" and (self.folder / "evaluation" / "cases.csv").is_file()

    def finish(self, unit: str) -> None:
        """Note the results, which marks the cell as finished, and remove its checkpoints.

        Args:
            unit: of its cost, such as ``CPU-core-hours``.

        Raises:
            OSError: a file that the commands should have written is not there.
        """
        runs = self._runs()
        seconds = sum(end - start for start, end, _ in runs)
        core_seconds = sum((end - start) * cores for start, end, cores in runs)
        cost = {"seconds": round(seconds, 1), "cost": round(core_seconds / 3600, 4), "unit": unit}
        result = _pretraining_result(self.folder) if self.is_pretraining else _fine_tuning_result(self.folder)
        _write_json(self.folder / "cell.json", {**result, **cost})
        # Only an unfinished cell needs them, and they are large.
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def _record(self) -> dict[str, Any]:
        path = self.folder / "started.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _runs(self) -> list[list[float]]:
        """Start, end and cores of every time that the cell was run, also of those that ended by being killed."""
        last_sign = self.log.stat().st_mtime if self.log.is_file() else 0.0
        runs = self._record().get("runs", [])
        return [[start, max(start, last_sign) if end is None else end, cores] for start, end, cores in runs]


def labels_text(labels: float) -> str:
    """A number (int) or fraction (float) of labelled cases in words."""
    return f"{labels} labelled cases" if isinstance(labels, int) else f"{100 * labels:g} % of the labels"


def bundle_command(cell: Cell, stage: Stage) -> list[str]:
    """The command line of a stage; a training that was interrupted goes on from its checkpoint."""
    files = [path for path, _ in stage.files(cell.folder)]
    command = [sys.executable, "-m", "monai.bundle", "run", stage.section, "--config_file", str(files)]
    interrupted = stage.section == "training" and CheckpointFolder(cell.folder / "checkpoints").paths()
    return [*command, "--resume", "true"] if interrupted else command


def _pretraining_result(folder: Path) -> dict[str, Any]:
    encoder = read_description(folder / "models" / "pgl_encoder.pt")
    return {"steps": encoder["steps"], "pairs": encoder["pairs"]}


def _fine_tuning_result(folder: Path) -> dict[str, Any]:
    model = read_description(folder / "models" / "model.pt")
    summary = json.loads((folder / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    return {
        "steps": int(CheckpointFolder(folder / "checkpoints").paths()[-1].stem.split("_")[1]),
        "val_mean_dice": model.get("val_mean_dice"),
        "mean_dice": summary[AVERAGE]["dice"]["mean"],
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
