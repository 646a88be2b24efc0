"""Segmentations over their scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from pgl_ext.figures.base import grey_levels, organ_colors, save_figure, show_slice

__all__ = ["plot_overlay", "thinning"]

_PICTURE_SIZE = 256  # voxels per axis
# By plane, the axis across it, and what the letters of its left, right, lower and upper edge are.
_PLANES = {"axial": (2, "RLPA"), "coronal": (1, "RLIS"), "sagittal": (0, "APIS")}
_EDGES = {(0.015, 0.5): ("left", "center"), (0.985, 0.5): ("right", "center"),
          (0.5, 0.015): ("center", "bottom"), (0.5, 0.985): ("center", "top")}  # fmt: skip
_WRITING = {"color": "white", "fontsize": 9, "path_effects": [withStroke(linewidth=2, foreground="black")]}


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
    """Show organs in colour over the three planes of a scan, as radiologists see them, with a scale bar.

    The patient's right is on the left, in the sagittal plane anterior is; anterior or superior is up. Letters at the
    edges say so.

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

    Raises:
        ValueError: there are no masks, or shapes, names or spacing do not fit.
    """
    image = np.asarray(image)
    masks = {heading: np.asarray(mask, dtype=bool) for heading, mask in masks.items()}
    _check(image, masks, names, spacing)
    extent = np.multiply(image.shape, spacing)
    heights = extent[[1, 2, 2]]
    inches = 3.4 / max(extent[:2])  # per mm
    width = 3.4 * len(masks) + 0.9 + 0.07 * max(map(len, names))
    figure = Figure((width, inches * sum(heights) + 0.6), dpi=110, layout="constrained", facecolor="white")
    panels = figure.subplots(3, len(masks), squeeze=False, gridspec_kw={"height_ratios": heights})
    colors, grey = organ_colors(len(names)), grey_levels(image)
    shown = np.zeros(len(names), dtype=bool)
    for row, (plane, (axis, letters)) in zip(panels, _PLANES.items(), strict=True):
        index = _fullest_slice(next(iter(masks.values())), axis)
        across, up = np.delete(spacing, axis)
        row[0].set_ylabel(plane, fontsize=10)
        for axes, mask in zip(row, masks.values(), strict=True):
            cut = mask.take(index, axis + 1)[:, ::-1]
            shown |= cut.any((1, 2))
            _draw(axes, grey.take(index, axis)[::-1], cut, colors, up / across)
            for letter, (place, (ha, va)) in zip(letters, _EDGES.items(), strict=True):
                axes.text(*place, letter, ha=ha, va=va, transform=axes.transAxes, **_WRITING)
        _draw_scale(row[0], across)
    for axes, heading in zip(panels[0], masks, strict=True):
        axes.set_title(heading, fontsize=11, parse_math=False)
    patches = [Patch(color=colors[number], label=names[number]) for number in np.flatnonzero(shown)]
    if patches:
        style = {"ncols": -(-len(patches) // 30), "frameon": False, "fontsize": 8.5, "handlelength": 1.2}
        figure.legend(handles=patches, loc="outside right center", **style)
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
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


def _draw_scale(axes: Axes, spacing: float) -> None:
    """A bar of 1, 2 or 5 times a power of ten mm, at most a quarter of the panel's width; spacing: mm per pixel."""
    pixels = np.ptp(axes.get_xlim())
    longest = pixels * spacing / 4
    power = 10.0 ** np.floor(np.log10(longest))
    length = power * max(factor for factor in (1, 2, 5) if factor * power <= longest)
    width = length / spacing / pixels
    style = {"color": "white", "linewidth": 2, "solid_capstyle": "butt", "transform": axes.transAxes}
    axes.plot([0.03, 0.03 + width], [0.03, 0.03], path_effects=[withStroke(linewidth=4, foreground="black")], **style)
    axes.text(0.03 + width / 2, 0.045, f"{length:g} mm", ha="center", va="bottom", transform=axes.transAxes, **_WRITING)
