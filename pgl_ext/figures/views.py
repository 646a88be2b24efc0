"""Pictures: training curves, aligned views, and where a point of one scan is found in others.

Only matplotlib's object interface is used, so no display is needed and pyplot's global state is left alone. Volumes are
shown as arrays in RAS order: x to the right, y (anterior) or z (superior) up. Views are shown as the network sees them,
so a flipped view appears flipped.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pgl_ext.geometry import (
    axis_scale_and_offset,
    cell_samples,
    linear_interpolation_matrix,
    overlap_extent,
    resample_axes,
)

__all__ = ["figure_to_array", "plot_metrics", "plot_similarity", "plot_views", "source_to_view"]

_BLUE, _ORANGE, _GREY = "#2166ac", "#d6604d", "#777777"
_POINTS = ("#ffd92f", "#66e0a3", "#ff7fbf", "#7fd4ff", "#ffa64d")
_TINTS = ((1.0, 0.92, 0.74), (0.74, 0.92, 1.0))
_PLANES = (("axial", (0, 1)), ("coronal", (0, 2)), ("sagittal", (1, 2)))


def figure_to_array(figure: Figure) -> np.ndarray:
    """Render a figure, for example for TensorBoard's `add_image(..., dataformats="HWC")`.

    Returns:
        uint8 RGB image (H, W, 3).
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _save(figure: Figure, out_path: str | Path) -> None:
    Path(out_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_path)


# --- training curves ------------------------------------------------------------------------------------------------


class _Metrics:
    """Columns of a metrics file as sorted (steps, values); a value logged again for a step replaces the older one."""

    def __init__(self, path: str | Path) -> None:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            self.rows = list(reader)
            columns = reader.fieldnames or []
        if not self.rows:
            raise ValueError(f"{path} holds no metrics yet: it has no row below its header.")
        if "step" not in columns:
            raise ValueError(f"{path} has no column 'step'; its columns are {columns}.")

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


