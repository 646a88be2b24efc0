"""Feature maps of a pre-trained encoder as files."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy, convert_to_tensor

from pgl_ext.data.datalist import FEATURES_SUFFIX
from pgl_ext.weights import read_description

__all__ = ["SaveFeatureMapd", "recorded_input"]


def recorded_input(path: str | os.PathLike) -> dict[str, Any]:
    """How the input of a trained encoder was prepared, as recorded in the JSON beside its file.

    Args:
        path: encoder file; neither it nor the JSON need exist.

    Returns:
        ``hu_window``: (low, high) that intensities are clipped to, None: not clipped; ``spacing`` in mm, None: as
        stored. What is not recorded has the paper's value: [-1024, 325] HU, and the stored spacing.
    """
    settings = {"hu_window": [-1024, 325], "spacing": None}
    if Path(path).with_suffix(".json").is_file():
        description = read_description(path)
        settings["hu_window"] = description.get("normalization", {}).get("clip_hu", settings["hu_window"])
        settings["spacing"] = description.get("spacing")
    return settings


class SaveFeatureMapd(MapTransform):
    """Write feature maps as compressed 4D NIfTI files that overlay their scans in a viewer.

    Features lie along the fourth axis. Feature j of an axis is placed on voxel ``stride * j`` of the preprocessed
    scan: the affine is the scan's times ``diag(stride)``. NIfTI has no float16; values are rounded to it, where they
    are in its range, and stored as float32, which halves the size of the file. The item's map gets the affine too.

    Args:
        keys: keys of the feature maps (F, x, y, z).
        output_dir: folder of ``NAME_features.nii.gz``; made if missing.
        stride: output stride of the network per axis, in voxels.
        image_key: key of the preprocessed scan (C, X, Y, Z), whose affine counts.
        name_key: key of the name.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | os.PathLike,
        stride: Sequence[int],
        image_key: str = "image",
        name_key: str = "name",
    ) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.stride = tuple(stride)
        self.image_key = image_key
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        affine = convert_to_numpy(out[self.image_key].affine, dtype=np.float64) @ np.diag([*self.stride, 1.0])
        for key in self.key_iterator(out):
            features = convert_to_tensor(out[key], dtype=torch.float32, device="cpu")
            out[key] = MetaTensor(features, affine=torch.from_numpy(affine))
            self._write(features.numpy(), affine, f"{out[self.name_key]}{FEATURES_SUFFIX}")
        return out

    def _write(self, features: np.ndarray, affine: np.ndarray, name: str) -> None:
        with np.errstate(over="ignore"):
            rounded = features.astype(np.float16)
        features = (rounded if np.isfinite(rounded).all() else features).astype(np.float32)
        image = nib.Nifti1Image(np.moveaxis(features, 0, -1), affine)
        image.header.set_xyzt_units("mm")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        nib.save(image, self.output_dir / name)
