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
from monai.transforms import Compose, MapTransform, NormalizeIntensityd, Orientationd, ScaleIntensityRange, Spacingd
from monai.utils import ensure_tuple

from pgl_ext.code_digest import code_digests, digest
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.checks import CheckLabeld, CheckVolumed
from pgl_ext.transforms.load import LoadVolumed

__all__ = ["ClipChannelsd", "Preprocessing", "VolumeSpacingd", "loading", "preprocessing"]


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


def loading(
    keys: KeysCollection = "image",
    task: SegmentationTask | None = None,
    channel_names: Sequence[str] | None = None,
    resample_channels: bool = False,
) -> Compose:
    """Read volumes and turn bad ones away, without changing them.

    Args:
        keys: key of the image, and of its label map where there is one.
        task: what the label map shows; needed with one.
        channel_names, resample_channels: of the image, see :class:`LoadVolumed`.
    """
    image, *labels = ensure_tuple(keys)
    load = LoadVolumed([image, *labels], channel_names=channel_names, resample_channels=resample_channels)
    steps = [load, CheckVolumed(image)]
    return Compose([*steps, CheckLabeld(labels, task, image_key=image)] if labels else steps)


def preprocessing(
    keys: KeysCollection = "image",
    spacing: Sequence[float] | None = None,
    hu_window: Sequence | None = None,
    task: SegmentationTask | None = None,
    labels_on_file_grid: bool = False,
    extra: Sequence[Callable] = (),
    channel_names: Sequence[str] | None = None,
    resample_channels: bool = False,
) -> Preprocessing:
    """Read and check a scan, turn it to RAS, resample and clip it, and give it zero mean and unit standard deviation.

    Args:
        keys: key of the image (C, X, Y, Z), and of its label map where there is one.
        spacing: mm per voxel of each axis to resample to, linearly, label maps by nearest voxels; None: as stored.
        hu_window: (low, high) to clip to, in HU or the scan's own unit; None: not clipped. Or such an entry for each
            channel. Mean and standard deviation are those of each channel by itself.
        task: what the label map shows; needed with one.
        labels_on_file_grid: leave the label map on the grid of its file, for scores that are taken there.
        extra: further steps, such as a user's own.
        channel_names, resample_channels: of the image, see :class:`LoadVolumed`.

    Returns:
        the steps with their digest.

    Raises:
        ValueError: a window is empty, or there are more or fewer windows than channels.
    """
    image, *labels = ensure_tuple(keys)
    placed = [image] if labels_on_file_grid else [image, *labels]
    modes = ["bilinear", *["nearest"] * (len(placed) - 1)]
    steps = [loading(keys, task, channel_names, resample_channels), Orientationd(placed, axcodes="RAS", labels=None)]
    if spacing is not None:
        steps.append(VolumeSpacingd(placed, pixdim=spacing, mode=modes))
    if hu_window is not None:
        steps.append(ClipChannelsd(image, hu_window, None if channel_names is None else len(channel_names)))
    steps += [NormalizeIntensityd(image, channel_wise=True), *extra]
    arguments = {
        "keys": [image, *labels],
        "spacing": spacing,
        "hu_window": hu_window,
        # Not the task itself: nothing is prepared otherwise when an organ changes its name.
        "values": task and [task.values, task.background_values],
        "labels_on_file_grid": labels_on_file_grid,
        "channels": [channel_names and list(channel_names), bool(resample_channels)],
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


class ClipChannelsd(MapTransform):
    """Clip the intensities of volumes (C, X, Y, Z) to a window, or each channel to its own.

    Args:
        keys: of the volumes.
        hu_window: (low, high) for all channels; or for each channel such a window, or None: not clipped.
        channels: number of channels, where it is known.

    Raises:
        ValueError: a window is empty, or there are more or fewer of them than channels.
    """

    def __init__(self, keys: KeysCollection, hu_window: Sequence, channels: int | None = None) -> None:
        super().__init__(keys)
        per_channel = all(window is None or isinstance(window, Sequence) for window in hu_window)
        self.windows = list(hu_window) if per_channel else [hu_window]
        if any(window is not None and (len(window) != 2 or not window[0] < window[1]) for window in self.windows):
            raise ValueError(f"hu_window is {hu_window}: give the lower value first, or a window for each channel.")
        if per_channel:
            self._check(len(self.windows) if channels is None else channels)

    def _check(self, channels: int) -> None:
        if len(self.windows) not in (1, channels):
            raise ValueError(
                f"hu_window has {len(self.windows)} windows for {channels} channels: give one for all, or one (or "
                "null) for each."
            )

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            self._check(len(out[key]))
            out[key] = out[key].clone()
            windows = self.windows * (len(out[key]) // len(self.windows))
            for channel, window in enumerate(windows):
                if window is not None:
                    out[key][channel] = ScaleIntensityRange(*window, *window, clip=True)(out[key][channel])
        return out


class VolumeSpacingd(Spacingd):
    """MONAI's ``Spacingd``, with its arguments, in items that hold more than volumes.

    MONAI 1.6 takes every entry of an item whose name begins with that of a volume, such as ``image_path``, for a
    dictionary to write into, and fails where it is text, as in MONAI Label. Here the volumes alone are handed on.
    """

    def __call__(self, data: dict, lazy: bool | None = None) -> dict:
        volumes = {key: data[key] for key in self.key_iterator(dict(data))}
        return {**data, **super().__call__(volumes, lazy)}
