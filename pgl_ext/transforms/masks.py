"""Conversions between label maps, masks of organs and names."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_tensor

from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.crops import read_crop

__all__ = ["LabelMapd", "NameToIndexd", "OrganMasksd", "SplitCased"]


class OrganMasksd(Transform):
    """Turn logits and label map into masks of the task's organs (organs, X, Y, Z), for metrics.

    The entry ``pred`` has logits (out_channels, X, Y, Z), ``label`` a label map (1, X, Y, Z) with the files' values.
    Voxels that the task ignores are in no mask.
    """

    def __init__(self, task: SegmentationTask) -> None:
        self.task = task

    def __call__(self, data: dict) -> dict:
        # Logits of a large volume are put together on the CPU.
        labels = data["label"].to(data["pred"].device)
        masks = self.task.without_ignored(self.task.masks(data["pred"]), labels)
        return {**data, "pred": masks, "label": self.task.masks_of_labels(labels)}


class LabelMapd(MapTransform):
    """Turn masks of organs (organs, X, Y, Z) into a label map (1, X, Y, Z) with the values of the task's files.

    The masks stay available as ``organs``.
    """

    def __init__(self, keys: KeysCollection, task: SegmentationTask) -> None:
        super().__init__(keys)
        self.task = task

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            masks = out["organs"] = out[key]
            labels = self.task.labels_of_masks(convert_to_tensor(masks, device="cpu"))
            out[key] = MetaTensor(labels, meta=dict(masks.meta))
        return out


class SplitCased(MapTransform):
    """Split a case (C + 1, X, Y, Z) into its image (C, X, Y, Z) and ``label`` (1, X, Y, Z), both float32 and whole.

    Args:
        keys: key of the case, which becomes the image.
    """

    def __call__(self, data: dict) -> dict:
        d = dict(data)
        d.pop("organ_points", None)
        for key in self.key_iterator(d):
            case, _ = read_crop(d[key], (0, 0, 0), d[key].shape[1:])
            d[key], d["label"] = case[:-1], case[-1:]
        return d


class NameToIndexd(MapTransform):
    """Replace a name by its index in a list of names; a batch then holds (B,) int64.

    Args:
        keys: keys of the names.
        names: all names that may occur.

    Raises:
        ValueError: from a call, where a name is not in the list.

    Example:
        >>> NameToIndexd("task", ["colon", "liver"])({"task": "liver"})
        {'task': 1}
    """

    def __init__(self, keys: KeysCollection, names: Sequence[str]) -> None:
        super().__init__(keys)
        self.indices = {str(name): index for index, name in enumerate(names)}

    def __call__(self, data: dict) -> dict:
        d = dict(data)
        for key in self.keys:
            name = str(d[key])
            if name not in self.indices:
                raise ValueError(f"{key} {d[key]!r} is not among the names {list(self.indices)}: add it to them.")
            d[key] = self.indices[name]
        return d