def _draw_train_and_validation(axes: Axes, metrics: _Metrics, name: str) -> bool:
    steps, values = metrics(name)
    if len(steps):
        axes.plot(steps, values, color=_BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smoothed(values), color=_BLUE, linewidth=1.6, label="training")
        low, high = np.quantile(values, (0, 0.99))
        # A first step that is far off must not flatten the rest of the curve.
        axes.set_ylim(*_padded(low, high))
    val_steps, val_values = metrics(f"val_{name}")
    if len(val_steps):
        axes.plot(val_steps, val_values, "o-", color=_ORANGE, markersize=4, linewidth=1, label="validation")
        low, high = axes.get_ylim() if len(steps) else _padded(val_values.min(), val_values.max())
        axes.set_ylim(min(low, *_padded(val_values.min(), low)), max(high, *_padded(high, val_values.max())))
    return bool(len(steps) or len(val_steps))


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * abs(high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _draw_loss(axes: Axes, metrics: _Metrics) -> bool:
    axes.set_title("loss")
    return _draw_train_and_validation(axes, metrics, "loss")


def _draw_feature_std(axes: Axes, metrics: _Metrics, healthy_std: float | None) -> bool:
    axes.set_title("feature standard deviation")
    if not _draw_train_and_validation(axes, metrics, "feature_std"):
        return False
    if healthy_std is not None:
        axes.axhline(healthy_std, color=_GREY, linestyle="--", linewidth=1, label=f"1/√C = {healthy_std:.3g}")
    # From 0, since collapse to 0 is what this curve is watched for.
    axes.set_ylim(0, 1.15 * max(axes.get_ylim()[1] / 1.06, healthy_std or 0))
    return True


def _draw_retrieval(axes: Axes, metrics: _Metrics) -> bool:
    axes.set_title("retrieval of the corresponding place (top 1)")
    steps, values = metrics("val_retrieval_top1")
    if not len(steps):
        return False
    axes.plot(steps, values, "o-", color=_ORANGE, markersize=4, linewidth=1.6, label="validation")
    for name, style in (("untrained", "--"), ("chance", ":")):
        constant = metrics(f"val_retrieval_{name}")[1]
        if len(constant):
            axes.axhline(constant[-1], color=_GREY, linestyle=style, linewidth=1, label=f"{name} {constant[-1]:.3g}")
    axes.set_ylim(0, min(1.02, 1.15 * axes.get_ylim()[1]))
    return True


def _draw_schedules(axes: Axes, metrics: _Metrics) -> bool:
    curves = [(label, *metrics(key)) for key, label in (("lr", "learning rate"), ("tau", "momentum tau"))]
    curves = [c for c in curves if len(c[1])]
    axes.set_title(" and ".join(label for label, *_ in curves))
    for number, ((label, steps, values), color) in enumerate(zip(curves, (_BLUE, _ORANGE), strict=False)):
        scale = axes if number == 0 else axes.twinx()
        scale.plot(steps, values, color=color, linewidth=1.6)
        scale.set_ylabel(label, color=color)
        scale.tick_params(axis="y", labelcolor=color)
        scale.ticklabel_format(axis="y", useOffset=False)
        scale.spines["top"].set_visible(False)
    return bool(curves)


def plot_metrics(csv_path: str | Path, out_path: str | Path, healthy_std: float | None = None) -> Figure:
    """Draw the training curves of a metrics file: loss, feature std, retrieval, learning rate and momentum.

    Training values are shown faint and smoothed, validation values as points. A panel without any of its columns
    (`loss`, `val_loss`; `feature_std`, `val_feature_std`; `val_retrieval_top1`, `_chance`, `_untrained`; `lr`, `tau`)
    is left out. Empty cells are skipped, and where a step occurs twice, as after a resumed run, the later value counts.

    Args:
        csv_path: metrics file with a header and a column `step`.
        out_path: picture to write; the ending sets the format.
        healthy_std: feature std of L2-normalised features spread evenly over C dimensions, 1 / sqrt(C); drawn dashed.

    Returns:
        The figure.

    Raises:
        ValueError: if the file has no rows, no column `step`, or none of the columns above.
    """
    metrics = _Metrics(csv_path)
    draw_std = partial(_draw_feature_std, healthy_std=healthy_std)
    draws = (_draw_loss, draw_std, _draw_retrieval, _draw_schedules)
    # A panel tells whether it has anything to show only when it is drawn, so draw on a scratch figure first.
    draws = [draw for draw in draws if draw(Figure().subplots(), metrics)]
    if not draws:
        raise ValueError(f"{csv_path} has none of the columns that are drawn; its columns are {list(metrics.rows[0])}.")
    columns = min(2, len(draws))
    rows = math.ceil(len(draws) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.3 * rows), dpi=120, layout="constrained")
    for number, draw in enumerate(draws, 1):
        axes = figure.add_subplot(rows, columns, number)
        draw(axes, metrics)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines["top"].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize="small")
    _save(figure, out_path)
    return figure


# --- aligned views --------------------------------------------------------------------------------------------------


