"""Methods compared: by the number of labelled cases, by organ, by ablation, and while they are fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from pgl_ext.figures.base import GREY, name_ticks, organ_colors, save_figure, tidy

__all__ = ["method_colors", "plot_bars", "plot_gains", "plot_learning_curves"]

Estimate = tuple[float, float, float]
"""A value and both ends of its interval; NaN is not drawn."""

Curve = tuple[np.ndarray, np.ndarray]
"""Ascending steps and values."""


def method_colors(methods: Sequence[str], reference: str) -> dict[str, object]:
    """A colour for each method, the same in all pictures; the reference is grey."""
    others = [method for method in methods if method != reference]
    chosen = [color for index, color in enumerate(colormaps["tab10"].colors) if index != 7]  # without its grey
    further = 0.7 * organ_colors(max(0, len(others) - len(chosen)))
    return {reference: GREY, **dict(zip(others, [*chosen, *further], strict=False))}


def plot_gains(
    gains: Mapping[str, Sequence[Estimate]],
    labels: Sequence[str],
    colors: Mapping[str, object],
    reference: str,
    out_path: str | Path | None = None,
) -> Figure:
    """A line for each method: its gain in average Dice over the reference by the share of labels.

    Args:
        gains: by method its gain and the interval for each share of labels.
        labels: the shares in words.
        colors: by method.
        reference: name of the method that the others are compared with.
        out_path: picture to write; None: only return the figure.

    Returns:
        The figure.
    """
    figure = Figure((max(5.0, 2.2 + 1.9 * len(labels)), 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=GREY, linewidth=1)
    shift = min(0.08, 0.6 / max(1, len(gains)))
    for number, (method, estimates) in enumerate(gains.items()):
        places = np.arange(len(labels)) + (number - (len(gains) - 1) / 2) * shift
        values, *ends = np.array(estimates, dtype=float).reshape(-1, 3).T
        axes.plot(places, values, "o-", color=colors[method], markersize=4.5, linewidth=1.5, label=method)
        axes.vlines(places, *ends, color=colors[method], linewidth=1.5)
    name_ticks(axes, labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylabel(f"average Dice minus {reference}")
    tidy(axes)
    _finish(figure, out_path)
    return figure


def plot_bars(
    panels: Mapping[str, Mapping[str, Sequence[Estimate]]],
    groups: Sequence[str],
    colors: Mapping[str, object],
    ylabel: str,
    out_path: str | Path | None = None,
) -> Figure:
    """Groups of bars, in each one bar for every method, with intervals.

    Args:
        panels: by title of the panel and method the value and interval for each group.
        groups: names of the groups, such as organs.
        colors: by method.
        ylabel: what the bars show.
        out_path: picture to write; None: only return the figure.

    Returns:
        The figure.
    """
    methods = max(map(len, panels.values()))
    width = max(6.5, 1.5 + 0.11 * len(groups) * (methods + 1.5))
    figure = Figure((width, 2.9 * len(panels) + 0.9), dpi=120, layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, (title, bars) in zip(rows, panels.items(), strict=True):
        axes.axhline(0, color=GREY, linewidth=1)
        for number, (method, estimates) in enumerate(bars.items()):
            places = np.arange(len(groups)) + (number - (len(bars) - 1) / 2) * 0.8 / len(bars)
            values, *ends = np.array(estimates, dtype=float).reshape(-1, 3).T
            axes.bar(places, values, 0.8 / len(bars), color=colors[method], label=method)
            axes.vlines(places, *ends, color="#333333", linewidth=1)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel(ylabel)
        axes.set_axisbelow(True)
        tidy(axes)
    name_ticks(rows[-1], groups)
    rows[-1].set_xlim(-0.6, len(groups) - 0.4)
    _finish(figure, out_path)
    return figure


def plot_learning_curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]],
    colors: Mapping[str, object],
    reference: str,
    out_path: str | Path | None = None,
) -> Figure:
    """Dice of validation cases while methods are fine-tuned: the mean over the seeds, which are drawn faint.

    Args:
        panels: by title of the panel and method the curve of each seed.
        colors: by method.
        reference: method that the others are compared with: dashed, on top of them.
        out_path: picture to write; None: only return the figure.

    Returns:
        The figure.
    """
    figure = Figure((max(6.5, 3.6 * len(panels)), 4.2), dpi=120, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, methods) in zip(row, panels.items(), strict=True):
        for method, curves in methods.items():
            for steps, values in curves if len(curves) > 1 else []:
                axes.plot(steps, values, color=colors[method], alpha=0.25, linewidth=0.7)
            line, zorder = ("o--", 3) if method == reference else ("o-", 2)
            steps, values = _mean_curve(curves)
            axes.plot(
                steps, values, line, color=colors[method], markersize=3.5, linewidth=1.6, zorder=zorder, label=method
            )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        tidy(axes)
    row[0].set_ylabel("Dice of validation cases")
    _finish(figure, out_path)
    return figure


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean at the steps that all have, since one may have stopped early."""
    at_step = [dict(zip(steps, values, strict=True)) for steps, values in curves]
    shared = np.array(sorted(set.intersection(*map(set, at_step))))
    return shared, np.array([np.mean([values[step] for values in at_step]) for step in shared])


def _finish(figure: Figure, out_path: str | Path | None) -> None:
    # A method may be in some panels only.
    found = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    # Above the panels, where no line or bar runs.
    place = "outside upper center"
    figure.legend(found.values(), found.keys(), loc=place, ncols=3, frameon=False, fontsize="small")
    if out_path is not None:
        save_figure(figure, out_path)
