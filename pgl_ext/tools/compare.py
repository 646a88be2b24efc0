"""Paired comparison of evaluations: differences of their scores, case by case, with intervals and p values.

:mod:`pgl_ext.evaluation.metrics` gives no score (NaN) where an organ is in neither reference nor prediction, and the
worst one where it is only predicted. Where one run predicts an absent organ and another does not, leaving that case out
would hide the error: so here the run that is right has the perfect score, Dice 1 and HD95 0 mm. An organ that was not
annotated in a case, in one run or in all, has no part in a comparison.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import wilcoxon

from pgl_ext.evaluation.figures import draw_points, organ_panels, save_panels
from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.evaluation.summary import (
    AVERAGE,
    confidence_interval,
    finite,
    finite_mean,
    interval_text,
    number_text,
    table,
)
from pgl_ext.figures.base import BLUE, GREY, ORANGE, organ_colors
from pgl_ext.files import read_csv, write_csv

__all__ = [
    "Scores",
    "by_organ",
    "common_keys",
    "compare_runs",
    "paired_scores",
    "paired_statistics",
    "plot_differences",
    "read_scores",
]

_COMPARED = ("dice", "hd95_mm")
# Of fewer pairs even the clearest difference has p > 0.05.
_LEAST_PAIRS = 6
_LISTED = 10
# Volume of the organs' references, which is the same in all runs but for rounding.
_REFERENCE = "reference_ml"
_SAME = 1.01

_Key = tuple[str, str]
"""A case and an organ."""

Scores = dict[str, dict[_Key, float]]
"""By metric, and by case and organ."""

_ByOrgan = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By metric, run and organ."""


# --- reading --------------------------------------------------------------------------------------------------------


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
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give the output_dir of a complete evaluation (run evaluating of pgl_segmentation)."
        )
    rows = read_csv(path)
    missing = [name for name in ("case", "organ", *metrics) if rows and name not in rows[0]]
    if missing or not rows:
        problem = f"lacks the columns {missing}" if missing else "holds no case"
        raise ValueError(f"{path} {problem}: give the output_dir of a complete evaluation.")
    if len(set(map(_key, rows))) < len(rows):
        raise ValueError(f"{path} holds a case and organ more than once: evaluate again, with a new --output_dir.")
    return {metric: {_key(row): _number(row[metric]) for row in rows} for metric in metrics}


def _key(row: Mapping[str, str]) -> _Key:
    return row["case"], row["organ"]


def _number(cell: str) -> float:
    return float(cell or "nan")


def common_keys(evaluated: Mapping[str, Iterable[_Key]], common: bool = False) -> list[_Key]:
    """Cases and organs that all evaluations have, in the order of the first.

    Args:
        evaluated: cases and organs by name of the evaluation.
        common: whether others may be left out.

    Raises:
        ValueError: evaluations have other cases or organs.
    """
    first, *others = evaluated.values()
    shared = [key for key in first if all(key in other for other in others)]
    every = sorted(set().union(*evaluated.values()))
    if len(shared) < len(every) and not common:
        lacking = {name: [key for key in every if key not in keys] for name, keys in evaluated.items()}
        lines = [f"  {name} lacks {_listed(keys)}" for name, keys in lacking.items() if keys]
        raise ValueError(
            "the runs have other cases or organs:\n"
            + "\n".join(lines)
            + "\nEvaluate all on the same data list, or compare what all have with --common true."
        )
    if not shared:
        raise ValueError("the runs have no case and organ in common: evaluate all on the same data list.")
    return shared


