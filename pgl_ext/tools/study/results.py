"""What the finished runs of a study left, and how its methods compare with the reference."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.evaluation.summary import finite, finite_mean, grouped
from pgl_ext.tools.compare import (
    Scores,
    common_keys,
    comparison_rows,
    mean_scores,
    organ_names,
    read_scores,
    score_array,
    with_average,
)
from pgl_ext.tools.study.plan import Study
from pgl_ext.tools.study.runs import Run, evaluation_folder

__all__ = ["REPORTED", "Results"]

REPORTED = tuple(METRICS)
"""Columns of ``cases.csv`` that a study reports: those of the paper's tables, and HD95 and NSD."""


class Results:
    """What the finished runs of a study left, and how its methods compare with the reference.

    Args:
        study: that the runs are of.
        runs: all of them, in the order of the tables.

    Attributes:
        finished: runs with what they noted.
        missing: runs that are not finished.
        scores: of each finished fine-tuning, by case and organ.
        kept: the same of the models kept after steps, by step, of those that reached it.
        organs: of all evaluations, and their average.
        rows: a row for each share of labels, metric, method and organ: ``mean`` over the test cases, its mean and
            standard deviation (``sd``, of a sample) over seeds; for methods other than the reference what
            :func:`pgl_ext.tools.compare.comparison_rows` finds of the seeds that both have.

    Raises:
        ValueError: an evaluation cannot be read, or evaluations are of other cases.
    """

    def __init__(self, study: Study, runs: Sequence[Run]) -> None:
        self.study = study
        self.finished = [(run, run.result()) for run in runs if run.is_finished]
        self.missing = [run for run in runs if not run.is_finished]
        fine_tunings = [run for run, _ in self.finished if not run.is_pretraining]
        self.scores = {run: read_scores(evaluation_folder(run.folder), REPORTED) for run in fine_tunings}
        self.kept = {
            step: {
                run: read_scores(folder, REPORTED)
                for run in fine_tunings
                for folder in [evaluation_folder(run.folder, step)]
                if folder.is_dir()
            }
            for step in study.kept_steps
        }
        evaluated = {str(run): scores for run, scores in self.scores.items()}
        evaluated |= {f"{run}, step {step}": scores for step, runs in self.kept.items() for run, scores in runs.items()}
        self._keys = common_keys(evaluated) if evaluated else []
        self.organs = organ_names(self._keys)
        shares = itertools.product(study.labels, REPORTED)
        self.rows = [row for labels, metric in shares for row in self._rows(labels, metric)]

    def select(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows with these values, such as ``metric="dice", organ="average"``, in their order."""
        return [row for row in self.rows if all(row[name] == value for name, value in wanted.items())]

    def missing_text(self) -> str:
        """In words, which runs the tables lack."""
        return f"Not finished, and missing here: {'; '.join(map(str, self.missing))}." if self.missing else ""

    def costs(self) -> tuple[dict[str, float], str | None]:
        """Mean cost of each method's pre-training over its seeds, and its unit; None where there was none."""
        noted = [{**noted, "method": run.method} for run, noted in self.finished if run.is_pretraining]
        costs = {name: finite_mean(row["cost"] for row in rows) for name, rows in grouped(noted, "method").items()}
        named = {method: self.study.pretrained_as(method) for method in self.study.methods}
        costs = {method: costs[name] for method, name in named.items() if name in costs}
        return costs, noted[0]["unit"] if noted else None

    def means(self, scores: Sequence[Scores], metric: str) -> np.ndarray:
        """Means over the test cases, (runs, organs and their average)."""
        return mean_scores(with_average(score_array(scores, metric, self._keys)), -1)

    def by_seed(self, labels: float, step: int | None = None) -> dict[str, dict[int, Scores]]:
        """By method and seed, the scores with some labels, in the end or after a kept step."""
        scores: dict[str, dict[int, Scores]] = {method: {} for method in self.study.methods}
        for run, of_run in (self.scores if step is None else self.kept[step]).items():
            if run.labels == labels:
                scores[run.method][run.seed] = of_run
        return scores

    def compared(
        self, methods: Mapping[str, Mapping[int, Scores]], reference: Mapping[int, Scores], metric: str
    ) -> list[dict[str, Any]]:
        """Compare methods with a reference.

        Args:
            methods: by name and seed, their scores.
            reference: by seed, the scores to compare with; where they are those of a method, that has no difference.
            metric: one of :data:`REPORTED`.

        Returns:
            As :attr:`rows`, but for the labels.
        """
        pairs, means = {}, {}
        for method, second in methods.items():
            shared = [seed for seed in second if seed in reference and second is not reference]
            if second:
                pairs[method] = [reference[seed] for seed in shared], [second[seed] for seed in shared]
                means[method] = dict(zip(self.organs, self.means(list(second.values()), metric).T, strict=True))
        rows = []
        for row in comparison_rows(pairs, metric, self._keys):
            values = finite(means[row["run"]][row["organ"]])
            rows.append(
                {
                    "metric": metric,
                    "organ": row["organ"],
                    "method": row["run"],
                    "seeds": len(methods[row["run"]]),
                    "mean": finite_mean(values),
                    "sd": float(np.std(values, ddof=1)) if len(values) > 1 else np.nan,
                    "paired_seeds": row["seeds"],
                    "paired_cases": row["n"],
                    **{name: row[name] for name in ("difference", "ci95_low", "ci95_high", "p", "p_holm")},
                }
            )
        return rows

    def _rows(self, labels: float, metric: str) -> list[dict[str, Any]]:
        methods = self.by_seed(labels)
        rows = self.compared(methods, methods[self.study.reference], metric)
        return [{"labels": labels, **row} for row in rows]
