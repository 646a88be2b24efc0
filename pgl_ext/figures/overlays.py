"""Segmentations over their scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pgl_ext.figures.base import PLANES, grey_levels, organ_colors, save_figure, slice_through

__all__ = ["plot_overlay", "thinning"]

_PICTURE_SIZE = 256  # voxels per axis


def thinning(shape: Sequence[int]) -> tuple[slice, ...]:
    """Strides, as slices, that reduce each axis of a volume (X, Y, Z) to the 256 voxels that a picture can show."""
    return tuple(slice(None, None, -(-n // _PICTURE_SIZE)) for n in shape)


def plot_overlay(
    image: np.ndarray,
    masks: Mapping[str, np.ndarray],
    names: Sequence[str],
    spacing: Sequence[float],
    out_path: str | Path | None = None,
    title: str = "",
) -> Figure:
    """Show organs in colour over the three planes of a scan.

    The rows are the axial, coronal and sagittal slice in which the first entry of ``masks`` has most organ voxels (the
    middle one where it has none at all), the columns the entries. The legend lies beside the panels and lists the
    organs that occur in the slices shown.

    Args:
        image: (X, Y, Z), RAS order, HU or any other intensity.
        masks: by title of the column, such as "reference" and "prediction", bool (organs, X, Y, Z).
        names: of the organs.
        spacing: mm per voxel of each axis.
        out_path: picture to write; None: only return the figure.
        title: heading of the picture.

    Returns:
        The figure.

    Raises:
        ValueError: there are no masks, or shapes, names or spacing do not fit.
    """
    image = np.asarray(image)
    masks = {heading: np.asarray(mask).astype(bool, copy=False) for heading, mask in masks.items()}
    _check(image, masks, names, spacing)
    extent = np.multiply(image.shape, spacing)
    widths, heights = zip(*((extent[a], extent[b]) for _, (a, b) in PLANES), strict=True)
    unit = 3.4 / max(widths)
    legend_width = 0.5 + 0.07 * max(map(len, names))  # inches
    size = (unit * max(widths) * len(masks) + 0.4 + legend_width, unit * sum(heights) + 0.6)
    figure = Figure(size, dpi=110, layout="constrained", facecolor="white")
    panels = figure.subplots(3, len(masks), squeeze=False, gridspec_kw={"height_ratios": heights})
    colors, grey = organ_colors(len(names)), grey_levels(image)
    point, shown = _fullest_slices(next(iter(masks.values()))), np.zeros(len(names), dtype=bool)
    for row, (name, plane) in zip(panels, PLANES, strict=True):
        aspect = spacing[plane[1]] / spacing[plane[0]]
        for axes, mask in zip(row, masks.values(), strict=True):
            cut = np.stack([slice_through(organ, point, plane) for organ in mask])
            shown |= cut.any((1, 2))
            _draw(axes, slice_through(grey, point, plane), cut, colors, aspect)
        row[0].set_ylabel(name, fontsize=10)
    for axes, heading in zip(panels[0], masks, strict=True):
        axes.set_title(heading, fontsize=11)
    patches = [Patch(color=c, label=n) for c, n, on in zip(colors, names, shown, strict=True) if on]
    if patches:
        figure.legend(
            handles=patches,
            loc="outside right center",
            ncols=-(-len(patches) // 30),
            frameon=False,
            fontsize=8.5,
            handlelength=1.2,
        )
    if title:
        figure.suptitle(title, fontsize=12)
    if out_path is not None:
        save_figure(figure, out_path)
    return figure


def _check(image: np.ndarray, masks: Mapping[str, np.ndarray], names: Sequence[str], spacing: Sequence[float]) -> None:
    if image.ndim != 3:
        raise ValueError(f"image must have shape (X, Y, Z), got {image.shape}.")
    if not masks:
        raise ValueError("masks is empty: give at least one entry, such as {'prediction': masks}.")
    for heading, mask in masks.items():
        if mask.shape != (len(names), *image.shape):
            raise ValueError(
                f"masks of {heading!r} have shape {mask.shape}, expected {(len(names), *image.shape)}: one per organ "
                "on the grid of the image."
            )
    if len(spacing) != 3 or min(spacing) <= 0:
        raise ValueError(f"spacing must be three positive numbers (mm), got {tuple(spacing)}.")


def _fullest_slices(masks: np.ndarray) -> list[int]:
    """Per axis the index of the slice with most organ voxels; the middle where there is none."""
    inside = masks.any(0)
    if not inside.any():
        return [n // 2 for n in inside.shape]
    return [int(np.argmax(inside.sum(tuple({0, 1, 2} - {axis})))) for axis in range(3)]


def _draw(axes: Axes, grey: np.ndarray, cut: np.ndarray, colors: np.ndarray, aspect: float) -> None:
    """One slice (I, J), its masks (organs, I, J) filled faintly and outlined."""
    filled = np.repeat(grey[..., None], 3, -1)
    for mask, color in zip(cut, colors, strict=True):
        filled[mask] = 0.65 * filled[mask] + 0.35 * color
    axes.imshow(filled.swapaxes(0, 1), origin="lower", aspect=aspect, interpolation="nearest", vmin=0, vmax=1)
    for mask, color in zip(cut, colors, strict=True):
        # A volume of one slice has cuts of one line, which has no outline.
        if mask.any() and not mask.all() and min(mask.shape) > 1:
            axes.contour(mask.T, levels=[0.5], colors=[color], linewidths=1.1)
    axes.set_xticks([])
    axes.set_yticks([])
