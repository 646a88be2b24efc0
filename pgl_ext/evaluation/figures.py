"""Scores of organs over the cases of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.evaluation.summary import finite
from pgl_ext.figures.base import GREY, name_ticks, organ_colors, save_figure, tidy

__all__ = ["draw_points", "organ_panels", "plot_scores", "save_panels"]


def plot_scores(scores: Mapping[str, Mapping[str, Sequence[float]]], out_path: Path) -> Figure:
    """Box plots of the organs' scores with every case as a point.

    Boxes are quartiles with a line at the median, whiskers reach the farthest case within 1.5 times the box, diamonds
    are means. Scores are by metric (``dice``, ``hd95_mm``, ...) and organ; NaN is left out.
    """
    organs = list(next(iter(scores.values())))
    figure, panels = organ_panels(len(scores), (max(4.0, 1.6 + 0.62 * len(organs)), 3.3 * len(scores) + 0.6))
    for axes, (metric, values) in zip(panels, scores.items(), strict=True):
        for place, (organ, color) in enumerate(zip(organs, organ_colors(len(organs)), strict=True)):
            _draw_box(axes, place, finite(values[organ]), color)
        axes.set_ylabel(METRICS[metric].title)
        axes.set_ylim(*((-0.02, 1.02) if METRICS[metric].higher_is_better else (0, None)))
    save_panels(figure, organs, out_path)
    return figure


def organ_panels(count: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    """A figure of a size in inches with panels below each other, which share the x axis, one place for each organ."""
    figure = Figure(size, dpi=120, layout="constrained")
    return figure, figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]


def save_panels(figure: Figure, organs: Sequence[str], out_path: Path) -> None:
    """Name the organs below the last of the :func:`organ_panels` and write the picture, when all is drawn."""
    for axes in figure.axes:
        axes.set_xlim(-0.6, len(organs) - 0.4)
        tidy(axes)
    name_ticks(figure.axes[-1], organs)
    save_figure(figure, out_path)


def _draw_box(axes: Axes, place: float, values: Sequence[float], color: np.ndarray) -> None:
    if not values:
        axes.annotate("n/a", (place, 0.5), xycoords=("data", "axes fraction"), ha="center", color=GREY)
        return
    box = axes.boxplot(values, positions=[place], widths=0.55, showfliers=False, patch_artist=True)
    box["boxes"][0].set(facecolor=(*color, 0.3), edgecolor="#444444")
    box["medians"][0].set(color="black", linewidth=1.4)
    draw_points(axes, place, values, 0.16, s=11, color=0.75 * color, alpha=0.7, zorder=3)
    axes.plot(place, np.mean(values), "D", color="white", markeredgecolor="black", markersize=4.5, zorder=4)


def draw_points(axes: Axes, place: float, values: Sequence[float], width: float, **style: Any) -> None:
    """Draw values as points around a place on the x axis, spread over ``width`` to both sides, always alike."""
    shifts = width * (2 * np.random.default_rng(0).random(len(values)) - 1)
    axes.scatter(place + shifts, values, linewidths=0, **style)
