"""Pictures of a study: methods compared by the number of labelled cases, by organ, and while they are fine-tuned."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pgl_ext.evaluation.summary import AVERAGE
from pgl_ext.figures.base import save_figure, tidy
from pgl_ext.figures.curves import MetricsFile
from pgl_ext.tools.study.efficiency import curve_rows
from pgl_ext.tools.study.results import Results
from pgl_ext.tools.study.runs import labels_text
from pgl_ext.tools.tables import Estimate, legend_above, method_colors, plot_estimates

__all__ = ["draw_figures", "plot_learning_curves"]

Curve = tuple[np.ndarray, np.ndarray]
"""Ascending steps and values."""

_PICTURES = ("gains.png", "labels.png", "organs.png", "ablations.png", "learning_curves.png", "curves.png")


def draw_figures(results: Results) -> None:
    """Draw ``gains.png``, ``labels.png`` (Dice by share of labels, as figure 5 of the PGL paper), ``organs.png``,
    ``ablations.png``, ``learning_curves.png`` (Dice of validation cases) and ``curves.png`` (of test cases), those that
    have anything.
    """
    study = results.study
    for name in _PICTURES:  # of a study that was in this folder before
        (study.folder / name).unlink(missing_ok=True)
    colors = method_colors(study.methods, study.reference)
    gain = f"average Dice minus {study.reference}"
    gains = [
        Estimate(gain, labels_text(row["labels"]), *_values(row, "method", "difference", "ci95_low", "ci95_high"))
        for row in results.select(metric="dice", organ=AVERAGE)
        if row["paired_seeds"]
    ]
    # With one standard deviation over the seeds to either side.
    organs = [
        Estimate(f"Dice, {labels_text(row['labels'])}", *_values(row, "organ", "method", "mean"), low, high)
        for row in results.select(metric="dice")
        for low, high in [(row["mean"] - row["sd"], row["mean"] + row["sd"])]
    ]
    # With one share there is nothing to draw them against.
    by_labels = [
        one._replace(panel="average Dice", place=one.panel.removeprefix("Dice, "))
        for one in organs
        if one.place == AVERAGE and len(study.labels) > 1
    ]
    ablations = [estimate for estimate in gains if estimate.method in study.ablations]
    for name, estimates in (("gains", gains), ("labels", by_labels), ("ablations", ablations), ("organs", organs)):
        if estimates:
            style = {"differences": name in ("gains", "ablations"), "lines": name in ("gains", "labels")}
            plot_estimates(estimates, colors, study.folder / f"{name}.png", **style)
    for name, cases, curves in (
        ("learning_curves", "validation", _learning_curves(results)),
        ("curves", "test", _test_curves(results)),
    ):
        if curves:
            axis = f"Dice of {cases} cases"
            plot_learning_curves(curves, colors, study.reference, axis, study.folder / f"{name}.png")


def _values(row: Mapping[str, object], *names: str) -> list:
    return [row[name] for name in names]


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


def _test_curves(results: Results) -> dict[str, dict[str, list[Curve]]]:
    """By share of labels and method the Dice of each fine-tuning after its kept steps and in the end."""
    curves: dict[str, dict[str, list[Curve]]] = {}
    by_run: dict[tuple, list[dict]] = {}
    for row in sorted(curve_rows(results), key=lambda row: (row["labels"], row["step"])):
        by_run.setdefault((row["labels"], row["method"], row["seed"]), []).append(row)
    for (labels, method, _), points in by_run.items():
        curve = tuple(np.array([point[name] for point in points]) for name in ("step", "dice"))
        curves.setdefault(labels_text(labels), {}).setdefault(method, []).append(curve)
    return curves


def plot_learning_curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]],
    colors: Mapping[str, object],
    reference: str,
    axis: str,
    out_path: Path,
) -> Figure:
    """Dice while methods are fine-tuned: the mean over the seeds, each of which is drawn faint.

    Args:
        panels: by title of the panel and method the curve of each seed.
        colors: by method.
        reference: method that the others are compared with: dashed, on top of them.
        axis: what the values are.
        out_path: picture to write.
    """
    figure = Figure((max(6.5, 3.6 * len(panels)), 4.2), dpi=120, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, methods) in zip(row, panels.items(), strict=True):
        for method, curves in methods.items():
            color = colors[method]
            for steps, values in curves if len(curves) > 1 else []:
                axes.plot(steps, values, ".-", color=color, alpha=0.3, linewidth=0.7, markersize=4)
            line, zorder = ("o--", 3) if method == reference else ("o-", 2)
            axes.plot(*_mean(curves), line, color=color, markersize=3.5, linewidth=1.6, zorder=zorder, label=method)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        tidy(axes)
    row[0].set_ylabel(axis)
    legend_above(figure)
    save_figure(figure, out_path)
    return figure


def _mean(curves: Sequence[Curve]) -> Curve:
    """The mean at the steps that all have, since one may have stopped early."""
    shared = reduce(np.intersect1d, [steps for steps, _ in curves])
    return shared, np.mean([values[np.isin(steps, shared)] for steps, values in curves], axis=0)
