"""Training curves."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d

from pgl_ext.figures.base import BLUE, GREY, ORANGE, organ_colors, save_figure, tidy
from pgl_ext.files import read_csv

__all__ = ["MetricsFile", "plot_metrics"]

_ORGAN_DICE = "val_dice_"
_POINTS = {"marker": "o", "markersize": 4}


class MetricsFile:
    """The curves of a metrics file: ``MetricsFile(path)(column)`` is a pair of arrays, ascending steps and values.

    Empty cells are skipped, and a value logged again for a step, as after a resumed run, replaces the older one.

    Args:
        path: CSV file with a header and a column ``step``.

    Raises:
        ValueError: if the file has no rows or no column ``step``.
    """

    def __init__(self, path: str | Path) -> None:
        self.rows = read_csv(path)
        if not self.rows:
            raise ValueError(f"{path} holds no metrics yet: it has no row below its header.")
        self.columns = list(self.rows[0])
        if "step" not in self.columns:
            raise ValueError(f"{path} has no column 'step'; its columns are {self.columns}.")

    def __call__(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        # A missing cell is None where a row is shorter than the header, as the last row of a running job may be.
        cells = {float(r["step"]): float(r[column]) for r in self.rows if r.get("step") and r.get(column)}
        points = sorted(cell for cell in cells.items() if math.isfinite(cell[1]))
        steps, values = np.reshape(points, (-1, 2)).T
        return steps, values


def plot_metrics(csv_path: str | Path, out_path: str | Path, healthy_std: float | None = None) -> Figure:
    """Draw the training curves of a metrics file: loss, Dice, feature std, retrieval, learning rate, momentum.

    Training values are shown faint and smoothed, validation values as points. A panel without any of its columns
    (``loss``, ``val_loss``; ``val_mean_dice`` with ``val_dice_ORGAN``; ``feature_std``, ``val_feature_std``;
    ``val_retrieval_top1``, ``_chance``, ``_untrained``; ``lr``, ``tau``) is left out.

    Args:
        csv_path: see :class:`MetricsFile`.
        out_path: picture to write; the ending sets the format.
        healthy_std: feature std of L2-normalised features spread evenly over C dimensions, 1 / sqrt(C); drawn dashed.

    Raises:
        ValueError: if the file has no rows, no column ``step``, or none of the columns above.
    """
    metrics = MetricsFile(csv_path)
    panels = {
        ("loss", "val_loss"): partial(_draw_training, name="loss", title="loss"),
        ("val_mean_dice",): _draw_dice,
        ("feature_std", "val_feature_std"): partial(_draw_feature_std, healthy_std=healthy_std),
        ("val_retrieval_top1",): _draw_retrieval,
        ("lr", "tau"): _draw_schedules,
    }
    draws = [draw for names, draw in panels.items() if any(len(metrics(name)[0]) for name in names)]
    if not draws:
        raise ValueError(f"{csv_path} has none of the columns that are drawn; its columns are {metrics.columns}.")
    columns = 2 if len(draws) in (2, 4) else min(3, len(draws))
    rows = math.ceil(len(draws) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.3 * rows), dpi=120, layout="constrained")
    for number, draw in enumerate(draws, 1):
        axes = figure.add_subplot(rows, columns, number, xlabel="step")
        tidy(axes)
        draw(axes, metrics)
        _add_legend(axes)
    save_figure(figure, out_path)
    return figure


def _draw_training(axes: Axes, metrics: MetricsFile, name: str, title: str) -> None:
    axes.set_title(title)
    steps, values = metrics(name)
    val_steps, val_values = metrics(f"val_{name}")
    limits = [*val_values]
    if len(steps):
        axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        smoothed = uniform_filter1d(values, 2 * max(1, len(values) // 40) + 1, mode="nearest")
        axes.plot(steps, smoothed, color=BLUE, linewidth=1.6, label="training")
        # A first step that is far off must not flatten the rest of the curve.
        limits += [*np.quantile(values, (0, 0.99))]
    if len(val_steps):
        axes.plot(val_steps, val_values, **_POINTS, color=ORANGE, linewidth=1, label="validation")
    margin = 0.06 * np.ptp(limits) or 0.05 * abs(limits[0]) or 1
    axes.set_ylim(min(limits) - margin, max(limits) + margin)


def _draw_feature_std(axes: Axes, metrics: MetricsFile, healthy_std: float | None) -> None:
    _draw_training(axes, metrics, "feature_std", "feature standard deviation")
    if healthy_std is not None:
        axes.axhline(healthy_std, color=GREY, linestyle="--", linewidth=1, label=f"1/√C = {healthy_std:.3g}")
    # From 0, since collapse to 0 is what this curve is watched for.
    axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1], healthy_std or 0))


def _draw_retrieval(axes: Axes, metrics: MetricsFile) -> None:
    axes.set_title("retrieval of the corresponding place (top 1)")
    axes.plot(*metrics("val_retrieval_top1"), **_POINTS, color=ORANGE, linewidth=1.6, label="validation")
    for name, style in (("untrained", "--"), ("chance", ":")):
        for constant in metrics(f"val_retrieval_{name}")[1][-1:]:
            axes.axhline(constant, color=GREY, linestyle=style, linewidth=1, label=f"{name} {constant:.3g}")
    axes.set_ylim(bottom=0)


def _draw_dice(axes: Axes, metrics: MetricsFile) -> None:
    axes.set_title("validation Dice")
    steps, values = metrics("val_mean_dice")
    label = f"mean, best {values.max():.3f}"
    axes.plot(steps, values, **_POINTS, color="black", linewidth=1.8, label=label, zorder=3)
    organs = [name for name in metrics.columns if name.startswith(_ORGAN_DICE)]
    for name, color in zip(organs, organ_colors(len(organs)), strict=True):
        # Darker than in overlays: thin bright lines would vanish on white.
        axes.plot(*metrics(name), color=0.75 * color, linewidth=0.8, label=name.removeprefix(_ORGAN_DICE))
    axes.set_ylim(0, 1.05)


def _draw_schedules(axes: Axes, metrics: MetricsFile) -> None:
    curves = {"learning rate": metrics("lr"), "momentum tau": metrics("tau")}
    curves = {label: curve for label, curve in curves.items() if len(curve[0])}
    axes.set_title(" and ".join(curves))
    for color, (label, curve) in zip((BLUE, ORANGE), curves.items(), strict=False):
        scale = axes if color == BLUE else axes.twinx()
        scale.plot(*curve, color=color, linewidth=1.6)
        scale.set_ylabel(label, color=color)
        scale.tick_params(axis="y", labelcolor=color)
        scale.ticklabel_format(axis="y", useOffset=False)
        scale.spines["top"].set_visible(False)


def _add_legend(axes: Axes) -> None:
    count = len(axes.get_legend_handles_labels()[1])
    # Many organs would cover the curves.
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": "x-small"}
    if count:
        axes.legend(framealpha=0.8, edgecolor="none", **(beside if count > 4 else {"fontsize": "small"}))
