"""Paired comparison of evaluations: differences of their scores over seeds and cases, with intervals and p values.

:mod:`pgl_ext.evaluation.metrics` gives no score (NaN) where an organ is in neither reference nor prediction, and the
worst one where it is only predicted. Where one run predicts an absent organ and another does not, leaving that case out
would hide the error: so here the run that is right has the perfect score, Dice 1 and HD95 0 mm. An organ that was not
annotated in a case, in one run or in all, has no part in a comparison.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgl_ext.errors import few
from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.evaluation.summary import AVERAGE, number_text
from pgl_ext.evaluation.verdict import LEAST_SEEDS, SINGLE_RUNS, holm, paired_statistics, verdict
from pgl_ext.files import read_csv, write_csv
from pgl_ext.tools.tables import Estimate, Table, difference_texts, method_colors, plot_estimates

__all__ = [
    "Scores",
    "common_keys",
    "compare_runs",
    "comparison_rows",
    "comparison_tables",
    "mean_scores",
    "organ_names",
    "paired_scores",
    "read_comparison",
    "read_scores",
    "score_array",
    "verdicts",
    "with_average",
]

_COMPARED = ("dice", "hd95_mm")
_NAMES = ("metric", "organ", "run", "reference")
_NUMBERS = ("seeds", "n", "mean_a", "mean_b", "difference", "ci95_low", "ci95_high", "p", "p_holm")
# Volume of the organs' references, which is the same in all runs but for rounding.
_REFERENCE = "reference_ml"
_SAME = 1.01

_Key = tuple[str, str]
"""A case and an organ."""

Scores = dict[_Key, dict[str, float]]
"""By case and organ, the columns of an evaluation's ``cases.csv``."""


# --- reading --------------------------------------------------------------------------------------------------------


def read_scores(folder: str | os.PathLike, metrics: Sequence[str] = _COMPARED) -> Scores:
    """The scores that an evaluation wrote.

    Args:
        folder: the evaluation's ``output_dir``, or that of a training with its ``evaluation`` below.
        metrics: columns of its ``cases.csv`` to read, by default Dice and HD95.

    Returns:
        By case and organ, the metrics, and the volume of the reference where the file has it; NaN where a case has no
        value, as of an organ that is not annotated.

    Raises:
        FileNotFoundError: there is no ``cases.csv`` in the folder.
        ValueError: it lacks columns, holds no case, or holds one twice.
    """
    path = Path(folder) / "cases.csv"
    below = Path(folder) / "evaluation" / "cases.csv"
    path = below if below.is_file() and not path.is_file() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give the output_dir of a complete evaluation (run evaluating of pgl_segmentation)."
        )
    rows = read_csv(path)
    missing = [name for name in ("case", "organ", *metrics) if rows and name not in rows[0]]
    if missing or not rows:
        problem = f"lacks the columns {missing}" if missing else "holds no case"
        raise ValueError(f"{path} {problem}: give the output_dir of a complete evaluation.")
    columns = [name for name in (*metrics, _REFERENCE) if name in rows[0]]
    scores = {(row["case"], row["organ"]): {name: float(row[name] or "nan") for name in columns} for row in rows}
    if len(scores) < len(rows):
        raise ValueError(f"{path} holds a case and organ more than once: evaluate again, with a new --output_dir.")
    return scores


def common_keys(evaluations: Mapping[str, Scores], common: bool = False) -> list[_Key]:
    """Cases and organs that all evaluations have, annotated and with the same reference, in the order of the first.

    Args:
        evaluations: scores by name of the evaluation.
        common: whether others may be left out.

    Raises:
        ValueError: evaluations have other cases or organs, or were made with other label maps.
    """
    first, *others = evaluations.values()
    shared = [key for key in first if all(key in other for other in others)]
    every = sorted(set().union(*evaluations.values()))
    if len(shared) < len(every) and not common:
        lacking = {name: [key for key in every if key not in keys] for name, keys in evaluations.items()}
        lines = [f"  {name} lacks {_listed(keys)}" for name, keys in lacking.items() if keys]
        raise ValueError(
            "the runs have other cases or organs:\n"
            + "\n".join(lines)
            + "\nEvaluate all on the same data list, or compare what all have with --common true."
        )
    if not shared:
        raise ValueError("the runs have no case and organ in common: evaluate all on the same data list.")
    volumes = {
        key: [scores[key][_REFERENCE] for scores in evaluations.values() if _REFERENCE in scores[key]] for key in shared
    }
    annotated = [key for key in shared if not any(map(math.isnan, volumes[key]))]
    if not annotated:
        raise ValueError("no organ is annotated in all runs: evaluate all on the same data list, with annotations.")
    differing = [key for key in annotated if volumes[key] and max(volumes[key]) > _SAME * min(volumes[key])]
    if differing:
        raise ValueError(
            f"the runs have references of other volumes for {_listed(differing)}: they were evaluated with other label "
            "maps, or scans of several patients have one name. Evaluate all on the same data list."
        )
    return annotated


