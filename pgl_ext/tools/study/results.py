"""What the finished runs of a study left, and how its methods compare with the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pgl_ext.evaluation.summary import AVERAGE, finite, finite_mean, grouped
from pgl_ext.tools.compare import by_organ, common_keys, paired_scores, paired_statistics, read_scores
from pgl_ext.tools.study.plan import Study
from pgl_ext.tools.study.runs import Run

__all__ = ["REPORTED", "Results", "holm"]

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
        scores: of each finished fine-tuning, by metric, and by case and organ.
        means: of each finished fine-tuning, by metric and organ, over the test cases.
        organs: of all evaluations, and their average.
        tables: by share of labels and metric, then by method and organ, a row with ``mean`` over the test cases, its
            mean and standard deviation (``sd``, of a sample) over seeds; for methods other than the reference what
            :func:`pgl_ext.tools.compare.paired_statistics` finds of the cases' scores, each averaged over the
            seeds that both have; in how many of these the difference has the sign of the mean one
            (``agreeing_seeds``); and for the average over organs ``p_holm``, adjusted for the number of methods that
            are compared with the reference at that share of labels.

    Raises:
        ValueError: an evaluation cannot be read, or evaluations are of other cases.
    """

    def __init__(self, study: Study, runs: Sequence[Run]) -> None:
        self.study = study
        self.finished = [(run, run.result()) for run in runs if run.is_finished]
        self.missing = [run for run in runs if not run.is_finished]
        fine_tunings = [run for run, _ in self.finished if not run.is_pretraining]
        self.scores = {run: read_scores(run.folder / "evaluation", REPORTED) for run in fine_tunings}
        evaluated = {str(run): scores["dice"] for run, scores in self.scores.items()}
        self._keys = common_keys(evaluated) if evaluated else []
        self.means = {
            run: {metric: _organ_means(values, self._keys) for metric, values in scores.items()}
            for run, scores in self.scores.items()
        }
        self.organs = [*dict.fromkeys(organ for _, organ in self._keys), AVERAGE]
        tables = {key: self._table(*key) for key in itertools.product(study.labels, REPORTED)}
        self.tables = {key: table for key, table in tables.items() if table}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of the tables."""
        return [row for table in self.tables.values() for rows in table.values() for row in rows.values()]

    def missing_text(self) -> str:
        """In words, which runs the tables lack."""
        return f"Not finished, and missing here: {'; '.join(map(str, self.missing))}." if self.missing else ""

    def costs(self) -> tuple[dict[str, float], str | None]:
        """Mean cost of each method's pre-training over its seeds, and its unit; None where there was none."""
        noted = [{**noted, "method": run.method} for run, noted in self.finished if run.is_pretraining]
        costs = {name: finite_mean(row["cost"] for row in rows) for name, rows in grouped(noted, "method").items()}
        return costs, noted[0]["unit"] if noted else None

    def _table(self, labels: float, metric: str) -> dict[str, dict[str, dict[str, Any]]]:
        tables = {method: self._organ_rows(labels, metric, method) for method in self.study.methods}
        tables = {method: rows for method, rows in tables.items() if rows}
        averages = [rows[AVERAGE] for method, rows in tables.items() if method != self.study.reference]
        for row, adjusted in zip(averages, holm([row["p"] for row in averages]), strict=True):
            row["p_holm"] = adjusted
        return tables

    def _organ_rows(self, labels: float, metric: str, method: str) -> dict[str, dict[str, Any]]:
        runs, reference = (
            {run.seed: run for run in self.scores if (run.labels, run.method) == (labels, name)}
            for name in (method, self.study.reference)
        )
        shared = [] if method == self.study.reference else [seed for seed in runs if seed in reference]
        both = ([self.scores[by_seed[seed]] for seed in shared] for by_seed in (reference, runs))
        pairs = paired_scores(*both, self._keys)[metric] if shared else {}
        rows = {}
        for organ in self.organs if runs else ():
            means, before = (
                {s: self.means[run][metric][organ] for s, run in part.items()} for part in (runs, reference)
            )
            values = finite(means.values())
            statistics = paired_statistics(*pairs.get(organ, ([], [])))
            signs = [np.sign(means[seed] - before[seed]) for seed in shared]
            rows[organ] = {
                "labels": labels,
                "metric": metric,
                "organ": organ,
                "method": method,
                "seeds": len(runs),
                "mean": finite_mean(values),
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
                "paired_seeds": len(shared),
                "agreeing_seeds": signs.count(np.sign(statistics["difference"])),
                "paired_cases": statistics["n"],
                **{name: statistics[name] for name in ("difference", "ci95_low", "ci95_high", "p")},
                "p_holm": math.nan,
            }
        return rows


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for their number by Holm's step-down method; NaN is neither counted nor adjusted.

    Of m values in ascending order, the k-th becomes ``max over j <= k of min(1, (m - j + 1) p_j)``.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)  # NaN last
    factors = np.isfinite(values).sum() - np.arange(len(values))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * values[order]))
    return adjusted.tolist()


def _organ_means(scores: Mapping[tuple[str, str], float], keys: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Mean over the cases of each organ, and of the cases' averages over their organs."""
    values = by_organ(scores, keys)
    averages = [finite_mean(case) for case in zip(*values.values(), strict=True)]
    return {organ: finite_mean(column) for organ, column in {**values, AVERAGE: averages}.items()}
