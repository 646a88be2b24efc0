"""Pictures of a study: methods compared by the number of labelled cases, by organ, and while they are fine-tuned."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from pgl_ext.evaluation.summary import AVERAGE
from pgl_ext.figures.base import GREY, name_ticks, organ_colors, save_figure, tidy
from pgl_ext.figures.curves import MetricsFile
from pgl_ext.tools.study.results import Results
from pgl_ext.tools.study.runs import labels_text

__all__ = ["draw_figures", "method_colors", "plot_estimates", "plot_learning_curves"]

Estimate = tuple[float, float, float]
"""A value and both ends of its interval; NaN is not drawn."""

Curve = tuple[np.ndarray, np.ndarray]
"""Ascending steps and values."""

_PICTURES = ("gains.png", "organs.png", "ablations.png", "learning_curves.png")
_GAIN = ("difference", "ci95_low", "ci95_high")


def draw_figures(results: Results) -> None:
    """Draw ``gains.png``, ``organs.png``, ``ablations.png`` and ``learning_curves.png``, those that have anything."""
    study = results.study
    for name in _PICTURES:  # of a study that was in this folder before
        (study.folder / name).unlink(missing_ok=True)
    colors = method_colors(study.methods, study.reference)
    shares = [labels_text(labels) for labels in study.labels]
    gain, gains = f"average Dice minus {study.reference}", _gains(results)
    ablations = {method: gains[method] for method in study.ablations if method in gains}
    if gains:
        plot_estimates({"": gains}, shares, colors, gain, study.folder / "gains.png", lines=True)
    if ablations:
        plot_estimates({"": ablations}, shares, colors, gain, study.folder / "ablations.png")
    if results.tables:
        plot_estimates(_organ_scores(results), results.organs, colors, "Dice", study.folder / "organs.png")
    curves = _learning_curves(results)
    if curves:
        plot_learning_curves(curves, colors, study.reference, study.folder / "learning_curves.png")


def _gains(results: Results) -> dict[str, list[Estimate]]:
    """By method its gain in the average for each share of labels, NaN where there is none."""
    gains = {}
    for method in results.study.methods:
        tables = [results.tables.get((labels, "dice"), {}) for labels in results.study.labels]
        rows = [table[method][AVERAGE] if method in table else {} for table in tables]
        if any(row.get("paired_seeds") for row in rows):
            gains[method] = [tuple(row.get(name, math.nan) for name in _GAIN) for row in rows]
    return gains


def _organ_scores(results: Results) -> dict[str, dict[str, list[Estimate]]]:
    """By share of labels and method the mean of each organ, with one standard deviation over seeds to either side."""
    return {
        labels_text(labels): {
            method: [(row["mean"], row["mean"] - row["sd"], row["mean"] + row["sd"]) for row in rows.values()]
            for method, rows in table.items()
        }
        for (labels, metric), table in results.tables.items()
        if metric == "dice"
    }


def _learning_curves(results: Results) -> dict[str, dict[str, list[Curve]]]:
    """By share of labels and method the validations of each fine-tuning that had some."""
    curves: dict[str, dict[str, list[Curve]]] = {}
    for run in sorted(results.scores, key=lambda run: run.labels):
        # Where nothing was logged, that is no reason to go without tables.
        with contextlib.suppress(OSError, ValueError):
            curve = MetricsFile(run.folder / "metrics.csv")("val_mean_dice")
            if len(curve[0]):
                curves.setdefault(labels_text(run.labels), {}).setdefault(run.method, []).append(curve)
    return curves


def method_colors(methods: Sequence[str], reference: str) -> dict[str, object]:
    """A colour for each method, the same in all pictures; the reference is grey."""
    compared = [method for method in methods if method != reference]
    chosen = [color for index, color in enumerate(colormaps["tab10"].colors) if index != 7]  # without its grey
    further = 0.7 * organ_colors(max(0, len(compared) - len(chosen)))
    return {reference: GREY, **dict(zip(compared, [*chosen, *further], strict=False))}


def plot_estimates(
    panels: Mapping[str, Mapping[str, Sequence[Estimate]]],
    groups: Sequence[str],
    colors: Mapping[str, object],
    ylabel: str,
    out_path: Path,
    lines: bool = False,
) -> Figure:
    """Groups of bars, in each one bar for every method, or a line through the groups, with intervals.

    Args:
        panels: by title of the panel and method the value and interval for each group.
        groups: names of the groups, such as organs.
        colors: by method.
        ylabel: what the values are.
        out_path: picture to write.
        lines: instead of bars.
    """
    methods = max(map(len, panels.values()))
    group_width = 1.9 if lines else 0.11 * (methods + 1.5)  # inches
    figure = Figure((max(6.5, 1.5 + group_width * len(groups)), 2.9 * len(panels) + 0.9), dpi=120, layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, (title, by_method) in zip(rows, panels.items(), strict=True):
        axes.axhline(0, color=GREY, linewidth=1)
        step = min(0.08, 0.6 / len(by_method)) if lines else 0.8 / len(by_method)
        for number, (method, estimates) in enumerate(by_method.items()):
            places = np.arange(len(groups)) + (number - (len(by_method) - 1) / 2) * step
            values, *ends = np.array(estimates, dtype=float).reshape(-1, 3).T
            if lines:
                axes.plot(places, values, "o-", color=colors[method], markersize=4.5, linewidth=1.5, label=method)
            else:
                axes.bar(places, values, step, color=colors[method], label=method)
            axes.vlines(places, *ends, color=colors[method] if lines else "#333333", linewidth=1.2)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel(ylabel)
        axes.set_axisbelow(True)
    name_ticks(rows[-1], groups)
    rows[-1].set_xlim(-0.6, len(groups) - 0.4)
    return _saved(figure, out_path)


def plot_learning_curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]], colors: Mapping[str, object], reference: str, out_path: Path
) -> Figure:
    """Dice of validation cases while methods are fine-tuned: the mean over the seeds, which are drawn faint.

    Args:
        panels: by title of the panel and method the curve of each seed.
        colors: by method.
        reference: method that the others are compared with: dashed, on top of them.
        out_path: picture to write.
    """
    figure = Figure((max(6.5, 3.6 * len(panels)), 4.2), dpi=120, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, methods) in zip(row, panels.items(), strict=True):
        for method, curves in methods.items():
            color = colors[method]
            for steps, values in curves if len(curves) > 1 else []:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
            line, zorder = ("o--", 3) if method == reference else ("o-", 2)
            axes.plot(*_mean(curves), line, color=color, markersize=3.5, linewidth=1.6, zorder=zorder, label=method)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
    row[0].set_ylabel("Dice of validation cases")
    return _saved(figure, out_path)


def _mean(curves: Sequence[Curve]) -> Curve:
    """The mean at the steps that all have, since one may have stopped early."""
    shared = reduce(np.intersect1d, [steps for steps, _ in curves])
    return shared, np.mean([values[np.isin(steps, shared)] for steps, values in curves], axis=0)


def _saved(figure: Figure, out_path: Path) -> Figure:
    handles = {}
    for axes in figure.axes:
        tidy(axes)
        # A method may be in some panels only.
        handles |= {handle.get_label(): handle for handle in axes.get_legend_handles_labels()[0]}
    # Above the panels, where no line or bar runs.
    place = "outside upper center"
    figure.legend(handles.values(), handles.keys(), loc=place, ncols=3, frameon=False, fontsize="small")
    save_figure(figure, out_path)
    return figure
