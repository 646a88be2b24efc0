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
    "Summary",
    "case_means",
    "confidence_interval",
    "finite",
    "finite_mean",
    "grouped",
    "interval_text",
    "notable_cases",
    "number_text",
    "summarise",
    "summary_rows",
    "summary_table",
    "table",
]

AVERAGE = "average"
"""Name of the row over all organs."""

Summary = dict[str, dict[str, Any]]
"""By organ, and of all, see :func:`summarise`."""


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean over cases, by the percentile bootstrap; NaN of fewer than two cases."""
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    low, high = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    return float(low), float(high)


def finite(values: Iterable[float]) -> list[float]:
    """The values that are neither NaN nor infinite."""
    return [float(value) for value in values if math.isfinite(value)]


def finite_mean(values: Iterable[float]) -> float:
    """Mean of the values that are finite, NaN where none is."""
    values = finite(values)
    return float(np.mean(values)) if values else math.nan


def case_means(rows: Iterable[Mapping], metric: str) -> dict[str, float]:
    """Mean over the organs of each case, NaN where it has no value, of rows with ``"case"`` and the metric."""
    cases = grouped(rows, "case")
    return {case: finite_mean(row[metric] for row in case_rows) for case, case_rows in cases.items()}


def notable_cases(scores: Mapping[str, float]) -> dict[str, str]:
    """The ``best``, ``median`` (of an even number the lower) and ``worst`` case by their scores; NaN takes no part."""
    ordered = sorted((case for case in scores if math.isfinite(scores[case])), key=scores.__getitem__)
    return {"best": ordered[-1], "median": ordered[(len(ordered) - 1) // 2], "worst": ordered[0]} if ordered else {}


def grouped(rows: Iterable[Mapping], column: str) -> dict[str, list[Mapping]]:
    """Rows by their value in a column."""
    groups: dict[str, list[Mapping]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def summarise(rows: Sequence[Mapping]) -> Summary:
    """Mean, spread and confidence interval over cases, of each organ and of their average.

    The average is that of the cases' means over their organs, since cases are what is resampled.

    Returns:
        By organ, and for ``"average"`` at the end: per metric ``mean``, ``std`` (of a sample), ``n`` and ``ci95`` (both
        ends), None where there are too few cases; and how often each status occurs.
    """
    summary = {
        organ: {metric: _statistics(row[metric] for row in organ_rows) for metric in METRICS} | _counts(organ_rows)
        for organ, organ_rows in grouped(rows, "organ").items()
    }
    means = {metric: _statistics(case_means(rows, metric).values()) for metric in METRICS}
    return {**summary, AVERAGE: means | _counts(rows)}


def _statistics(values: Iterable[float]) -> dict[str, Any]:
    values = finite(values)
    several = len(values) > 1
    return {
        "mean": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if several else None,
        "n": len(values),
        "ci95": list(confidence_interval(values)) if several else None,
    }


def _counts(rows: Iterable[Mapping]) -> dict[str, int]:
    statuses = [row["status"] for row in rows]
    return {status: statuses.count(status) for status in STATUSES}


def number_text(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A number with some digits after the point, ``sign="+"``: also with a plus; "n/a" where there is none."""
    return "n/a" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"


def interval_text(ends: Sequence[float] | None, digits: int = 3, sign: str = "") -> str:
    """Both ends of an interval, as :func:`number_text` has them; "n/a" where there is none."""
    return " to ".join(number_text(end, digits, sign) for end in ends) if ends and not math.isnan(ends[0]) else "n/a"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text in columns, the first one to the left and the others to the right."""
    rows = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary_rows(summary: Summary) -> list[dict[str, Any]]:
    """What :func:`summarise` returned as rows of a CSV file, one per organ."""
    rows = []
    for organ, entry in summary.items():
        row: dict[str, Any] = {"organ": organ}
        for metric in METRICS:
            values = entry[metric]
            low, high = values["ci95"] or (None, None)
            row |= {f"{metric}_mean": values["mean"], f"{metric}_std": values["std"]}
            row |= {f"{metric}_ci95_low": low, f"{metric}_ci95_high": high, f"{metric}_n": values["n"]}
        rows.append(row | {status.replace(" ", "_"): entry[status] for status in STATUSES})
    return rows


def summary_table(summary: Summary) -> str:
    """What :func:`summarise` returned as a table to read."""
    head = ("organ", "Dice", "95 % CI", "IoU", "HD mm", "HD95 mm", "NSD", "cases", "missed", "spurious")
    rows = []
    for organ, entry in summary.items():
        dice, *means = (number_text(entry[name]["mean"], metric.digits) for name, metric in METRICS.items())
        counts = (entry["dice"]["n"], entry["missed"], entry["spurious"])
        rows.append([organ, dice, interval_text(entry["dice"]["ci95"]), *means, *map(str, counts)])
    return table(head, rows)
