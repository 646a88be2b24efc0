"""What comparisons and studies are shown as: tables of texts, and pictures of values with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from pgl_ext.evaluation.figures import draw_points, organ_panels, save_panels
from pgl_ext.evaluation.summary import finite, interval_text, number_text, table
from pgl_ext.figures.base import GREY, organ_colors

__all__ = ["Estimate", "Table", "difference_texts", "legend_above", "method_colors", "plot_estimates", "score_text"]


class Table(NamedTuple):
    """A table of texts: its title, the heads of its columns, and its rows."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        return table(self.head, self.rows)

    def markdown(self) -> str:
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def difference_texts(row: Mapping[str, Any], digits: int) -> list[str]:
    """Difference, its 95 % interval, p and Holm's p of a row of :func:`pgl_ext.tools.compare.comparison_rows`."""
    interval = interval_text((row["ci95_low"], row["ci95_high"]), digits, "+")
    p = [f"{row[name]:.3g}" if math.isfinite(row[name]) else "" for name in ("p", "p_holm")]
    return [number_text(row["difference"], digits, "+"), interval, *p]


def score_text(row: Mapping[str, Any], digits: int) -> str:
    """A row's ``mean`` and, of several seeds, its ``sd``."""
    spread = f" ± {number_text(row['sd'], digits)}" if math.isfinite(row["sd"]) else ""
    return number_text(row["mean"], digits) + spread


class Estimate(NamedTuple):
    """A value to draw: its panel, named by what it measures, its place on the x axis, and the method that it is of.

    From ``low`` to ``high`` is its interval; NaN is not drawn. ``points`` are what it is the mean of.
    """

    panel: str
    place: str
    method: str
    value: float
    low: float
    high: float
    points: tuple[float, ...] = ()


def plot_estimates(
    estimates: Sequence[Estimate],
    colors: Mapping[str, object],
    out_path: Path,
    differences: bool = True,
    lines: bool = False,
) -> Figure:
    """Values with their intervals: panels below each other, at each place one value of every method.

    Args:
        estimates: in the order in which they are shown.
        colors: by method.
        out_path: picture to write.
        differences: whether 0 means that methods do not differ, and is marked.
        lines: whether a line connects the values of a method.
    """
    panels, places, methods = (list(dict.fromkeys(column)) for column in list(zip(*estimates, strict=True))[:3])
    width = max(6.5, 1.8 + len(places) * max(0.9, 0.2 * (len(methods) + 1)))
    figure, rows = organ_panels(len(panels), (width, 3.1 * len(panels) + 0.9))
    step = min(0.08 if lines else 0.25, 0.8 / len(methods))
    for axes, panel in zip(rows, panels, strict=True):
        if differences:
            axes.axhline(0, color=GREY, linewidth=1)
        axes.set_ylabel(panel, fontsize=9)
        for number, method in enumerate(methods):
            drawn = [estimate for estimate in estimates if (estimate.panel, estimate.method) == (panel, method)]
            shift, color = (number - (len(methods) - 1) / 2) * step, colors[method]
            at = np.array([places.index(estimate.place) + shift for estimate in drawn])
            for place, estimate in zip(at, drawn, strict=True):
                draw_points(axes, place, finite(estimate.points), 0.4 * step, s=9, color=color, alpha=0.35)
            axes.vlines(at, [one.low for one in drawn], [one.high for one in drawn], color=color, linewidth=2)
            style = {"color": color, "markersize": 5, "markeredgecolor": "white", "label": method}
            axes.plot(at, [one.value for one in drawn], "D-" if lines else "D", **style)
    legend_above(figure)
    save_panels(figure, places, out_path)
    return figure


def legend_above(figure: Figure) -> None:
    """One legend for all panels, above them, where no line runs; a method may be in some panels only."""
    handles = {}
    for axes in figure.axes:
        handles |= {handle.get_label(): handle for handle in axes.get_legend_handles_labels()[0]}
    place = "outside upper center"
    figure.legend(handles.values(), handles.keys(), loc=place, ncols=3, frameon=False, fontsize="small")


def method_colors(methods: Iterable[str], reference: str) -> dict[str, object]:
    """A colour for each method, the same in all pictures; the reference is grey."""
    compared = [method for method in methods if method != reference]
    chosen = [color for index, color in enumerate(colormaps["tab10"].colors) if index != 7]  # without its grey
    further = 0.7 * organ_colors(max(0, len(compared) - len(chosen)))
    return {reference: GREY, **dict(zip(compared, [*chosen, *further], strict=False))}
