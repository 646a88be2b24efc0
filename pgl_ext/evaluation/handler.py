"""Evaluation of a segmentation network: scores per case and organ, their summary, predictions and pictures."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.data.utils import affine_to_spacing
from monai.engines.utils import IterationEvents
from monai.utils import convert_to_numpy, convert_to_tensor

from pgl_ext.data.prepare import check_items
from pgl_ext.evaluation.metrics import METRICS, TOLERANCE_MM, organ_scores
from pgl_ext.evaluation.summary import (
    AVERAGE,
    case_means,
    grouped,
    notable_cases,
    number_text,
    summarise,
    summary_rows,
    summary_table,
)
from pgl_ext.files import claim_folder, read_json, release_folder, write_csv, write_nifti, write_text, writing
from pgl_ext.segmentation.cases import draw_case, segmented_items
from pgl_ext.settings import parse_bool
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.checks import BadVolumesError
from pgl_ext.transforms.load import LoadVolumed
from pgl_ext.weights import model_files

__all__ = ["CASE_COLUMNS", "EvaluationReport", "unfinished_cases"]

logger = logging.getLogger(__name__)

CASE_COLUMNS = ("case", "organ", *METRICS, "reference_ml", "predicted_ml", "status")

_PROGRESS = "finished_cases.jsonl"


def unfinished_cases(cases: Sequence[Mapping], output_dir: PathLike, resume: bool = False) -> list[Mapping]:
    """The cases that an evaluation has to segment: all, or with ``resume`` those that a stopped one has not finished.

    The last one that it has finished is segmented again.
    """
    finished = _finished(Path(output_dir))[1] if parse_bool(resume, "resume") else {}
    return [case for case in cases if case["name"] not in finished]


def _finished(folder: Path) -> tuple[list[Any], dict[str, list[dict[str, Any]]]]:
    """What a stopped evaluation was of, and the rows of the cases that it has finished, all but the last."""
    if not (folder / _PROGRESS).is_file():
        return [], {}
    # Of a line that a power cut has cut off there is nothing to use.
    lines = (folder / _PROGRESS).read_text(encoding="utf-8").split("\n")[:-1]
    settings, *rows = map(json.loads, lines or ["[]"])
    return settings, {case[0]["case"]: case for case in rows[:-1]}


@dataclass(eq=False, repr=False)
class EvaluationReport:
    """Handler of a MONAI ``SupervisedEvaluator`` that scores every case on the grid of its files, and writes a report.

    It stops before the first case where the folder holds a report already, or where cases are bad. It writes:

    - ``predictions/NAME.nii.gz``: label map on the grid of the image, with the values of the task's label files;
    - ``cases.csv``: Dice, IoU, HD and HD95 (mm), NSD of each case and organ, see :mod:`pgl_ext.evaluation.metrics`;
    - ``summary.csv``, ``summary.json``: mean, standard deviation and 95 % confidence interval per organ and of all; the
      latter also where the files of the cases lie, for pictures in reports, and the median time of the network for a
      case (``seconds_per_case``) with the ``device``;
    - ``boxplots.png``: Dice and HD95;
    - ``overlays/best.png``, ``median.png``, ``worst.png``: reference and prediction, by the case's mean Dice.

    The evaluator's items have ``name``, ``label`` (1, X, Y, Z) with the label files' values, on the grid of the image's
    file, and ``pred``, the predicted masks (organs, X, Y, Z) there, a ``MetaTensor``.

    Args:
        output_dir: folder for all that; made if missing.
        task: what is segmented.
        cases: from :func:`pgl_ext.data.prepare.evaluation_cases`.
        loading: transforms that load and check one case; None: don't check.
        description: further entries for ``summary.json``, such as the model's path.
        tolerance_mm: of the NSD, of all organs or by name; None, or an organ not named: 2 mm.
        resume: go on where an evaluation was stopped, whose evaluator got :func:`unfinished_cases`.

    Raises:
        ValueError: a tolerance is not positive, or is of an organ that the task does not have.
    """

    output_dir: PathLike
    task: SegmentationTask
    cases: Sequence[Mapping]
    loading: Callable[[Mapping], Any] | None = None
    description: Mapping[str, Any] = field(default_factory=dict)
    tolerance_mm: Mapping[str, float] | float | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        given = {} if self.tolerance_mm is None else self.tolerance_mm
        given = given if isinstance(given, Mapping) else dict.fromkeys(self.task.names, given)
        self.tolerances = {**dict.fromkeys(self.task.names, TOLERANCE_MM), **given}
        if len(self.tolerances) > len(self.task.names) or not all(value > 0 for value in given.values()):
            raise ValueError(
                f"tolerance_mm must be a positive number of mm, or one by name of the organs {self.task.names}, got "
                f"{self.tolerance_mm!r}."
            )
        self.folder = Path(self.output_dir)
        self.by_name = {case["name"]: case for case in self.cases}
        self.rows: list[dict[str, Any]] = []
        self.seconds: list[float] = []

    def attach(self, engine: Engine) -> None:
        """Check the cases at the start, score each, write the report at the end; means become the engine's metrics."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start_clock)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._stop_clock)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add_all)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        if (self.folder / "cases.csv").exists():
            if parse_bool(self.resume, "resume") and self._is_reported():
                logger.info("all cases are evaluated, report in %s", self.folder)
                engine.terminate()
                return
            raise FileExistsError(
                f"{self.folder.absolute()} holds the report of an earlier evaluation: give another folder with "
                "--output_dir, or remove this one."
            )
        if self.loading is not None and (bad := check_items(self.cases, self.loading)):
            raise BadVolumesError(bad, len(self.cases), can_skip=False)
        claim_folder(self.folder)
        self.seconds = []
        settings, finished = _finished(self.folder) if parse_bool(self.resume, "resume") else ([], {})
        if settings and settings != self._settings():
            release_folder(self.folder)
            raise ValueError(
                f"{self.folder} holds a part of an evaluation of another model, task or setting: set --resume false to "
                "evaluate all cases anew."
            )
        self.rows = [row for rows in finished.values() for row in rows]
        lines = [self._settings(), *finished.values()]
        write_text(self.folder / _PROGRESS, "".join(json.dumps(line) + "\n" for line in lines))

    def _start_clock(self) -> None:
        self._started = time.perf_counter()

    def _stop_clock(self, engine: Engine) -> None:
        if engine.state.device.type == "cuda":
            torch.cuda.synchronize(engine.state.device)
        self.seconds.append(time.perf_counter() - self._started)

    def _settings(self) -> list[Any]:
        """What the scores depend on, as JSON has it."""
        models = model_files(self.description["model"]) if "model" in self.description else []
        written = [os.stat(path).st_mtime_ns for path in models if os.path.exists(path)]
        return json.loads(json.dumps([self._head(), written]))

    def _head(self) -> dict[str, Any]:
        """The report's first entries, which say what was evaluated."""
        return {**self.description, "task": self.task.description(), "tolerance_mm": self.tolerances}

    def _is_reported(self) -> bool:
        """Whether the report in the folder is of the same model, task and settings, and of these cases."""
        head = json.loads(json.dumps({**self._head(), "files": self.by_name}))
        reported = read_json(self.folder / "summary.json")
        return all(reported.get(name) == value for name, value in head.items())

    def _add_all(self, engine: Engine) -> None:
        for data in segmented_items(engine):
            rows = self.add(data["name"], data["pred"], data["label"])
            with writing(self.folder / _PROGRESS), open(self.folder / _PROGRESS, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows) + "\n")
            (dice,) = case_means(rows, "dice").values()
            logger.info("%s: mean Dice %s", data["name"], number_text(dice, 4))

    def add(self, name: str, masks: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
        """Score one case, write its prediction, and return its rows of ``cases.csv``.

        Predicted are masks, bool (organs, X, Y, Z), with an ``affine``; the reference is a label map (1, X, Y, Z). What
        it says to ignore is scored in neither.
        """
        affine = convert_to_numpy(masks.affine, dtype=np.float64)
        masks, labels = (convert_to_tensor(tensor, device="cpu") for tensor in (masks, labels))
        scored = self.task.without_ignored(masks, labels)
        annotated = self.by_name[name].get("annotated", self.task.names)
        rows = []
        for organ, mask in zip(self.task.names, scored.numpy(), strict=True):
            # One at a time, so that the masks of a large reference never lie in memory all at once.
            reference = self.task.mask_of_labels(labels, organ)[0].numpy()
            known, spacing = organ in annotated, affine_to_spacing(affine)
            scores = organ_scores(mask, reference, spacing, known, self.tolerances[organ])
            rows.append({"case": name, "organ": organ, **scores})
        write_nifti(self.task.labels_of_masks(masks)[0].numpy(), affine, self._prediction_path(name))
        self.rows += rows
        return rows

    def _prediction_path(self, name: str) -> Path:
        return self.folder / "predictions" / f"{name}.nii.gz"

    def _finish(self, engine: Engine) -> None:
        from pgl_ext.evaluation.figures import plot_scores

        summary = summarise(self.rows)
        means = {f"{metric} {name}": entry[metric]["mean"] for name, entry in summary.items() for metric in METRICS}
        engine.state.metrics |= {name: mean for name, mean in means.items() if mean is not None}
        content = {
            **self._head(),
            "cases": len(self.cases),
            AVERAGE: summary[AVERAGE],
            "organs": {name: summary[name] for name in self.task.names},
            # The first case is slower, where kernels are chosen or compiled.
            "seconds_per_case": float(np.median(self.seconds)),
            "device": _device_name(engine.state.device),
            "files": self.by_name,
        }
        write_text(self.folder / "summary.json", json.dumps(content, indent=4) + "\n")
        write_csv(self.folder / "summary.csv", summary_rows(summary))
        organs = grouped(self.rows, "organ")
        scores = {
            metric: {organ: [row[metric] for row in rows] for organ, rows in organs.items()}
            for metric in ("dice", "hd95_mm")
        }

        plot_scores(scores, self.folder / "boxplots.png")
        self._draw_overlays()
        # Last, since it says that the report is complete.
        write_csv(self.folder / "cases.csv", [{name: row[name] for name in CASE_COLUMNS} for row in self.rows])
        (self.folder / _PROGRESS).unlink()
        release_folder(self.folder)
        logger.info("%d cases, report in %s\n%s", len(self.cases), self.folder, summary_table(summary))

    def _draw_overlays(self) -> None:
        """Draw the cases of the lowest, median and highest mean Dice."""
        dice = case_means(self.rows, "dice")
        for title, name in notable_cases(dice).items():
            case = self.by_name[name]
            files = {"reference": case["label"], "prediction": self._prediction_path(name)}
            loaded = LoadVolumed(list(files))({**case, **files})
            maps = {column: loaded[column] for column in files}
            heading = f"{title}: {name}, mean Dice {dice[name]:.3f}"
            draw_case(case, maps, self.task, self.folder / "overlays" / f"{title}.png", heading)


def _device_name(device: torch.device) -> str:
    """The GPU's model, or how many threads of the CPU are used."""
    is_gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if is_gpu else f"{torch.get_num_threads()} CPU threads"