def source_to_view(affines: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Where points of the source lie in each view: v = (source - b) / a per axis.

    Args:
        affines: (..., 4, 4), view voxel index to source voxel index, axis-aligned.
        points: (N, 3) in source voxels.

    Returns:
        (..., N, 3) in view voxels.

    Raises:
        ValueError: if an affine rotates, shears or is singular.
    """
    scale, offset = axis_scale_and_offset(affines)
    return (points.to(affines) - offset.unsqueeze(-2)) / scale.unsqueeze(-2)


def _overlap_slices(
    views: torch.Tensor, affines: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Axial slice through the middle of the overlap, of each whole view and of the overlap on one common grid.

    Args:
        views: (2, 1, X, Y, Z); affines: (2, 4, 4); lower, upper: (3,) in source voxels.

    Returns:
        whole slices (2, X, Y) and overlap slices (2, I, J).
    """
    scale, _ = axis_scale_and_offset(affines)
    # As fine as the finer view; edges, not centres, bound the region.
    cells = [max(2, math.ceil(float(n))) for n in ((upper - lower) / scale.abs().amin(0))[:2]] + [1]
    edges = source_to_view(affines, torch.stack([lower, upper]))
    region = [
        linear_interpolation_matrix(cell_samples(edges[:, 0, axis], edges[:, 1, axis], n, 1), views.shape[2 + axis])
        for axis, n in enumerate(cells)
    ]
    whole = [torch.eye(n).expand(2, n, n) for n in views.shape[2:4]] + [region[2]]
    return tuple(resample_axes(views, weights)[:, 0, :, :, 0].numpy() for weights in (whole, region))


def _landmarks(image: np.ndarray, count: int) -> np.ndarray:
    """At most `count` cells (N, 2) of strong structure that keep a distance, so that the eye can check them.

    Args:
        image: (I, J).
    """
    strength = np.hypot(*np.gradient(image))
    position = np.stack(np.meshgrid(*(np.arange(n) for n in image.shape), indexing="ij"), -1)
    # Numbers written at the very edge of the overlap would be cut off.
    inner = np.minimum(position, np.array(image.shape) - 1 - position) / np.array(image.shape)
    strength[inner.min(-1) < 0.06] = 0
    chosen = []
    while len(chosen) < count and strength.max() > 0:
        chosen.append(np.unravel_index(np.argmax(strength), strength.shape))
        distance = np.linalg.norm((position - chosen[-1]) / np.array(image.shape), axis=-1)
        strength[distance < 0.22] = 0
    return np.array(chosen, dtype=float).reshape(-1, 2)


def _checkerboard(first: np.ndarray, second: np.ndarray, tiles: int = 6) -> np.ndarray:
    """Interleave two images (I, J) as RGB (I, J, 3), tinted since aligned tiles cannot be told apart otherwise."""
    side = max(1, math.ceil(max(first.shape) / tiles))
    i, j = np.indices(first.shape) // side
    tinted = [image[..., None] * np.array(tint) for image, tint in ((first, _TINTS[0]), (second, _TINTS[1]))]
    return np.where((i + j)[..., None] % 2 == 0, *tinted)


def _unit_range(image: np.ndarray) -> np.ndarray:
    """Scale to [0, 1] between the 0.5 and 99.5 percentiles, per view, as the views' intensities differ on purpose."""
    low, high = np.quantile(image, (0.005, 0.995))
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


def _show(axes: Axes, image: np.ndarray, aspect: float = 1.0) -> None:
    axes.imshow(
        image.swapaxes(0, 1), cmap="gray", vmin=0, vmax=1, origin="lower", aspect=aspect, interpolation="nearest"
    )
    axes.set_xticks([])
    axes.set_yticks([])


def _number(axes: Axes, points: np.ndarray) -> None:
    """Draw numbered points (N, 2), given in array indices."""
    colors = [_POINTS[n % len(_POINTS)] for n in range(len(points))]
    axes.scatter(*points.T, s=42, facecolors="none", edgecolors=colors, linewidths=1.6)
    for number, (point, color) in enumerate(zip(points, colors, strict=True), 1):
        axes.annotate(
            str(number), point, (5, 5), textcoords="offset points", color=color, fontsize=9, fontweight="bold"
        )


def _describe(scale: Sequence[float]) -> str:
    flips = "".join(name for name, s in zip("xyz", scale, strict=True) if s < 0)
    zoom = " x ".join(f"{abs(s):.2f}" for s in scale)
    return f"scale {zoom}, {'flipped ' + ', '.join(flips) if flips else 'not flipped'}"


def _draw_pair(panels: Sequence[Axes], views: torch.Tensor, affines: torch.Tensor, num_points: int) -> None:
    lower, upper = (edge[0] for edge in overlap_extent(affines[None], views.shape[2:]))
    whole, region = _overlap_slices(views, affines, lower, upper)
    whole, region = ([_unit_range(image) for image in images] for images in (whole, region))
    cells = _landmarks(region[0], num_points)
    step = (upper - lower)[:2].numpy() / np.array(region[0].shape)  # source voxels per cell of the common grid
    source = np.column_stack([lower[:2].numpy() + (cells + 0.5) * step, np.full(len(cells), (lower + upper)[2] / 2)])
    points = source_to_view(affines, torch.from_numpy(source)).numpy()
    corners = source_to_view(affines, torch.stack([lower, upper])).numpy()
    scales = axis_scale_and_offset(affines)[0].tolist()
    for view in range(2):
        _show(panels[view], whole[view])
        _number(panels[view], points[view, :, :2])
        box = Rectangle(corners[view, 0, :2], *np.diff(corners[view, :, :2], axis=0)[0], fill=False, clip_on=False)
        box.set(linewidth=1.4, linestyle="--", edgecolor="#00d5ff")
        panels[view].add_patch(box)
        panels[view].set_xlabel(_describe(scales[view]), fontsize=7)
        _show(panels[2 + view], region[view], step[1] / step[0])
        _number(panels[2 + view], cells)
    _show(panels[4], _checkerboard(*region), step[1] / step[0])


def plot_views(
    views: torch.Tensor,
    affines: torch.Tensor,
    out_path: str | Path | None = None,
    num_pairs: int = 3,
    num_points: int = 4,
) -> Figure:
    """Show that two views of a volume, once aligned through their affines, show the same anatomy.

    One row per pair, all at the height of the middle of the overlap: both views with the overlap dashed and numbered
    points that are the same source point in both; the overlap of each view, unflipped and resampled onto one common
    grid; and the two interleaved as a checkerboard, in which structures run on across the tiles.

    Args:
        views: (B, 2, C, X, Y, Z); the first channel is shown.
        affines: (B, 2, 4, 4), view voxel index to source voxel index, axis-aligned.
        out_path: picture to write; None: only return the figure.
        num_pairs: the first so many samples are shown, at most B.
        num_points: numbered points per pair, at most; they are set where the overlap shows structure.

    Returns:
        The figure.

    Raises:
        ValueError: for other shapes, num_pairs < 1, affines with rotation or shear, and views without overlap.

    Example:
        >>> figure = plot_views(batch["views"], batch["affines"])  # doctest: +SKIP
        >>> writer.add_image("views", figure_to_array(figure), dataformats="HWC")  # doctest: +SKIP
    """
    if views.ndim != 6 or views.shape[1] != 2 or tuple(affines.shape) != (views.shape[0], 2, 4, 4):
        raise ValueError(
            "expected views (B, 2, C, X, Y, Z) and affines (B, 2, 4, 4) with the same B, got "
            f"{tuple(views.shape)} and {tuple(affines.shape)}."
        )
    if num_pairs < 1:
        raise ValueError(f"num_pairs must be at least 1, got {num_pairs}.")
    rows = min(num_pairs, views.shape[0])
    # A plain tensor: a MetaTensor would carry its metadata through every product below.
    images = torch.as_tensor(np.asarray(views[:rows, :, :1].detach().float().cpu()))
    priors = torch.as_tensor(np.asarray(affines[:rows].detach().double().cpu()))
    figure = Figure(figsize=(13, 2.75 * rows + 0.3), dpi=110, layout="constrained")
    panels = figure.subplots(rows, 5, squeeze=False)
    titles = ("view 1", "view 2", "overlap, from view 1", "overlap, from view 2", "checkerboard of the two")
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    for row in range(rows):
        _draw_pair(panels[row], images[row], priors[row], num_points)
    if out_path is not None:
        _save(figure, out_path)
    return figure


# --- the same place in other scans ----------------------------------------------------------------------------------


def _through(volume: np.ndarray, point: Sequence[float], plane: tuple[int, int]) -> np.ndarray:
    """Slice of `volume` in `plane` (two axes) through a point."""
    (fixed,) = {0, 1, 2} - set(plane)
    return np.take(volume, int(np.clip(np.rint(point[fixed]), 0, volume.shape[fixed] - 1)), axis=fixed)


def _grey(volume: np.ndarray) -> np.ndarray:
    """[0, 1] greyscale; HU in a wide soft-tissue window, other ranges between percentiles."""
    if volume.min() < -500:
        return np.clip((volume + 400) / 800, 0, 1)
    return _unit_range(volume)


def _draw_planes(
    panels: Sequence[Axes],
    volume: np.ndarray,
    point: Sequence[float],
    spacing: Sequence[float],
    heat: tuple[np.ndarray, Normalize] | None = None,
) -> None:
    """Three planes through a point, marked by a cross; `heat` is a similarity map and its scale."""
    grey = _grey(volume)
    for axes, (_, plane) in zip(panels, _PLANES, strict=True):
        image = np.repeat(_through(grey, point, plane)[..., None], 3, -1)
        if heat is not None:
            level = heat[1](_through(heat[0], point, plane)).filled(0).clip(0, 1)
            # Dissimilar places stay grey, so that the anatomy remains readable.
            weight = 0.75 * level[..., None] ** 1.5
            image = (1 - weight) * image + weight * mpl.colormaps["inferno"](level)[..., :3]
        a, b = plane
        axes.imshow(image.swapaxes(0, 1), origin="lower", aspect=spacing[b] / spacing[a], interpolation="nearest")
        axes.plot(point[a], point[b], "+", color="#39ff14", markersize=13, markeredgewidth=1.8)
        axes.set_xticks([])
        axes.set_yticks([])


def _check_scan(title: str, volume: np.ndarray, spacing: Sequence[float], similarity: np.ndarray | None) -> None:
    if volume.ndim != 3:
        raise ValueError(f"volume of {title!r} must have shape (X, Y, Z), got {volume.shape}.")
    if len(spacing) != 3 or min(spacing) <= 0:
        raise ValueError(f"spacing of {title!r} must be three positive numbers (mm), got {tuple(spacing)}.")
    if similarity is not None and similarity.shape != volume.shape:
        raise ValueError(f"similarity of {title!r} has shape {similarity.shape}, its volume {volume.shape}.")


def _similarity_scale(maps: Sequence[np.ndarray]) -> Normalize:
    """One scale for all maps, from the usual to the best similarity: absolute values say little, contrast much."""
    high = max(float(m.max()) for m in maps)
    low = float(np.median([np.median(m) for m in maps]))
    return Normalize(min(low, high - 0.05), high)


def plot_similarity(
    query_volume: np.ndarray,
    query_point: Sequence[float],
    query_title: str,
    others: Sequence[Mapping[str, Any]],
    out_path: str | Path,
    query_spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Figure:
    """Show where the features of a point of one scan are found in other scans.

    The first column is the query scan with a cross at the point in the three planes. Each further column is another
    scan, cut through the place of highest similarity (cross), with the similarity as a heat map. One colour scale, from
    the median to the maximum, serves all scans.

    Args:
        query_volume: (X, Y, Z), RAS order, HU or any other intensity.
        query_point: voxel index (x, y, z) in it, not necessarily whole numbers.
        query_title: heading of the first column.
        others: per scan a mapping with `title`, `volume` (X, Y, Z), `similarity` (X, Y, Z; cosine in [-1, 1]) and
            `spacing` (mm).
        out_path: picture to write.
        query_spacing: mm per voxel of the query scan.

    Returns:
        The figure.

    Raises:
        ValueError: without any other scan, for a point outside the query volume, and for shapes that do not fit.
    """
    query_volume, others = np.asarray(query_volume), [dict(o, volume=np.asarray(o["volume"])) for o in others]
    _check_scan(query_title, query_volume, query_spacing, None)
    if not others:
        raise ValueError("others is empty: give at least one scan to find the point in.")
    if any(not -0.5 <= p <= n - 0.5 for p, n in zip(query_point, query_volume.shape, strict=True)):
        raise ValueError(f"query_point {tuple(query_point)} lies outside the volume of shape {query_volume.shape}.")
    for other in others:
        other["similarity"] = np.asarray(other["similarity"], dtype=np.float32)
        _check_scan(other["title"], other["volume"], other["spacing"], other["similarity"])

    # Panels as large as the scans are in mm, so that no column is drawn at another scale than its neighbour.
    extents = [np.multiply(query_volume.shape, query_spacing)]
    extents += [np.multiply(o["volume"].shape, o["spacing"]) for o in others]
    widths = [max(e[0], e[1]) for e in extents]
    heights = [max(e[1] for e in extents), *[max(e[2] for e in extents)] * 2]
    unit = 2.6 / max(widths)
    figure = Figure((unit * sum(widths) + 1.3, unit * sum(heights) + 0.7), dpi=110, layout="constrained")
    panels = figure.subplots(3, len(extents), gridspec_kw={"width_ratios": widths, "height_ratios": heights})
    for axes, (name, _) in zip(panels[:, 0], _PLANES, strict=True):
        axes.set_ylabel(name)
    panels[0, 0].set_title(query_title, fontsize=10)
    _draw_planes(panels[:, 0], query_volume, query_point, query_spacing)
    scale = _similarity_scale([o["similarity"] for o in others])
    for column, other in enumerate(others, 1):
        similarity = other["similarity"]
        best = np.unravel_index(np.argmax(similarity), similarity.shape)
        _draw_planes(panels[:, column], other["volume"], best, other["spacing"], (similarity, scale))
        panels[0, column].set_title(f"{other['title']}\nbest {similarity[best]:.2f}", fontsize=10)
    bar = figure.colorbar(mpl.cm.ScalarMappable(scale, "inferno"), ax=panels, shrink=0.6, pad=0.02, panchor=False)
    bar.set_label("cosine similarity")
    _save(figure, out_path)
    return figure
