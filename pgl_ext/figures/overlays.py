"""Segmentations over their scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pgl_ext.figures.base import grey_levels, organ_colors, save_figure, show_slice

__all__ = ["plot_overlay", "thinning"]

_PICTURE_SIZE = 256  # voxels per axis
_PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # the axis across each plane


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
    heights = extent[[1, 2, 2]]
    inches = 3.4 / max(extent[:2])  # per mm
    width = 3.4 * len(masks) + 0.9 + 0.07 * max(map(len, names))
    figure = Figure((width, inches * sum(heights) + 0.6), dpi=110, layout="constrained", facecolor="white")
    panels = figure.subplots(3, len(masks), squeeze=False, gridspec_kw={"height_ratios": heights})
    colors, grey = organ_colors(len(names)), grey_levels(image)
    shown = np.zeros(len(names), dtype=bool)
    for row, (plane, axis) in zip(panels, _PLANES.items(), strict=True):
        index = _fullest_slice(next(iter(masks.values())), axis)
        across, up = np.delete(spacing, axis)
        row[0].set_ylabel(plane, fontsize=10)
        for axes, mask in zip(row, masks.values(), strict=True):
            cut = mask.take(index, axis + 1)
            shown |= cut.any((1, 2))
            _draw(axes, grey.take(index, axis), cut, colors, up / across)
    for axes, heading in zip(panels[0], masks, strict=True):
        axes.set_title(heading, fontsize=11)
    patches = [Patch(color=colors[number], label=names[number]) for number in np.flatnonzero(shown)]
    if patches:
        style = {"ncols": -(-len(patches) // 30), "frameon": False, "fontsize": 8.5, "handlelength": 1.2}
        figure.legend(handles=patches, loc="outside right center", **style)
    if title:
        figure.suptitle(title, fontsize=12)
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


def _fullest_slice(masks: np.ndarray, axis: int) -> int:
    """Index of the slice across an axis with most organ voxels; the middle one where there are none."""
    counts = np.moveaxis(masks.any(0), axis, 0).sum((1, 2))
    return int(counts.argmax()) if counts.any() else len(counts) // 2


def _draw(axes: Axes, grey: np.ndarray, cut: np.ndarray, colors: np.ndarray, aspect: float) -> None:
    """One slice (I, J), its masks (organs, I, J) filled faintly and outlined."""
    filled = np.repeat(grey[..., None], 3, -1)
    for mask, color in zip(cut, colors, strict=True):
        filled[mask] = 0.65 * filled[mask] + 0.35 * color
        # A volume of one slice has cuts of one line, which has no outline.
        if mask.any() and not mask.all() and min(mask.shape) > 1:
            axes.contour(mask.T, levels=[0.5], colors=[color], linewidths=1.1)
    show_slice(axes, filled, aspect)
