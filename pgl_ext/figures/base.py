"""What the pictures share: saving, colours, axes, grey levels and slices.

Only matplotlib's object interface is used: no display is needed, and pyplot's global state stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure

from pgl_ext.files import write_atomically

__all__ = [
    "BLUE",
    "GREY",
    "ORANGE",
    "figure_to_array",
    "grey_levels",
    "name_ticks",
    "organ_colors",
    "save_figure",
    "show_slice",
    "tidy",
    "unit_range",
]

BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#777777"

_ORGANS = (
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2",  # of Okabe and Ito
    "#e6194b", "#7fff50", "#9a6324", "#b18cff", "#ffb3c1", "#f032e6", "#8c1c3a",
)  # fmt: skip


def organ_colors(count: int) -> np.ndarray:
    """Colours (count, 3), RGB in [0, 1], that can be told apart on grey: the first 14 chosen, further ones hues.

    The first 7 can be told apart by colour-blind people too. A structure has the same colour however many there are.
    """
    chosen = [to_rgb(color) for color in _ORGANS[:count]]
    # Steps of the golden ratio keep any number of hues apart.
    further = [hsv_to_rgb(((0.05 + 0.618034 * number) % 1.0, 0.55, 0.95)) for number in range(count - len(chosen))]
    return np.array([*chosen, *further]).reshape(count, 3)


def figure_to_array(figure: Figure) -> np.ndarray:
    """Render a figure as uint8 RGB (H, W, 3), as for TensorBoard's ``add_image(..., dataformats="HWC")``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure: Figure, out_path: str | Path | None) -> None:
    """Write a figure, where a path is given; its folder is made if missing, the ending sets the format."""
    if out_path is not None:
        write_atomically(lambda file: figure.savefig(file, format=Path(out_path).suffix[1:]), out_path)


def tidy(axes: Axes) -> None:
    """Lines to read values by, and no frame on top and on the right."""
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Names below the places 0, 1, ...; tilted where there are more than three."""
    tilted = len(names) > 3
    axes.set_xticks(range(len(names)), names, rotation=35 if tilted else 0, ha="right" if tilted else "center")


def unit_range(image: np.ndarray) -> np.ndarray:
    """Scale an image to [0, 1] between its 0.5 and 99.5 percentiles."""
    low, high = np.quantile(image, (0.005, 0.995))
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


def grey_levels(volume: np.ndarray) -> np.ndarray:
    """Scale to [0, 1]: HU from -400 to 400, other intensities (none below -500) between percentiles."""
    if volume.min() < -500:
        return np.clip((volume + 400) / 800, 0, 1)
    return unit_range(volume)


def show_slice(axes: Axes, image: np.ndarray, aspect: float = 1.0) -> None:
    """Show a slice (I, J), grey in [0, 1], or RGB (I, J, 3), with its second axis up; aspect: of a voxel, J to I."""
    style = {"cmap": "gray", "vmin": 0, "vmax": 1, "origin": "lower", "interpolation": "nearest"}
    axes.imshow(image.swapaxes(0, 1), aspect=aspect, **style)
    axes.set(xticks=[], yticks=[])