def _listed(keys: Iterable[_Key]) -> str:
    return few([f"{case} ({organ})" for case, organ in keys], 10)


# --- scores as arrays -----------------------------------------------------------------------------------------------


def organ_names(keys: Iterable[_Key]) -> list[str]:
    """The organs of cases and organs, each once, and ``"average"``."""
    return [*dict.fromkeys(organ for _, organ in keys), AVERAGE]


def mean_scores(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean along an axis of what is finite, NaN where nothing is."""
    return np.ma.masked_invalid(values).mean(axis).filled(np.nan)


def score_array(evaluations: Sequence[Scores], metric: str, keys: Sequence[_Key]) -> np.ndarray:
    """Scores of evaluations side by side.

    Args:
        evaluations: in their order.
        metric: one that was read.
        keys: cases and organs, from :func:`common_keys`.

    Returns:
        (evaluations, organs, cases); NaN where a case has no value or an organ is not among its keys.
    """
    cases, organs, wanted = dict.fromkeys(case for case, _ in keys), organ_names(keys)[:-1], set(keys)
    values = [
        [[one[case, organ][metric] if (case, organ) in wanted else math.nan for case in cases] for organ in organs]
        for one in evaluations
    ]
    return np.array(values, dtype=np.float64).reshape(len(evaluations), len(organs), len(cases))


def with_average(values: np.ndarray) -> np.ndarray:
    """Scores (evaluations, organs, cases) with the cases' averages over their organs as a further organ."""
    return np.concatenate([values, mean_scores(values, 1)[:, None]], 1)


def paired_scores(first: Sequence[Scores], second: Sequence[Scores], metric: str, keys: Sequence[_Key]) -> np.ndarray:
    """The scores of two methods side by side.

    Args:
        first: the reference, with several seeds; where there are not as many of the other, seeds cannot be paired, and
            the means over those of each take the place of a single one.
        second: the other method.
        metric: one that was read.
        keys: cases and organs, from :func:`common_keys`.

    Returns:
        (2, seeds, organs and their average, cases), the reference first. NaN where no seed of either has a value; where
        some do, one without has the perfect score, as the module says.
    """
    sides = [score_array(evaluations, metric, keys) for evaluations in (first, second)]
    scored = np.isfinite(np.concatenate(sides)).any(0)
    sides = [np.where(scored & np.isnan(values), METRICS[metric].perfect, values) for values in sides]
    if len(first) != len(second):
        sides = [values.mean(0, keepdims=True) for values in sides]
    return np.array([with_average(values) for values in sides])


def comparison_rows(
    methods: Mapping[str, tuple[Sequence[Scores], Sequence[Scores]]], metric: str, keys: Sequence[_Key]
) -> list[dict[str, Any]]:
    """Compare methods with a reference.

    Args:
        methods: by name, the seeds of the reference that it is compared with, and its own.
        metric: one that was read.
        keys: cases and organs, from :func:`common_keys`.

    Returns:
        A row for each method and organ, and for the average: ``run``, ``metric``, ``organ``, what
        :func:`pgl_ext.evaluation.verdict.paired_statistics` finds; for the average ``p_holm``, adjusted for the number
        of methods; and ``differences`` (cases), each averaged over the seeds.
    """
    rows = []
    for name, (first, second) in methods.items():
        pairs = paired_scores(first, second, metric, keys)
        for place, organ in enumerate(organ_names(keys)):
            names = {"metric": metric, "organ": organ, "run": name}
            statistics = paired_statistics(*pairs[:, :, place])
            differences = mean_scores(pairs[1] - pairs[0], 0)[place]
            rows.append({**names, **statistics, "p_holm": math.nan, "differences": differences})
    averages = [row for row in rows if row["organ"] == AVERAGE]
    for row, adjusted in zip(averages, holm([row["p"] for row in averages]), strict=True):
        row["p_holm"] = adjusted
    return rows


# --- whole comparisons ----------------------------------------------------------------------------------------------


def compare_runs(
    runs: Sequence[str | Sequence[str]],
    names: Sequence[str] | None = None,
    out: str | os.PathLike | None = None,
    common: bool = False,
) -> str:
    """Compare evaluations with the first of them, over seeds and cases.

    Args:
        runs: output folders of evaluations, at least two. Several folders in place of one, as a list or with commas
            between them, are seeds, in the same order for all. Of fewer than three nothing is called a difference.
        names: of the runs; by default their folders'.
        out: folder for ``compare.csv`` and ``compare.png``; made if missing. None: only return the table.
        common: compare the cases and organs that all runs have, instead of stopping where they differ.

    Returns:
        What differs, in words, and tables as text: per metric and organ, and of the cases' average over their organs,
        the means, the mean difference with its 95 % confidence interval, and p.

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
    keys = common_keys(scores, common)
    first, *others = ([scores[folder] for folder in run] for run in folders)
    methods = {name: (first, other) for name, other in zip(names, others, strict=True)}
    rows = [row | {"reference": reference} for metric in _COMPARED for row in comparison_rows(methods, metric, keys)]
    if out is not None:
        write_csv(Path(out) / "compare.csv", [{name: row[name] for name in (*_NAMES, *_NUMBERS)} for row in rows])
        plot_estimates(_estimates(rows), method_colors(names, reference), Path(out) / "compare.png")
    head = f"{len({case for case, _ in keys})} cases, paired; differences are to {reference}"
    return "\n\n".join([head, *verdicts(rows), *(table.text() for table in comparison_tables(rows))])


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


def _estimates(rows: Iterable[Mapping[str, Any]]) -> list[Estimate]:
    """The mean differences with their intervals and those of all cases, a panel for each metric."""
    estimates = []
    for row in rows:
        metric = METRICS[row["metric"]]
        better = "higher" if metric.higher_is_better else "lower"
        panel = f"{metric.title} minus {row['reference']}\n({better} is better)"
        values = [row[name] for name in ("organ", "run", "difference", "ci95_low", "ci95_high")]
        estimates.append(Estimate(panel, *values, tuple(row["differences"])))
    return estimates


def read_comparison(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of the ``compare.csv`` that :func:`compare_runs` wrote; those of before seeds counted are of one seed.

    Raises:
        FileNotFoundError: there is none in the folder.
    """
    path = Path(folder) / "compare.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run 'pgl compare ... --out {folder}'.")
    return [
        {name: row[name] for name in _NAMES}
        | {name: float(row.get(name, "1" if name == "seeds" else "") or "nan") for name in _NUMBERS}
        for row in read_csv(path)
    ]


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on which runs differ from the reference, of the average of each metric; rows as in ``compare.csv``."""
    sentences = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        averages = {row["run"]: row for row in rows if (row["metric"], row["organ"]) == (metric, AVERAGE)}
        if averages:
            text = verdict(averages, rows[0]["reference"], METRICS[metric].higher_is_better)
            sentences.append(f"Average {METRICS[metric].title}: {text}.")
    return sentences + [SINGLE_RUNS] * any(row["seeds"] < LEAST_SEEDS for row in rows)


def comparison_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each metric and run, of rows as in ``compare.csv``; without p where there are too few seeds."""
    tables = []
    for metric, run in dict.fromkeys((row["metric"], row["run"]) for row in rows):
        part = [row for row in rows if (row["metric"], row["run"]) == (metric, run)]
        title, digits, reference = METRICS[metric].title, METRICS[metric].digits + 1, part[0]["reference"]
        tested = part[0]["seeds"] >= LEAST_SEEDS
        interval = ["95 % CI", "p", "p (Holm)"] if tested else ["95 % CI of cases"]
        head = [title, reference, run, "difference", *interval, "cases"]
        table = Table(f"{title}, {run} minus {reference}", head, [])
        for row in part:
            means = [number_text(row[name], digits) for name in ("mean_a", "mean_b")]
            differences = difference_texts(row, digits)[: len(interval) + 1]
            table.rows.append([row["organ"], *means, *differences, f"{row['n']:.0f}"])
        tables.append(table)
    return tables
