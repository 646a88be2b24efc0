"""Training curves."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pgl_ext.figures.base import BLUE, GREY, ORANGE, organ_colors, save_figure

__all__ = ["MetricsFile", "plot_metrics"]

_ORGAN_DICE = "val_dice_"


class MetricsFile:
    """The curves of a metrics file: ``MetricsFile(path)(column)`` is a pair of arrays, ascending steps and values.

    Empty cells are skipped, and a value logged again for a step, as after a resumed run, replaces the older one.

    Args:
        path: CSV file with a header and a column ``step``.

    Raises:
        ValueError: if the file has no rows or no column ``step``.
    """

    def __init__(self, path: str | Path) -> None:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            self.rows = list(reader)
            self.columns = list(reader.fieldnames or [])
        if not self.rows:
            raise ValueError(f"{path} holds no metrics yet: it has no row below its header.")
        if "step" not in self.columns:
            raise ValueError(f"{path} has no column 'step'; its columns are {self.columns}.")

    def __call__(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        # A missing cell is None where a row is shorter than the header, as the last row of a running job may be.
        cells = {float(r["step"]): float(r[column]) for r in self.rows if r.get("step") and r.get(column)}
        found = sorted((step, value) for step, value in cells.items() if math.isfinite(value))
        return np.array([s for s, _ in found]), np.array([v for _, v in found])


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twentieth of the curve, cut off at both ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _draw_train_and_validation(axes: Axes, metrics: MetricsFile, name: str) -> bool:
    steps, values = metrics(name)
    if len(steps):
        axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smoothed(values), color=BLUE, linewidth=1.6, label="training")
        low, high = np.quantile(values, (0, 0.99))
        # A first step that is far off must not flatten the rest of the curve.
        axes.set_ylim(*_padded(low, high))
    val_steps, val_values = metrics(f"val_{name}")
    if len(val_steps):
        axes.plot(val_steps, val_values, "o-", color=ORANGE, markersize=4, linewidth=1, label="validation")
        low, high = axes.get_ylim() if len(steps) else _padded(val_values.min(), val_values.max())
        axes.set_ylim(min(low, *_padded(val_values.min(), low)), max(high, *_padded(high, val_values.max())))
    return bool(len(steps) or len(val_steps))


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * abs(high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _draw_loss(axes: Axes, metrics: MetricsFile) -> bool:
    axes.set_title("loss")
    return _draw_train_and_validation(axes, metrics, "loss")


def _draw_feature_std(axes: Axes, metrics: MetricsFile, healthy_std: float | None) -> bool:
    axes.set_title("feature standard deviation")
    if not _draw_train_and_validation(axes, metrics, "feature_std"):
        return False
    if healthy_std is not None:
        axes.axhline(healthy_std, color=GREY, linestyle="--", linewidth=1, label=f"1/√C = {healthy_std:.3g}")
    # From 0, since collapse to 0 is what this curve is watched for.
    axes.set_ylim(0, 1.15 * max(axes.get_ylim()[1] / 1.06, healthy_std or 0))
    return True


def _draw_retrieval(axes: Axes, metrics: MetricsFile) -> bool:
    axes.set_title("retrieval of the corresponding place (top 1)")
    steps, values = metrics("val_retrieval_top1")
    if not len(steps):
        return False
    axes.plot(steps, values, "o-", color=ORANGE, markersize=4, linewidth=1.6, label="validation")
    for name, style in (("untrained", "--"), ("chance", ":")):
        constant = metrics(f"val_retrieval_{name}")[1]
        if len(constant):
            axes.axhline(constant[-1], color=GREY, linestyle=style, linewidth=1, label=f"{name} {constant[-1]:.3g}")
    axes.set_ylim(0, min(1.02, 1.15 * axes.get_ylim()[1]))
    return True


def _draw_dice(axes: Axes, metrics: MetricsFile) -> bool:
    axes.set_title("validation Dice")
    steps, values = metrics("val_mean_dice")
    if not len(steps):
        return False
    label = f"mean, best {values.max():.3f}"
    axes.plot(steps, values, "o-", color="black", markersize=4, linewidth=1.8, label=label, zorder=3)
    organs = [name for name in metrics.columns if name.startswith(_ORGAN_DICE)]
    for name, color in zip(organs, organ_colors(len(organs)), strict=True):
        # Darker than in overlays: thin bright lines would vanish on white.
        axes.plot(*metrics(name), color=0.75 * color, linewidth=0.8, label=name.removeprefix(_ORGAN_DICE))
    axes.set_ylim(0, 1.05)
    return True


def _draw_schedules(axes: Axes, metrics: MetricsFile) -> bool:
    curves = [(label, *metrics(key)) for key, label in (("lr", "learning rate"), ("tau", "momentum tau"))]
    curves = [c for c in curves if len(c[1])]
    axes.set_title(" and ".join(label for label, *_ in curves))
    for number, ((label, steps, values), color) in enumerate(zip(curves, (BLUE, ORANGE), strict=False)):
        scale = axes if number == 0 else axes.twinx()
        scale.plot(steps, values, color=color, linewidth=1.6)
        scale.set_ylabel(label, color=color)
        scale.tick_params(axis="y", labelcolor=color)
        scale.ticklabel_format(axis="y", useOffset=False)
        scale.spines["top"].set_visible(False)
    return bool(curves)


def _add_legend(axes: Axes) -> None:
    count = len(axes.get_legend_handles_labels()[1])
    # Many organs would cover the curves.
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if count > 4 else {}
    axes.legend(framealpha=0.8, edgecolor="none", fontsize="x-small" if count > 8 else "small", **beside)


def plot_metrics(csv_path: str | Path, out_path: str | Path, healthy_std: float | None = None) -> Figure:
    """Draw the training curves of a metrics file: loss, Dice, feature std, retrieval, learning rate, momentum.

    Training values are shown faint and smoothed, validation values as points. A panel without any of its columns
    (`loss`, `val_loss`; `val_mean_dice` with `val_dice_ORGAN`; `feature_std`, `val_feature_std`; `val_retrieval_top1`,
    `_chance`, `_untrained`; `lr`, `tau`) is left out. Empty cells are skipped, and where a step occurs twice, as after
    a resumed run, the later value counts.

    Args:
        csv_path: metrics file with a header and a column `step`.
        out_path: picture to write; the ending sets the format.
        healthy_std: feature std of L2-normalised features spread evenly over C dimensions, 1 / sqrt(C); drawn dashed.

    Returns:
        The figure.

    Raises:
        ValueError: if the file has no rows, no column `step`, or none of the columns above.
    """
    metrics = MetricsFile(csv_path)
    draw_std = partial(_draw_feature_std, healthy_std=healthy_std)
    draws = (_draw_loss, _draw_dice, draw_std, _draw_retrieval, _draw_schedules)
    # A panel tells whether it has anything to show only when it is drawn, so draw on a scratch figure first.
    draws = [draw for draw in draws if draw(Figure().subplots(), metrics)]
    if not draws:
        raise ValueError(f"{csv_path} has none of the columns that are drawn; its columns are {metrics.columns}.")
    columns = 2 if len(draws) in (2, 4) else min(3, len(draws))
    rows = math.ceil(len(draws) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.3 * rows), dpi=120, layout="constrained")
    for number, draw in enumerate(draws, 1):
        axes = figure.add_subplot(rows, columns, number)
        draw(axes, metrics)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines["top"].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            _add_legend(axes)
    save_figure(figure, out_path)
    return figure
