"""Aligned views, each shown as the network sees it: a flipped view appears flipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pgl_ext.aligner import PriorGuidedAligner
from pgl_ext.figures.base import save_figure, show_slice, unit_range
from pgl_ext.geometry import axis_scale_and_offset, overlap_extent
from pgl_ext.settings import check_positive

__all__ = ["plot_views", "source_to_view"]

_POINTS = ("#ffd92f", "#66e0a3", "#ff7fbf", "#7fd4ff", "#ffa64d")
_TINTS = ((1.0, 0.92, 0.74), (0.74, 0.92, 1.0))
_TILES = 6  # along the longer side of a checkerboard
_TITLES = ("view 1", "view 2", "overlap, from view 1", "overlap, from view 2", "checkerboard of the two")


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
    if views.ndim != 6 or views.shape[1] != 2 or affines.shape != (len(views), 2, 4, 4):
        raise ValueError(
            "expected views (B, 2, C, X, Y, Z) and affines (B, 2, 4, 4) with the same B, got "
            f"{tuple(views.shape)} and {tuple(affines.shape)}."
        )
    check_positive(num_pairs, "num_pairs", "a pair is a row of the picture")
    # Plain tensors: a MetaTensor would carry its metadata through every product below.
    images = torch.from_numpy(views[:num_pairs, :, 0].detach().float().cpu().numpy())
    priors = torch.from_numpy(affines[:num_pairs].detach().double().cpu().numpy())
    figure = Figure(figsize=(13, 2.75 * len(images) + 0.3), dpi=110, layout="constrained")
    panels = figure.subplots(len(images), 5, squeeze=False)
    for axes, title in zip(panels[0], _TITLES, strict=True):
        axes.set_title(title, fontsize=10)
    for row, pair, prior in zip(panels, images, priors, strict=True):
        _draw_pair(row, pair, prior, num_points)
    save_figure(figure, out_path)
    return figure


def _draw_pair(panels: Sequence[Axes], views: torch.Tensor, affines: torch.Tensor, num_points: int) -> None:
    """Fill a row of panels with views (2, X, Y, Z)."""
    bounds = torch.cat(overlap_extent(affines[None], views.shape[1:]))
    whole, overlap = _middle_slices(views, affines)
    cells = _landmarks(overlap[0], num_points)
    # The overlap is one cell high; source voxels per cell.
    step = (bounds[1] - bounds[0]) / torch.tensor([*overlap[0].shape, 1])
    source = bounds[0] + step * (torch.from_numpy(np.pad(cells, ((0, 0), (0, 1)))) + 0.5)
    corners, points = (source_to_view(affines, places)[..., :2].numpy() for places in (bounds, source))
    aspect = float(step[1] / step[0])
    for view, scale in enumerate(axis_scale_and_offset(affines)[0].tolist()):
        show_slice(panels[view], whole[view])
        _number(panels[view], points[view])
        outline = {"fill": False, "clip_on": False, "linewidth": 1.4, "linestyle": "--", "edgecolor": "#00d5ff"}
        panels[view].add_patch(Rectangle(corners[view, 0], *(corners[view, 1] - corners[view, 0]), **outline))
        panels[view].set_xlabel(_describe(scale), fontsize=7)
        show_slice(panels[2 + view], overlap[view], aspect)
        _number(panels[2 + view], cells)
    show_slice(panels[4], _checkerboard(*overlap), aspect)


def _middle_slices(views: torch.Tensor, affines: torch.Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Axial slices through the middle of the overlap, in [0, 1].

    Args:
        views: (2, X, Y, Z).
        affines: (2, 4, 4).

    Returns:
        a slice (X, Y) of each view, and one of the overlap in each view on one common grid of (X, Y) cells.
    """
    size = views.shape[1:]
    aligner = PriorGuidedAligner([*size[:2], 1], sampling_ratio=1)
    _, _, height = aligner.axis_matrices(affines[None], size, size)
    whole = torch.einsum("vxyz,vkz->vxy", views, height[0])
    overlap = aligner(views[None, :, None], affines[None], size)[0, :, 0, :, :, 0]
    return [unit_range(image.numpy()) for image in whole], [unit_range(image.numpy()) for image in overlap]


def _landmarks(image: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` cells (N, 2) of an image (I, J) with strong structure, at some distance from each other."""
    strength = np.hypot(*np.gradient(image))
    place = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in image.shape), indexing="ij"))
    # Numbers written at the very edge of the overlap would be cut off.
    strength[(np.minimum(place, 1 - place) < 0.06).any(0)] = 0
    chosen = []
    while len(chosen) < count and strength.max() > 0:
        i, j = np.unravel_index(strength.argmax(), strength.shape)
        chosen.append((i, j))
        strength[np.linalg.norm(place - place[:, i, j, None, None], axis=0) < 0.22] = 0
    return np.array(chosen, dtype=float).reshape(-1, 2)


def _checkerboard(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Interleave two images (I, J) as RGB (I, J, 3), tinted since aligned tiles cannot be told apart otherwise."""
    side = math.ceil(max(first.shape) / _TILES)
    odd = (np.indices(first.shape) // side).sum(0) % 2
    return np.where(odd[..., None], second[..., None] * _TINTS[1], first[..., None] * _TINTS[0])


def _number(axes: Axes, points: np.ndarray) -> None:
    """Draw numbered points (N, 2), given in array indices."""
    for number, point in enumerate(points):
        color = _POINTS[number % len(_POINTS)]
        axes.annotate(number + 1, point, (5, 5), textcoords="offset points", color=color, fontsize=9, weight="bold")
    axes.scatter(*points.T, s=42, facecolors="none", edgecolors=_POINTS[: len(points)], linewidths=1.6)


def _describe(scale: Sequence[float]) -> str:
    flips = [name for name, s in zip("xyz", scale, strict=True) if s < 0]
    zoom = " x ".join(f"{abs(s):.2f}" for s in scale)
    return f"scale {zoom}, {'flipped ' + ', '.join(flips) if flips else 'not flipped'}"