def _annotated_keys(keys: Iterable[_Key], folders: Iterable[str]) -> list[_Key]:
    """The cases and organs that are annotated in all evaluations, where these have the same reference."""
    volumes: dict[_Key, list[float]] = {key: [] for key in keys}
    for folder in folders:
        for row in read_csv(Path(folder) / "cases.csv"):
            if _key(row) in volumes and _REFERENCE in row:
                volumes[_key(row)].append(_number(row[_REFERENCE]))
    annotated = {key: values for key, values in volumes.items() if not any(map(math.isnan, values))}
    if not annotated:
        raise ValueError("no organ is annotated in all runs: evaluate all on the same data list, with annotations.")
    differing = [key for key, values in annotated.items() if values and max(values) > _SAME * min(values)]
    if differing:
        raise ValueError(
            f"the runs have references of other volumes for {_listed(differing)}: they were evaluated with other label "
            "maps, or scans of several patients have one name. Evaluate all on the same data list."
        )
    return list(annotated)


def _listed(keys: Sequence[_Key]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(f"{case} ({organ})" for case, organ in keys[:_LISTED]) + more


# --- statistics -----------------------------------------------------------------------------------------------------


def by_organ(scores: Mapping[_Key, float], keys: Iterable[_Key]) -> dict[str, list[float]]:
    """Per organ the values of the cases, in the order of the keys, NaN where it is not among a case's keys."""
    wanted = {key: scores[key] for key in keys}
    cases, organs = (list(dict.fromkeys(column)) for column in zip(*wanted, strict=True))
    return {organ: [wanted.get((case, organ), math.nan) for case in cases] for organ in organs}


def paired_scores(
    first: Sequence[Scores], second: Sequence[Scores], keys: Iterable[_Key]
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
    keys, pairs = list(keys), {}
    for metric, scores in first[0].items():
        names = [*by_organ(scores, keys), AVERAGE]
        # (repetitions, organs, cases)
        runs = [np.array([list(by_organ(part[metric], keys).values()) for part in run]) for run in (first, second)]
        scored = np.isfinite(np.concatenate(runs)).any(0)
        sides = []
        for values in runs:
            organs = np.where(scored & np.isnan(values), METRICS[metric].perfect, values).mean(0)
            sides.append([*organs, np.array([finite_mean(case) for case in organs.T])])
        pairs[metric] = dict(zip(names, zip(*sides, strict=True), strict=True))
    return pairs


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
    mean_a, mean_b, difference = map(finite_mean, (*pairs, differences))
    enough = np.count_nonzero(differences) >= _LEAST_PAIRS
    return {
        "n": differences.size,
        "mean_a": mean_a,
        "mean_b": mean_b,
        "difference": difference,
        "ci95_low": low,
        "ci95_high": high,
        "p": float(wilcoxon(differences).pvalue) if enough else math.nan,
    }


# --- whole comparisons ----------------------------------------------------------------------------------------------


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
    reference, *names = _names(folders, names)
    scores = {folder: read_scores(folder) for run in folders for folder in run}
    keys = common_keys({folder: read["dice"] for folder, read in scores.items()}, common)
    keys = _annotated_keys(keys, scores)
    first, *others = ([scores[folder] for folder in run] for run in folders)
    paired = {name: paired_scores(first, other, keys) for name, other in zip(names, others, strict=True)}
    pairs = {metric: {name: paired[name][metric] for name in names} for metric in _COMPARED}
    statistics = _for_each(pairs, lambda pair: paired_statistics(*pair))
    if out is not None:
        rows = [
            {"metric": metric, "organ": organ, "run": name, "reference": reference, **values}
            for metric, compared in statistics.items()
            for name, organs in compared.items()
            for organ, values in organs.items()
        ]
        write_csv(Path(out) / "compare.csv", rows)
        differences = _for_each(pairs, lambda pair: pair[1] - pair[0])
        intervals = _for_each(statistics, itemgetter("difference", "ci95_low", "ci95_high"))
        plot_differences(differences, intervals, Path(out) / "compare.png", reference)
    return _text(statistics, reference, len({case for case, _ in keys}))


def _folders(run: str | Sequence[str]) -> list[str]:
    parts = run if isinstance(run, (list, tuple)) else str(run).split(",")
    return [os.path.normpath(str(part).strip()) for part in parts if str(part).strip()]


def _names(folders: Sequence[Sequence[str]], names: Sequence[str] | None) -> list[str]:
    if names is None:
        names = [Path(run[0]).name for run in folders]
        if len(set(names)) < len(names):
            names = [run[0] for run in folders]
    if len(names) != len(folders) or len(set(names)) < len(names):
        raise ValueError(f"names must be {len(folders)} different ones, one per run, got {list(names)}.")
    return [str(name) for name in names]


def _for_each(values: _ByOrgan, function: Callable[[Any], Any]) -> _ByOrgan:
    """A function of the values by metric, run and organ."""
    return {
        metric: {run: {organ: function(value) for organ, value in organs.items()} for run, organs in runs.items()}
        for metric, runs in values.items()
    }


def _text(statistics: _ByOrgan, reference: str, cases: int) -> str:
    tables = [f"{cases} cases, paired; differences are to {reference}"]
    for metric, runs in statistics.items():
        for name, organs in runs.items():
            head = (METRICS[metric].title, reference, name, "difference", "95 % CI", "Wilcoxon p", "cases")
            digits = METRICS[metric].digits + 1
            tables.append(table(head, [_text_row(organ, values, digits) for organ, values in organs.items()]))
    return "\n\n".join(tables)


def _text_row(organ: str, values: Mapping[str, float], digits: int) -> list[str]:
    means = [number_text(values[name], f".{digits}f") for name in ("mean_a", "mean_b")]
    difference = number_text(values["difference"], f"+.{digits}f")
    interval = interval_text((values["ci95_low"], values["ci95_high"]), f"+.{digits}f")
    return [organ, *means, difference, interval, number_text(values["p"], ".3g"), str(values["n"])]


# --- the picture ----------------------------------------------------------------------------------------------------


def plot_differences(differences: _ByOrgan, intervals: _ByOrgan, out_path: str | Path, reference: str) -> Figure:
    """Paired differences to a reference per organ: every case as a point, the mean with its confidence interval.

    Args:
        differences: by metric, run and organ the cases' differences; NaN is left out.
        intervals: by metric, run and organ the mean and both ends of its confidence interval; NaN is not drawn.
        out_path: picture to write.
        reference: name of the run that the others are compared with.
    """
    runs = next(iter(differences.values()))
    organs = list(next(iter(runs.values())))
    width = max(4.5, 1.8 + 0.32 * len(organs) * (len(runs) + 1))
    figure, panels = organ_panels(len(differences), (width, 3.3 * len(differences) + 0.8))
    for axes, metric in zip(panels, differences, strict=True):
        axes.axhline(0, color=GREY, linewidth=1)
        _draw_runs(axes, differences[metric], intervals[metric])
        better = "higher" if METRICS[metric].higher_is_better else "lower"
        axes.set_ylabel(f"{METRICS[metric].title} minus {reference}\n({better} is better)", fontsize=9)
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize="small")
    save_panels(figure, organs, out_path)
    return figure


def _draw_runs(axes: Axes, differences: Mapping, intervals: Mapping) -> None:
    """Draw runs beside each other, at the place of each organ."""
    colors = [BLUE, ORANGE, *0.8 * organ_colors(len(differences))[2:]]
    for number, (run, organs) in enumerate(differences.items()):
        shift = (number - (len(differences) - 1) / 2) * 0.8 / len(differences)
        for place, (organ, values) in enumerate(organs.items()):
            at, color = place + shift, colors[number]
            draw_points(axes, at, finite(values), 0.12, s=9, color=color, alpha=0.35)
            mean, low, high = intervals[run][organ]
            axes.plot([at, at], [low, high], color=color, linewidth=2.2)
            label = run if place == 0 else None
            axes.plot(at, mean, "D", color=color, markersize=5, markeredgecolor="white", label=label)
