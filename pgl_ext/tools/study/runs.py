"""The runs of a study: a pre-training, or a fine-tuning with its evaluation, and the files that each leaves."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from monai.utils import ensure_tuple

from pgl_ext.checkpoints import CheckpointFolder
from pgl_ext.evaluation.summary import AVERAGE
from pgl_ext.files import read_json, write_json
from pgl_ext.tools.study.configs import Command
from pgl_ext.weights import EncoderRecord, ModelRecord

__all__ = ["AS_SET", "Rates", "Run", "bundle_command", "evaluation_folder", "fold_folders", "labels_text", "model_file"]


class Rates(NamedTuple):
    """Learning rates that were chosen among several; None where there was no choice."""

    pretraining: float | None = None
    fine_tuning: float | None = None


AS_SET = Rates()
"""No choice: the rates of the configs."""


@dataclass(frozen=True, eq=False)
class Run:
    """One training of a study with what follows it: a pre-training, or a fine-tuning with its evaluations.

    In a cross-validation it is a fine-tuning for each fold, and evaluations of all cases by those that held them out.

    In its folder lie ``started.json`` (fingerprint, and when it was run), ``run.json`` (its results, written last: the
    mark of a finished run), ``log.txt``, the settings of its commands, and what these write.

    Args:
        folder: of the run.
        name: its path within the study's folder.
        method: name of the method.
        seed: of the training.
        commands: in their order.
        labels: number (int) or fraction (float) of labelled cases; None of a pre-training.
        rates: learning rates that were chosen, or are to be.
        pretraining: whose encoder it starts from, if any.
    """

    folder: Path
    name: str
    method: str
    seed: int
    commands: tuple[Command, ...]
    labels: float | None = None
    rates: Rates = AS_SET
    pretraining: Run | None = None

    def __str__(self) -> str:
        what = "pre-training" if self.labels is None else labels_text(self.labels)
        what += " to choose a learning rate by" if self.is_for_selection else ""
        before, after = self.rates
        rates = "" if before is None else f", learning rate {before:g}"
        rates += "" if after is None else f", fine-tuned with {after:g}"
        return f"{self.method}{rates}, {what}, seed {self.seed}"

    @property
    def is_pretraining(self) -> bool:
        return self.labels is None

    @property
    def is_for_selection(self) -> bool:
        """Whether it is a fine-tuning that serves the choice of learning rates alone, and is not tested."""
        return not self.is_pretraining and all(command.section == "training" for command in self.commands)

    @property
    def with_pretraining(self) -> list[Run]:
        """This run after the pre-training that it needs, if any."""
        return [self] if self.pretraining is None else [self.pretraining, self]

    @property
    def is_finished(self) -> bool:
        return (self.folder / "run.json").is_file()

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def result(self) -> dict[str, Any]:
        """What a finished run noted: its cost, steps and mean scores."""
        return read_json(self.folder / "run.json")

    def fingerprint(self) -> dict[str, Any] | None:
        """That of the code, settings and data that the run was started with; None if it was not."""
        return self._started().get("fingerprint")

    def lock(self) -> int | None:
        """Claim the run for this process and those that inherit the descriptor.

        Returns:
            Descriptor to close in the end; None while another study, or a process that one left behind, has the run.
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
        """Note that the run is attempted.

        Args:
            fingerprint: of code, settings and data.
            cores: CPU cores, or GPUs, that the run has for itself; a share of a GPU where runs share it.
        """
        attempts = [*self._attempts(), [time.time(), None, cores]]
        write_json(self.folder / "started.json", {"fingerprint": fingerprint, "attempts": attempts})

    def has_done(self, command: Command) -> bool:
        """Whether an evaluation is complete, or is of a step that training did not reach, since it stopped early.

        A training finds by itself that nothing is left to do.
        """
        if command.section != "evaluating":
            return False
        settings = command.layers[-1]
        kept_step = Path(ensure_tuple(settings["model_path"])[0]).stem.partition("_step_")[2]
        return (Path(settings["output_dir"]) / "cases.csv").is_file() or (
            bool(kept_step) and int(kept_step) > self._steps()
        )

    def finish(self, unit: str) -> None:
        """Note the results, which marks the run as finished, and remove its checkpoints.

        Args:
            unit: of its cost, such as ``CPU-core-hours``.

        Raises:
            OSError: a file that the commands should have written is not there.
            ValueError: it is damaged.
        """
        spans = [(end - start, cores) for start, end, cores in self._attempts()]
        cost = {
            "seconds": round(sum(seconds for seconds, _ in spans), 1),
            "cost": round(sum(seconds * cores for seconds, cores in spans) / 3600, 4),
            "unit": unit,
        }
        write_json(self.folder / "run.json", {**self._scores(), **cost})
        # Only an unfinished run needs them, and they are large.
        for folder in self._training_folders:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _scores(self) -> dict[str, Any]:
        if self.is_pretraining:
            encoder = EncoderRecord.load(self.folder / "models" / "pgl_encoder.pt")
            return {"steps": encoder.steps, "pairs": encoder.pairs}
        dice = [ModelRecord.load(model_file(folder)).val_mean_dice for folder in self._training_folders]
        # The model is that of the best validation, which may be an earlier step.
        scores = {"steps": self._steps(), "val_mean_dice": None if None in dice else fmean(dice)}
        if not self.is_for_selection:
            summary = read_json(evaluation_folder(self.folder) / "summary.json")
            scores["mean_dice"] = summary[AVERAGE]["dice"]["mean"]
            scores |= {name: summary.get(name) for name in ("seconds_per_case", "device")}
        return scores

    def _steps(self) -> int:
        """That the training, which is over, has reached; of several, all of them."""
        last = [CheckpointFolder(folder / "checkpoints").paths()[-1] for folder in self._training_folders]
        return min(int(path.stem.split("_")[1]) for path in last)

    @property
    def _training_folders(self) -> list[Path]:
        return [Path(one.layers[-1]["output_dir"]) for one in self.commands if one.section == "training"]

    def _started(self) -> dict[str, Any]:
        path = self.folder / "started.json"
        return read_json(path) if path.is_file() else {}

    def _attempts(self) -> list[list[float]]:
        """Start, end and cores of every time that it was run, also of those that ended by being killed."""
        last_sign = self.log.stat().st_mtime if self.log.is_file() else 0.0
        attempts = self._started().get("attempts", [])
        return [[start, max(start, last_sign) if end is None else end, cores] for start, end, cores in attempts]


