"""How scans are prepared for a network, the same in training, evaluation and inference."""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import monai
import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import Compose, NormalizeIntensityd, Orientationd, ScaleIntensityRanged, Spacingd
from monai.utils import ensure_tuple

from pgl_ext.code_digest import code_digests, digest
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.checks import CheckLabeld, CheckVolumed
from pgl_ext.transforms.load import LoadVolumed

__all__ = ["Preprocessing", "VolumeSpacingd", "loading", "preprocessing"]


class Preprocessing(Compose):
    """Transforms that prepare scans, with a digest that changes where their result may.

    Args:
        transforms: the steps.
        arguments: plain values that the steps follow from.

    Attributes:
        digest: of the arguments, of the code of the steps that are this package's, and of MONAI's version.
    """

    def __init__(self, transforms: Sequence[Callable], arguments: Mapping[str, Any]) -> None:
        super().__init__(list(transforms))
        code = code_digests(type(step).__module__ for step in (self, *self.flatten().transforms))
        self.digest = digest(json.dumps([dict(arguments), code, monai.__version__], sort_keys=True))


def loading(keys: KeysCollection = "image", task: SegmentationTask | None = None) -> Compose:
    """Read volumes and turn bad ones away, without changing them.

    Args:
        keys: key of the image, and of its label map where there is one.
        task: what the label map shows; needed with one.
    """
    image, *labels = ensure_tuple(keys)
    steps = [LoadVolumed([image, *labels]), CheckVolumed(image)]
    return Compose([*steps, CheckLabeld(labels, task, image_key=image)] if labels else steps)


def preprocessing(
    keys: KeysCollection = "image",
    spacing: Sequence[float] | None = None,
    hu_window: Sequence[float] | None = None,
    task: SegmentationTask | None = None,
    labels_on_file_grid: bool = False,
    extra: Sequence[Callable] = (),
) -> Preprocessing:
    """Read and check a scan, turn it to RAS, resample and clip it, and give it zero mean and unit standard deviation.

    Args:
        keys: key of the image (1, X, Y, Z), and of its label map where there is one.
        spacing: mm per voxel of each axis to resample to, linearly, label maps by nearest voxels; None: as stored.
        hu_window: (low, high) to clip to, in HU or the scan's own unit; None: not clipped.
        task: what the label map shows; needed with one.
        labels_on_file_grid: leave the label map on the grid of its file, for scores that are taken there.
        extra: further steps, such as a user's own.

    Returns:
        the steps with their digest.

    Raises:
        ValueError: the window is empty.
    """
    image, *labels = ensure_tuple(keys)
    placed = [image] if labels_on_file_grid else [image, *labels]
    modes = ["bilinear", *["nearest"] * (len(placed) - 1)]
    steps = [loading(keys, task), Orientationd(placed, axcodes="RAS", labels=None)]
    if spacing is not None:
        steps.append(VolumeSpacingd(placed, pixdim=spacing, mode=modes))
    if hu_window is not None:
        low, high = hu_window
        if not low < high:
            raise ValueError(f"hu_window is {[low, high]}: give the lower value first.")
        steps.append(ScaleIntensityRanged(image, a_min=low, a_max=high, b_min=low, b_max=high, clip=True))
    steps += [NormalizeIntensityd(image), *extra]
    arguments = {
        "keys": [image, *labels],
        "spacing": spacing,
        "hu_window": hu_window,
        # Not the task itself: nothing is prepared otherwise when an organ changes its name.
        "values": task and [task.values, task.background_values],
        "labels_on_file_grid": labels_on_file_grid,
        "extra": [_described(step) for step in extra],
    }
    return Preprocessing(steps, arguments)


def _described(value: Any, within: tuple[Any, ...] = ()) -> Any:
    """A user's own step as JSON has it: its class, the code of its methods, its attributes, and so on within these."""
    if any(value is outer for outer in within):
        return "what it is part of"
    describe = functools.partial(_described, within=(*within, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(describe(entry), sort_keys=True) for entry in value)
    if isinstance(value, (np.ndarray, np.generic)):
        return [str(value.dtype), list(value.shape), digest(value.tobytes())]
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), describe(value.detach().cpu().double().numpy())]
    if isinstance(value, functools.partial):
        return describe([value.func, value.args, value.keywords])
    if isinstance(value, types.MethodType):
        return describe([value.__self__, value.__func__])
    if isinstance(value, types.FunctionType):
        closure = [cell.cell_contents for cell in value.__closure__ or ()]
        return describe([value.__code__, value.__defaults__, value.__kwdefaults__, closure])
    if isinstance(value, types.CodeType):
        return describe([value.co_code.hex(), value.co_consts, value.co_names])
    if hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)):
        kind = type(value)
        methods = {name: entry for name, entry in vars(kind).items() if isinstance(entry, types.FunctionType)}
        return [f"{kind.__module__}.{kind.__qualname__}", describe(methods), describe(vars(value))]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


class VolumeSpacingd(Spacingd):
    """MONAI's ``Spacingd``, with its arguments, in items that hold more than volumes.

    MONAI 1.6 takes every entry of an item whose name begins with that of a volume, such as ``image_path``, for a
    dictionary to write into, and fails where it is text, as in MONAI Label. Here the volumes alone are handed on.
    """

    def __call__(self, data: dict, lazy: bool | None = None) -> dict:
        volumes = {key: data[key] for key in self.key_iterator(dict(data))}
        return {**data, **super().__call__(volumes, lazy)}
