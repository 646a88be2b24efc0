"""Where a point of one scan is found in others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pgl_ext.figures.base import PLANES, grey_levels, save_figure, slice_through

__all__ = ["plot_similarity"]


def _draw_planes(
    panels: Sequence[Axes],
    volume: np.ndarray,
    point: Sequence[float],
    spacing: Sequence[float],
    heat: tuple[np.ndarray, Normalize] | None = None,
) -> None:
    """Three planes through a point, marked by a cross; `heat` is a similarity map and its scale."""
    grey = grey_levels(volume)
    for axes, (_, plane) in zip(panels, PLANES, strict=True):
        image = np.repeat(slice_through(grey, point, plane)[..., None], 3, -1)
        if heat is not None:
            level = heat[1](slice_through(heat[0], point, plane)).filled(0).clip(0, 1)
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
    for axes, (name, _) in zip(panels[:, 0], PLANES, strict=True):
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
    save_figure(figure, out_path)
    return figure