def model_file(folder: Path, step: int | None = None) -> Path:
    """The model in a fine-tuning's folder: that of its end, or the one kept after a step."""
    return folder / "models" / ("model.pt" if step is None else f"model_step_{step}.pt")


def fold_folders(folder: Path, folds: int) -> list[Path]:
    """Where the fine-tunings of a cross-validation lie."""
    return [folder / f"fold_{fold}" for fold in range(folds)]


def evaluation_folder(folder: Path, step: int | None = None) -> Path:
    """Where the evaluation of :func:`model_file` lies."""
    return folder / ("evaluation" if step is None else f"evaluation_step_{step}")


def labels_text(labels: float) -> str:
    """A number (int) or fraction (float) of labelled cases in words."""
    return f"{labels} labelled cases" if isinstance(labels, int) else f"{100 * labels:g} % of the labels"


def bundle_command(run: Run, command: Command) -> list[str]:
    """The command line of a run's command, whose settings are written to files in its output folder.

    A training that was interrupted goes on from its checkpoint.
    """
    folder = Path(command.layers[-1]["output_dir"])
    files = command.write(folder)
    line = [sys.executable, "-m", "monai.bundle", "run", command.section, "--config_file", str(files)]
    interrupted = command.section == "training" and CheckpointFolder(folder / "checkpoints").paths()
    return [*line, "--resume", "true"] if interrupted else line
