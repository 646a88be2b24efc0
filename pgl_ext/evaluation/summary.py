"""Summaries of scores over cases, and their tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from pgl_ext.evaluation.metrics import METRICS, STATUSES

__all__ = [
    "AVERAGE",
    "case_means",
    "confidence_interval",
    "finite_mean",
    "summarise",
    "summary_rows",
    "summary_table",
    "table",
]

AVERAGE = "average"
"""Name of the row over all organs."""


def confidence_interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """95 % confidence interval of the mean over cases by the percentile bootstrap, the same in every run.

    Args:
        values: one per case, finite.
        resamples: number of times that as many cases are drawn with replacement.

    Returns:
        Both ends; NaN of fewer than two cases.
    """
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap((np.asarray(values),), np.mean, n_resamples=resamples, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def finite_mean(values: Iterable[float]) -> float:
    """Mean of the values that are finite, NaN where none is."""
    found = [value for value in values if math.isfinite(value)]
    return float(np.mean(found)) if found else math.nan


def case_means(rows: Iterable[Mapping], metric: str) -> dict[str, float]:
    """Mean over the organs of each case, NaN where a case has no value at all.

    Args:
        rows: ``"case"`` and the metric, as in ``cases.csv``.
        metric: name of the column.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["case"], []).append(row[metric])
    return {case: finite_mean(found) for case, found in values.items()}


def summarise(rows: Sequence[Mapping]) -> dict[str, dict[str, Any]]:
    """Mean, spread and confidence interval over cases, of each organ and of their average.

    The average is that of the cases' means over their organs: cases are what is drawn at random, so that they are what
    is resampled.

    Args:
        rows: one per case and organ, as in ``cases.csv``.

    Returns:
        By organ, and for ``"average"`` at the end: per metric ``mean``, ``std`` (of a sample), ``n`` and ``ci95`` (both
        ends), None where there are too few cases; and how often each status occurs.
    """
    by_organ: dict[str, list[Mapping]] = {}
    for row in rows:
        by_organ.setdefault(row["organ"], []).append(row)
    summary = {
        organ: {metric: _statistics([row[metric] for row in some]) for metric in METRICS} | _counts(some)
        for organ, some in by_organ.items()
    }
    means = {metric: _statistics(case_means(rows, metric).values()) for metric in METRICS}
    return {**summary, AVERAGE: means | _counts(rows)}


def _statistics(values: Iterable[float]) -> dict[str, Any]:
    values = [value for value in values if math.isfinite(value)]
    low, high = confidence_interval(values)
    return {
        "mean": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "n": len(values),
        "ci95": [low, high] if len(values) > 1 else None,
    }


def _counts(rows: Iterable[Mapping]) -> dict[str, int]:
    found = [row["status"] for row in rows]
    return {status: found.count(status) for status in STATUSES}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text in columns, the first one to the left and the others to the right."""
    rows = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary_rows(summary: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What :func:`summarise` returned as rows of a CSV file, one per organ."""
    rows = []
    for organ, entry in summary.items():
        row: dict[str, Any] = {"organ": organ}
        for metric in METRICS:
            found = entry[metric]
            low, high = found["ci95"] or (None, None)
            row |= {f"{metric}_mean": found["mean"], f"{metric}_std": found["std"]}
            row |= {f"{metric}_ci95_low": low, f"{metric}_ci95_high": high, f"{metric}_n": found["n"]}
        rows.append(row | {status.replace(" ", "_"): entry[status] for status in STATUSES})
    return rows


def summary_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """What :func:`summarise` returned as a table to read."""
    head = ("organ", "Dice", "95 % CI", "IoU", "HD mm", "HD95 mm", "cases", "missed", "spurious")
    return table(head, [_table_row(name, entry) for name, entry in summary.items()])


def _table_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    def mean(metric: str, digits: int) -> str:
        value = entry[metric]["mean"]
        return "n/a" if value is None else f"{value:.{digits}f}"

    interval = entry["dice"]["ci95"]
    return [
        name,
        mean("dice", 3),
        f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "n/a",
        mean("iou", 3),
        mean("hd_mm", 1),
        mean("hd95_mm", 1),
        str(entry["dice"]["n"]),
        str(entry["missed"]),
        str(entry["spurious"]),
    ]
