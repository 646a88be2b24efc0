"""Cases that a network has segmented: their data and their pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import Orientationd
from monai.utils import convert_to_tensor

from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.load import LoadVolumed

__all__ = ["draw_case", "segmented_items"]


def segmented_items(engine: Engine) -> list[dict[str, Any]]:
    """The items of an evaluator's iteration, each with what inference and postprocessing made of it."""
    # Postprocessing may have left an entry in either dict.
    return [{**item, **output} for item, output in zip(engine.state.batch, engine.state.output, strict=True)]


def draw_case(
    item: Mapping[str, Any], maps: Mapping[str, MetaTensor], task: SegmentationTask, path: Path, title: str
) -> None:
    """Draw the organs over a scan's first channel as its file has it, in RAS order and thinned to what a picture shows.

    Args:
        item: ``"image"``, the scan's file, and what else it is read by.
        maps: by title of the column, such as "reference" and "prediction": on the grid of the file a label map
            (1, X, Y, Z) with the task's label values, or masks of the organs, bool (organs, X, Y, Z).
        task: the organs.
        path: picture to write.
        title: heading of the picture.
    """
    # Not above: how pictures are drawn is no part of the code that results depend on.
    from pgl_ext.figures.overlays import plot_overlay, thinning

    if "further_channels" in item:
        item = {name: item[name] for name in item if name not in ("further_channels", "channel_names")}
    data = Orientationd(["image", *maps], axcodes="RAS", labels=None)({**LoadVolumed("image")(item), **maps})
    steps = thinning(data["image"].shape[1:])
    spacing = np.multiply(affine_to_spacing(data["image"].affine), [step.step for step in steps])
    thinned = {key: convert_to_tensor(data[key], device="cpu")[(slice(None), *steps)] for key in ("image", *maps)}
    image = thinned.pop("image")[0].numpy()
    masks = {
        column: (values if values.dtype == torch.bool else task.masks_of_labels(values)).numpy()
        for column, values in thinned.items()
    }
    plot_overlay(image, masks, task.names, spacing, path, title)
