"""Aligned views.

Views are shown as the network sees them, so a flipped view appears flipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pgl_ext import geometry
from pgl_ext.figures.base import save_figure, unit_range

__all__ = ["plot_views", "source_to_view"]

_POINTS = ("#ffd92f", "#66e0a3", "#ff7fbf", "#7fd4ff", "#ffa64d")
_TINTS = ((1.0, 0.92, 0.74), (0.74, 0.92, 1.0))


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
    scale, offset = geometry.axis_scale_and_offset(affines)
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
    scale, _ = geometry.axis_scale_and_offset(affines)
    # As fine as the finer view; edges, not centres, bound the region.
    cells = [max(2, math.ceil(float(n))) for n in ((upper - lower) / scale.abs().amin(0))[:2]] + [1]
    edges = source_to_view(affines, torch.stack([lower, upper]))
    region = [
        geometry.linear_interpolation_matrix(
            geometry.cell_samples(edges[:, 0, axis], edges[:, 1, axis], n, 1), views.shape[2 + axis]
        )
        for axis, n in enumerate(cells)
    ]
    whole = [torch.eye(n).expand(2, n, n) for n in views.shape[2:4]] + [region[2]]
    return tuple(geometry.resample_axes(views, weights)[:, 0, :, :, 0].numpy() for weights in (whole, region))


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
    lower, upper = (edge[0] for edge in geometry.overlap_extent(affines[None], views.shape[2:]))
    whole, region = _overlap_slices(views, affines, lower, upper)
    whole, region = ([unit_range(image) for image in images] for images in (whole, region))
    cells = _landmarks(region[0], num_points)
    step = (upper - lower)[:2].numpy() / np.array(region[0].shape)  # source voxels per cell of the common grid
    source = np.column_stack([lower[:2].numpy() + (cells + 0.5) * step, np.full(len(cells), (lower + upper)[2] / 2)])
    points = source_to_view(affines, torch.from_numpy(source)).numpy()
    corners = source_to_view(affines, torch.stack([lower, upper])).numpy()
    scales = geometry.axis_scale_and_offset(affines)[0].tolist()
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
        save_figure(figure, out_path)
    return figure
