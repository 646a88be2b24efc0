"""Whether one segmentation is better than another: paired differences of the scores that evaluations wrote.

:mod:`pgl_ext.evaluation.metrics` gives no score (NaN) where an organ is in neither reference nor prediction, and the
worst one where it is only predicted. Where one run predicts an absent organ and another does not, leaving that case out
would hide the error: so here the run that is right has the perfect score, Dice 1 and HD95 0 mm. An organ that was not
annotated in a case, in one run or in all, has no part in a comparison.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import wilcoxon

from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.evaluation.summary import AVERAGE, confidence_interval, finite_mean, table
from pgl_ext.files import write_csv

__all__ = ["Scores", "by_organ", "common_keys", "compare_runs", "paired_scores", "paired_statistics", "read_scores"]

_COMPARED = ("dice", "hd95_mm")
# Of fewer pairs even the clearest difference has p > 0.05.
_LEAST_PAIRS = 6
_LISTED = 10
# Volume of the organs' references, which is the same in all runs but for rounding.
_REFERENCE = "reference_ml"
_SAME = 1.01

Scores = dict[str, dict[tuple[str, str], float]]
"""By metric, and by case and organ."""


def read_scores(folder: str | os.PathLike, metrics: Iterable[str] = _COMPARED) -> Scores:
    """The scores that an evaluation wrote.

    Args:
        folder: the evaluation's ``output_dir``.
        metrics: columns of its ``cases.csv`` to read, by default Dice and HD95.

    Returns:
        By metric, and by case and organ; NaN where a case has no value, as of an organ that is not annotated.

    Raises:
        FileNotFoundError: there is no ``cases.csv`` in the folder.
        ValueError: it lacks columns, holds no case, or holds one twice.
    """
    path, metrics = Path(folder) / "cases.csv", list(metrics)
    rows = _rows(path)
    missing = [name for name in ("case", "organ", *metrics) if rows and name not in rows[0]]
    if missing or not rows:
        problem = f"lacks the columns {missing}" if missing else "holds no case"
        raise ValueError(f"{path} {problem}: give the output_dir of a complete evaluation.")
    if len({(row["case"], row["organ"]) for row in rows}) < len(rows):
        raise ValueError(f"{path} holds a case and organ more than once: evaluate again, with a new --output_dir.")
    return {metric: {(row["case"], row["organ"]): float(row[metric] or "nan") for row in rows} for metric in metrics}


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give the output_dir of a complete evaluation (run evaluating of pgl_segmentation)."
        )
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def common_keys(found: Mapping[str, Iterable[tuple[str, str]]], common: bool = False) -> list[tuple[str, str]]:
    """Cases and organs that all evaluations have, in the order of the first.

    Args:
        found: cases and organs by folder.
        common: whether others may be left out.

    Raises:
        ValueError: evaluations have other cases or organs.
    """
    first, *others = found.values()
    shared = [key for key in first if all(key in other for other in others)]
    every = sorted({key for keys in found.values() for key in keys})
    if len(shared) < len(every) and not common:
        lines = [f"  {folder} lacks {_listed([k for k in every if k not in keys])}" for folder, keys in found.items()]
        raise ValueError(
            "the runs have other cases or organs:\n"
            + "\n".join(line for line in lines if not line.endswith(" lacks "))
            + "\nEvaluate all on the same data list, or compare what all have with --common true."
        )
    if not shared:
        raise ValueError("the runs have no case and organ in common: evaluate all on the same data list.")
    return shared


def _annotated_keys(keys: Iterable[tuple[str, str]], folders: Iterable[str]) -> list[tuple[str, str]]:
    """The cases and organs that are annotated in all evaluations, where these have the same reference."""
    volumes: dict[tuple[str, str], list[float]] = {}
    for folder in folders:
        for row in _rows(Path(folder) / "cases.csv"):
            if _REFERENCE in row:
                volumes.setdefault((row["case"], row["organ"]), []).append(float(row[_REFERENCE] or "nan"))
    keys = [key for key in keys if not any(map(math.isnan, volumes.get(key, [])))]
    if not keys:
        raise ValueError("no organ is annotated in all runs: evaluate all on the same data list, with annotations.")
    differing = [key for key in keys if key in volumes and max(volumes[key]) > _SAME * min(volumes[key])]
    if differing:
        raise ValueError(
            f"the runs have references of other volumes for {_listed(differing)}: they were evaluated with other label "
            "maps, or scans of several patients have one name. Evaluate all on the same data list."
        )
    return keys


def by_organ(scores: Mapping[tuple[str, str], float], keys: Iterable[tuple[str, str]]) -> dict[str, list[float]]:
    """Per organ the values of the cases, in the order of the keys, NaN where a case has none."""
    organs, cases = (list(dict.fromkeys(column)) for column in reversed(list(zip(*keys, strict=True))))
    return {organ: [scores.get((case, organ), math.nan) for case in cases] for organ in organs}


def paired_scores(
    first: Sequence[Scores], second: Sequence[Scores], keys: Iterable[tuple[str, str]]
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The scores of two runs side by side.

    Args:
        first: repetitions of the reference, such as seeds, over which the scores of a case are averaged.
        second: those of the other run.
        keys: cases and organs, from :func:`common_keys`.

    Returns:
        By metric and organ, and as ``"average"`` over the organs, the values of the cases in both runs. NaN where no
        repetition of either run has a value; where some do, one without has the perfect score, as the module says.
    """
    keys = list(keys)
    return {metric: _pairs(first, second, metric, keys) for metric in first[0]}


