"""Feature maps of whole volumes, as files that overlay their scans."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy, convert_to_tensor, ensure_tuple_rep

from pgl_ext.files import write_nifti

__all__ = ["FEATURES_SUFFIX", "FeatureMapInferer", "SaveFeatureMapd"]

FEATURES_SUFFIX = "_features.nii.gz"
"""Ending of the files of feature maps."""


class FeatureMapInferer(SlidingWindowInferer):
    """Sliding-window inference that leaves feature j of the stitched map on voxel ``stride * j`` of the volume.

    Differs from :class:`monai.inferers.SlidingWindowInferer` in what this takes: the volume is padded to a multiple of
    the stride at the end of each axis only, with its minimum; all windows start at multiples of the stride; and a
    volume of at most twice a window's voxels is passed whole: faster, and without borders inside it.

    Args:
        stride: output stride of the network per axis, in voxels.
        roi_size: size of the windows in voxels, a multiple of the stride. Larger windows need more memory and lose
            less at their borders.
        overlap: least overlap of neighbouring windows, in [0, 1), as a part of the window; rounded up to the stride.
        sw_batch_size: windows per forward pass.
        sigma_scale: standard deviation of the windows' Gaussian weights, as a part of the window. They fall off towards
            a window's border, where the network sees zeros instead of the volume.
        kwargs: other arguments of ``SlidingWindowInferer``: ``sw_device``, ``device``, ``progress``.

    Raises:
        ValueError: ``roi_size`` is not a multiple of the stride, or ``overlap`` is outside [0, 1).

    Example:
        >>> inferer = FeatureMapInferer(stride=(4, 4, 2), roi_size=(16, 16, 8))
        >>> inferer(torch.rand(1, 1, 39, 21, 11), torch.nn.AvgPool3d((4, 4, 2))).shape
        torch.Size([1, 1, 10, 6, 6])
    """

    def __init__(
        self,
        stride: Sequence[int],
        roi_size: Sequence[int] = (192, 192, 128),
        overlap: float = 0.5,
        sw_batch_size: int = 1,
        sigma_scale: float = 0.125,
        **kwargs: Any,
    ) -> None:
        stride, roi_size = ensure_tuple_rep(stride, 3), ensure_tuple_rep(roi_size, 3)
        if any(r < s or r % s for r, s in zip(roi_size, stride, strict=True)):
            nearest = [max(1, round(r / s)) * s for r, s in zip(roi_size, stride, strict=True)]
            raise ValueError(
                f"roi_size {roi_size} is not a multiple of the network's output stride {stride}. Choose a multiple on "
                f'each axis, for example --roi_size "{nearest}".'
            )
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be in [0, 1), got {overlap}.")
        super().__init__(roi_size, sw_batch_size, overlap, "gaussian", sigma_scale, **kwargs)
        self.stride = stride

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Features (B, F, ceil(X / s_x), ceil(Y / s_y), ceil(Z / s_z)) of volumes (B, C, X, Y, Z)."""
        padded = self._pad(inputs)
        roi_size = self._window(padded.shape[2:])
        return sliding_window_inference(
            padded,
            roi_size,
            self.sw_batch_size,
            # Half precision, as from autocast, could not hold the smallest weights.
            lambda windows: network(windows, *args, **kwargs).float(),
            overlap=self._aligned_overlap(roi_size),
            roi_weight_map=self._weights(roi_size),
            sw_device=self.sw_device,
            device=self.device,
            progress=self.progress,
        )

    def _window(self, size: Sequence[int]) -> tuple[int, ...]:
        if math.prod(size) <= 2 * math.prod(self.roi_size):
            return tuple(size)
        return tuple(min(r, n) for r, n in zip(self.roi_size, size, strict=True))

    def _weights(self, roi_size: Sequence[int]) -> torch.Tensor:
        """Product of three Gaussians. MONAI's has a floor of 1e-3, so that edges would weigh as much as each other."""
        axes = [(torch.arange(n) - (n - 1) / 2) / (n * self.sigma_scale) for n in roi_size]
        x, y, z = (torch.exp(-0.5 * axis.square()) for axis in axes)
        return x[:, None, None] * y[:, None] * z

    def _pad(self, inputs: torch.Tensor) -> torch.Tensor:
        missing = [-n % s for n, s in zip(inputs.shape[2:], self.stride, strict=True)]
        if not any(missing):
            return inputs
        # F.pad counts axes from the last one, the start of each before its end.
        pad = [width for end in reversed(missing) for width in (0, end)]
        return F.pad(inputs, pad, value=float(inputs.min()))

    def _aligned_overlap(self, roi_size: Sequence[int]) -> list[float]:
        """Overlaps with which MONAI's step between windows, ``int(roi * (1 - overlap))``, is a multiple of the stride.

        The last window of an axis is moved back to end with the volume, which is a multiple of the stride too.
        """
        overlaps = []
        for roi, stride in zip(roi_size, self.stride, strict=True):
            step = max(1, int(roi * (1 - self.overlap)) // stride) * stride
            # Half a voxel more, so that rounding cannot lose one.
            overlaps.append(max(0.0, 1 - (step + 0.5) / roi))
        return overlaps


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
        write_nifti(np.moveaxis(features, 0, -1), affine, self.output_dir / name)
