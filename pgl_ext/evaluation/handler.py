"""Evaluation of a segmentation network: scores per case and organ, their summary, predictions and pictures."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import affine_to_spacing
from monai.transforms import Compose, Orientationd
from monai.utils import convert_to_tensor

from pgl_ext.data.prepare import check_items
from pgl_ext.evaluation.metrics import METRICS, organ_scores
from pgl_ext.evaluation.summary import AVERAGE, case_means, summarise, summary_rows, summary_table
from pgl_ext.files import write_csv, write_nifti, write_text
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.checks import BadVolumesError
from pgl_ext.transforms.load import LoadVolumed

__all__ = ["CASE_COLUMNS", "EvaluationReport"]

logger = logging.getLogger(__name__)

CASE_COLUMNS = ("case", "organ", *METRICS, "reference_ml", "predicted_ml", "status")


class EvaluationReport:
    """Handler of a MONAI ``SupervisedEvaluator`` that scores every case on the grid of its files, and writes a report.

    Before the first case it stops where the folder holds a report already, or where cases are bad. Then it writes:

    - ``predictions/NAME.nii.gz``: label map on the grid of the image, with the values of the task's label files;
    - ``cases.csv``: Dice, IoU, HD and HD95 (mm) of each case and organ, see :mod:`pgl_ext.evaluation.metrics`;
    - ``summary.csv``, ``summary.json``: mean, standard deviation and 95 % confidence interval per organ and of all;
    - ``boxplots.png``: Dice and HD95;
    - ``overlays/best.png``, ``median.png``, ``worst.png``: reference and prediction, by the case's mean Dice.

    Args:
        output_dir: folder for all that; made if missing.
        task: what is segmented.
        cases: from :func:`pgl_ext.data.prepare.evaluation_cases`.
        loading: transforms that load and check one case; None: don't check.
        description: further entries for ``summary.json``, such as the model's path.
        label_key: key of the reference (1, X, Y, Z), with the label files' values, on the grid of the image's file.
        pred_key: key of the predicted masks (organs, X, Y, Z) there, a ``MetaTensor``.
        name_key: key of the case's name.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        task: SegmentationTask,
        cases: Sequence[Mapping],
        loading: Callable[[Mapping], Any] | None = None,
        description: Mapping[str, Any] | None = None,
        label_key: str = "label",
        pred_key: str = "pred",
        name_key: str = "name",
    ) -> None:
        self.folder = Path(output_dir)
        self.task = task
        self.cases = {case["name"]: case for case in cases}
        self.loading = loading
        self.description = dict(description or {})
        self.label_key = label_key
        self.pred_key = pred_key
        self.name_key = name_key
        self.rows: list[dict[str, Any]] = []
        # One at a time, so that the masks of a large reference never lie in memory all at once.
        self._organs = {
            name: SegmentationTask({name: values}, multi_label=True) for name, values in task.organs.items()
        }

    def attach(self, engine: Engine) -> None:
        """Check the cases at the start, score each, write the report at the end; means become the engine's metrics."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add_all)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self) -> None:
        if (self.folder / "cases.csv").exists():
            raise FileExistsError(
                f"{self.folder.absolute()} holds the report of an earlier evaluation: give another folder with "
                "--output_dir, or remove this one."
            )
        if self.loading is not None:
            bad = check_items(list(self.cases.values()), self.loading)
            if bad:
                raise BadVolumesError(bad, len(self.cases), can_skip=False)
        self.rows = []

    def _add_all(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            # Postprocessing may have left either of them to either dict.
            data = {**item, **output}
            rows = self.add(data[self.name_key], data[self.pred_key], data[self.label_key])
            dice = case_means(rows, "dice")[data[self.name_key]]
            logger.info("%s: mean Dice %s", data[self.name_key], "n/a" if math.isnan(dice) else f"{dice:.4f}")

    def add(self, name: str, masks: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
        """Score one case and write its prediction.

        Args:
            name: of the case.
            masks: predicted, bool (organs, X, Y, Z), with an ``affine``.
            labels: reference (1, X, Y, Z).

        Returns:
            The case's rows of ``cases.csv``.
        """
        affine = np.asarray(torch.as_tensor(masks.affine).cpu(), dtype=np.float64)
        masks, labels = (convert_to_tensor(tensor, device="cpu") for tensor in (masks, labels))
        annotated = self.task.channels_of(self.cases[name].get("annotated", self.task.names))
        rows = []
        for mask, (organ, task), known in zip(masks.numpy(), self._organs.items(), annotated, strict=True):
            reference = task.masks_of_labels(labels)[0].numpy()
            scores = organ_scores(mask, reference, affine_to_spacing(affine), known)
            rows.append({"case": name, "organ": organ, **scores})
        write_nifti(self.task.labels_of_masks(masks)[0].numpy(), affine, self._prediction_path(name))
        self.rows += rows
        return rows

    def _prediction_path(self, name: str) -> Path:
        return self.folder / "predictions" / f"{name}.nii.gz"

    def _finish(self, engine: Engine) -> None:
        summary = summarise(self.rows)
        means = {f"{metric} {name}": part[metric]["mean"] for name, part in summary.items() for metric in METRICS}
        engine.state.metrics |= {name: mean for name, mean in means.items() if mean is not None}
        organs = {name: summary[name] for name in self.task.names}
        content = {
            "cases": len(self.cases),
            AVERAGE: summary[AVERAGE],
            "organs": organs,
            "task": self.task.description(),
        }
        write_text(self.folder / "summary.json", json.dumps({**self.description, **content}, indent=4) + "\n")
        write_csv(self.folder / "summary.csv", summary_rows(summary))
        from pgl_ext.evaluation.figures import plot_scores

        scores = {
            metric: {organ: [row[metric] for row in self.rows if row["organ"] == organ] for organ in self.task.names}
            for metric in ("dice", "hd95_mm")
        }
        plot_scores(scores, self.folder / "boxplots.png")
        self._draw_overlays()
        # Last, since it says that the report is complete.
        write_csv(self.folder / "cases.csv", [{name: row[name] for name in CASE_COLUMNS} for row in self.rows])
        logger.info("%d cases, report in %s\n%s", len(self.cases), self.folder, summary_table(summary))

    def _draw_overlays(self) -> None:
        dice = {case: value for case, value in case_means(self.rows, "dice").items() if math.isfinite(value)}
        ordered = sorted(dice, key=dice.__getitem__)
        if not ordered:
            return
        chosen = {"worst": ordered[0], "median": ordered[(len(ordered) - 1) // 2], "best": ordered[-1]}
        for title, name in chosen.items():
            path = self.folder / "overlays" / f"{title}.png"
            self._draw_overlay(f"{title}: {name}, mean Dice {dice[name]:.3f}", name, path)

    def _draw_overlay(self, title: str, name: str, path: Path) -> None:
        from pgl_ext.figures.overlays import plot_overlay, thinning

        case = {**self.cases[name], "pred": str(self._prediction_path(name))}
        keys = ["image", "label", "pred"]
        data = Compose([LoadVolumed(keys), Orientationd(keys, axcodes="RAS", labels=None)])(case)
        thinned = thinning(data["image"].shape[1:])
        image, label, pred = (convert_to_tensor(data[key], device="cpu")[(slice(None), *thinned)] for key in keys)
        plot_overlay(
            image[0].numpy(),
            {
                "reference": self.task.masks_of_labels(label).numpy(),
                "prediction": self.task.masks_of_labels(pred).numpy(),
            },
            self.task.names,
            np.multiply(affine_to_spacing(data["image"].affine), [part.step for part in thinned]),
            path,
            title,
        )
