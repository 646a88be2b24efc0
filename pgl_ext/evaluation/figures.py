"""Scores of organs over cases: one evaluation, and how others differ from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.figures.base import BLUE, GREY, ORANGE, name_ticks, organ_colors, save_figure, tidy

__all__ = ["plot_differences", "plot_scores"]


def plot_scores(scores: Mapping[str, Mapping[str, Sequence[float]]], out_path: str | Path | None = None) -> Figure:
    """Box plots of the organs' scores with every case as a point.

    Boxes reach from the first to the third quartile with a line at the median, whiskers to the farthest case within
    1.5 times the box. Diamonds are means.

    Args:
        scores: by metric (``dice``, ``hd95_mm``, ...) and name of the organ the cases' values; NaN is left out.
        out_path: picture to write; None: only return the figure.

    Returns:
        The figure.
    """
    organs = list(next(iter(scores.values())))
    figure = Figure((max(4.0, 1.6 + 0.62 * len(organs)), 3.3 * len(scores) + 0.6), dpi=120, layout="constrained")
    panels = figure.subplots(len(scores), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (metric, values) in zip(panels, scores.items(), strict=True):
        _draw_boxes(axes, [_finite(values[organ]) for organ in organs], organ_colors(len(organs)))
        axes.set_ylabel(METRICS[metric].title)
        axes.set_ylim(*((-0.02, 1.02) if METRICS[metric].higher_is_better else (0, None)))
    name_ticks(panels[-1], organs)
    if out_path is not None:
        save_figure(figure, out_path)
    return figure


def plot_differences(
    differences: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    intervals: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]],
    out_path: str | Path | None = None,
    reference: str = "",
) -> Figure:
    """Paired differences to a reference per organ: every case as a point, the mean with its confidence interval.

    Args:
        differences: by metric, run and organ the cases' differences; NaN is left out.
        intervals: by metric, run and organ the mean and both ends of its confidence interval; NaN is not drawn.
        out_path: picture to write; None: only return the figure.
        reference: name of the run that the others are compared with.

    Returns:
        The figure.
    """
    runs = list(next(iter(differences.values())))
    organs = list(next(iter(differences.values()))[runs[0]])
    width = max(4.5, 1.8 + 0.32 * len(organs) * (len(runs) + 1))
    figure = Figure((width, 3.3 * len(differences) + 0.8), dpi=120, layout="constrained")
    panels = figure.subplots(len(differences), 1, squeeze=False, sharex=True)[:, 0]
    for axes, metric in zip(panels, differences, strict=True):
        axes.axhline(0, color=GREY, linewidth=1)
        for number, (run, color) in enumerate(zip(runs, _run_colors(len(runs)), strict=True)):
            shift = (number - (len(runs) - 1) / 2) * 0.8 / len(runs)
            for place, organ in enumerate(organs):
                values = _finite(differences[metric][run][organ])
                axes.scatter(
                    _spread(place + shift, len(values), 0.12), values, s=9, color=color, alpha=0.35, linewidths=0
                )
                mean, low, high = intervals[metric][run][organ]
                axes.plot([place + shift] * 2, [low, high], color=color, linewidth=2.2)
                label = run if place == 0 else None
                axes.plot(place + shift, mean, "D", color=color, markersize=5, markeredgecolor="white", label=label)
        better = "higher" if METRICS[metric].higher_is_better else "lower"
        axes.set_ylabel(f"{METRICS[metric].title} minus {reference}\n({better} is better)", fontsize=9)
        axes.set_xlim(-0.6, len(organs) - 0.4)
        tidy(axes)
    name_ticks(panels[-1], organs)
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize="small")
    if out_path is not None:
        save_figure(figure, out_path)
    return figure


def _run_colors(count: int) -> list:
    return [BLUE, ORANGE, *0.8 * organ_colors(count)[2:]][:count]


def _finite(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]


def _spread(place: float, count: int, width: float) -> np.ndarray:
    """Positions of points beside each other, the same in every picture."""
    return place + width * (2 * np.random.default_rng(0).random(count) - 1)


def _draw_boxes(axes: Axes, columns: Sequence[Sequence[float]], colors: np.ndarray) -> None:
    for place, (values, color) in enumerate(zip(columns, colors, strict=True)):
        if not values:
            axes.annotate("n/a", (place, 0.5), xycoords=("data", "axes fraction"), ha="center", color=GREY)
            continue
        box = axes.boxplot(values, positions=[place], widths=0.55, showfliers=False, patch_artist=True)
        box["boxes"][0].set(facecolor=(*color, 0.3), edgecolor="#444444")
        box["medians"][0].set(color="black", linewidth=1.4)
        axes.scatter(
            _spread(place, len(values), 0.16), values, s=11, color=0.75 * color, alpha=0.7, linewidths=0, zorder=3
        )
        axes.plot(place, np.mean(values), "D", color="white", markeredgecolor="black", markersize=4.5, zorder=4)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    tidy(axes)