def paired_statistics(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Compare the scores of two runs on the same cases.

    Args:
        first: of the reference, one per case; cases that are NaN in either run are left out.
        second: of the other run.

    Returns:
        ``n`` (pairs), ``mean_a``, ``mean_b``, ``difference`` (the mean of second - first) with ``ci95_low`` and
        ``ci95_high`` (percentile bootstrap over the cases), and ``p`` of the two-sided Wilcoxon signed-rank test. NaN
        where too few pairs say too little: of one pair the interval, of fewer than six that differ the p.
    """
    pairs = np.array([first, second], dtype=np.float64)
    pairs = pairs[:, np.isfinite(pairs).all(0)]
    differences = pairs[1] - pairs[0]
    low, high = confidence_interval(differences)
    mean_a, mean_b = pairs.mean(1) if differences.size else (math.nan, math.nan)
    enough = np.count_nonzero(differences) >= _LEAST_PAIRS
    return {
        "n": differences.size,
        "mean_a": float(mean_a),
        "mean_b": float(mean_b),
        "difference": float(differences.mean()) if differences.size else math.nan,
        "ci95_low": low,
        "ci95_high": high,
        "p": float(wilcoxon(differences).pvalue) if enough else math.nan,
    }


def compare_runs(
    runs: Sequence[str | Sequence[str]],
    names: Sequence[str] | None = None,
    out: str | os.PathLike | None = None,
    common: bool = False,
) -> str:
    """Compare evaluations case by case with the first of them.

    Args:
        runs: output folders of evaluations, at least two. Several folders in place of one, as a list or with commas
            between them, are repetitions, such as seeds: the scores of a case are averaged over them first.
        names: of the runs; by default their folders'.
        out: folder for ``compare.csv`` and ``compare.png``; made if missing. None: only return the table.
        common: compare the cases and organs that all runs have, instead of stopping where they differ.

    Returns:
        The table as text: per metric and organ, and of the cases' average over their organs, the means, the mean of the
        paired differences with its 95 % confidence interval over cases, and the Wilcoxon signed-rank p.

    Raises:
        FileNotFoundError: a folder holds no evaluation.
        ValueError: there are fewer than two runs, names do not fit, or runs have other cases, organs or references; all
            those that some run lacks are listed.
    """
    folders = [_folders(run) for run in runs]
    if len(folders) < 2:
        raise ValueError(f"a comparison needs at least two runs, got {len(folders)}: give their output folders.")
    names = _names(folders, names)
    repetitions = [[read_scores(folder) for folder in some] for some in folders]
    keys = common_keys(
        {
            folder: scores["dice"]
            for some, read in zip(folders, repetitions, strict=True)
            for folder, scores in zip(some, read, strict=True)
        },
        common,
    )
    keys = _annotated_keys(keys, [folder for some in folders for folder in some])
    paired = {name: paired_scores(repetitions[0], read, keys) for name, read in zip(names, repetitions, strict=True)}
    pairs = {metric: {name: paired[name][metric] for name in names[1:]} for metric in _COMPARED}
    rows = [
        {"metric": metric, "organ": organ, "run": name, "reference": names[0], **paired_statistics(*pair)}
        for metric, runs in pairs.items()
        for name, organs in runs.items()
        for organ, pair in organs.items()
    ]
    if out is not None:
        write_csv(Path(out) / "compare.csv", rows)
        _plot(pairs, rows, names[0], Path(out) / "compare.png")
    return _text(rows, names, len({case for case, _ in keys}))


def _folders(run: str | Sequence[str]) -> list[str]:
    parts = run if isinstance(run, (list, tuple)) else str(run).split(",")
    return [os.path.normpath(str(part).strip()) for part in parts if str(part).strip()]


def _names(folders: Sequence[Sequence[str]], names: Sequence[str] | None) -> list[str]:
    if names is None:
        names = [Path(some[0]).name for some in folders]
        if len(set(names)) < len(names):
            names = [some[0] for some in folders]
    if len(names) != len(folders) or len(set(names)) < len(names):
        raise ValueError(f"names must be {len(folders)} different ones, one per run, got {list(names)}.")
    return [str(name) for name in names]


def _listed(keys: Sequence[tuple[str, str]]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(f"{case} ({organ})" for case, organ in keys[:_LISTED]) + more


def _pairs(
    first: Sequence[Scores], second: Sequence[Scores], metric: str, keys: Sequence[tuple[str, str]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per organ, and on average over the organs, the cases' values in both runs."""
    runs = [[by_organ({key: scores[metric][key] for key in keys}, keys) for scores in run] for run in (first, second)]
    # (repetitions, organs, cases)
    arrays = [np.array([list(scores.values()) for scores in run]) for run in runs]
    scored = np.isfinite(np.concatenate(arrays)).any(0)
    a, b = (np.where(scored & np.isnan(values), METRICS[metric].perfect, values).mean(0) for values in arrays)
    average = tuple(np.array([finite_mean(case) for case in values.T]) for values in (a, b))
    return {**dict(zip(runs[0][0], zip(a, b, strict=True), strict=True)), AVERAGE: average}


def _plot(pairs: Mapping, rows: Sequence[Mapping], reference: str, path: Path) -> None:
    from pgl_ext.evaluation.figures import plot_differences

    differences = {
        metric: {name: {organ: b - a for organ, (a, b) in organs.items()} for name, organs in runs.items()}
        for metric, runs in pairs.items()
    }
    intervals: dict = {metric: {name: {} for name in runs} for metric, runs in pairs.items()}
    for row in rows:
        found = tuple(row[key] for key in ("difference", "ci95_low", "ci95_high"))
        intervals[row["metric"]][row["run"]][row["organ"]] = found
    plot_differences(differences, intervals, path, reference)


def _text(rows: Sequence[Mapping], names: Sequence[str], cases: int) -> str:
    parts = [f"{cases} cases, paired; differences are to {names[0]}"]
    for metric in _COMPARED:
        for name in names[1:]:
            some = [row for row in rows if row["metric"] == metric and row["run"] == name]
            head = (METRICS[metric].title, names[0], name, "difference", "95 % CI", "Wilcoxon p", "cases")
            parts.append(table(head, [_text_row(row, 4 if metric == "dice" else 2) for row in some]))
    return "\n\n".join(parts)


def _text_row(row: Mapping, digits: int) -> list[str]:
    def text(value: float, sign: str = "") -> str:
        return f"{value:{sign}.{digits}f}" if math.isfinite(value) else "n/a"

    interval = f"{text(row['ci95_low'], '+')} to {text(row['ci95_high'], '+')}"
    return [
        row["organ"],
        text(row["mean_a"]),
        text(row["mean_b"]),
        text(row["difference"], "+"),
        interval if math.isfinite(row["ci95_low"]) else "n/a",
        f"{row['p']:.3g}" if math.isfinite(row["p"]) else "n/a",
        str(row["n"]),
    ]
