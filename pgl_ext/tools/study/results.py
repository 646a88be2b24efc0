"""What the finished runs of a study left, and how its methods compare with the reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

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
from pgl_ext.tools.study.runs import Run

__all__ = ["REPORTED", "Results"]

REPORTED = ("dice", "iou", "hd95_mm")
"""Columns of ``cases.csv`` that a study reports."""


class Results:
    """What the finished runs of a study left, and how its methods compare with the reference.

    Args:
        study: that the runs are of.
        runs: all of them, in the order of the tables.

    Attributes:
        finished: runs with what they noted.
        missing: runs that are not finished.
        scores: of each finished fine-tuning, by case and organ.
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
        self.scores = {run: read_scores(run.folder / "evaluation", REPORTED) for run in fine_tunings}
        evaluated = {str(run): scores for run, scores in self.scores.items()}
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
        return costs, noted[0]["unit"] if noted else None

    def means(self, scores: Sequence[Scores], metric: str) -> np.ndarray:
        """Means over the test cases, (runs, organs and their average)."""
        return mean_scores(with_average(score_array(scores, metric, self._keys)), -1)

    def _rows(self, labels: float, metric: str) -> list[dict[str, Any]]:
        by_seed: dict[str, dict[int, Scores]] = {method: {} for method in self.study.methods}
        for run, scores in self.scores.items():
            if run.labels == labels:
                by_seed[run.method][run.seed] = scores
        pairs, means, first = {}, {}, by_seed[self.study.reference]
        for method, second in by_seed.items():
            shared = [seed for seed in second if seed in first and method != self.study.reference]
            if second:
                pairs[method] = [first[seed] for seed in shared], [second[seed] for seed in shared]
                means[method] = dict(zip(self.organs, self.means(list(second.values()), metric).T, strict=True))
        rows = []
        for row in comparison_rows(pairs, metric, self._keys):
            values = finite(means[row["run"]][row["organ"]])
            rows.append(
                {
                    "labels": labels,
                    "metric": metric,
                    "organ": row["organ"],
                    "method": row["run"],
                    "seeds": len(by_seed[row["run"]]),
                    "mean": finite_mean(values),
                    "sd": float(np.std(values, ddof=1)) if len(values) > 1 else np.nan,
                    "paired_seeds": row["seeds"],
                    "paired_cases": row["n"],
                    **{name: row[name] for name in ("difference", "ci95_low", "ci95_high", "p", "p_holm")},
                }
            )
        return rows
