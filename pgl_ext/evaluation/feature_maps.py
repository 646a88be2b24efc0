"""Feature maps of whole volumes, as files that overlay their scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.data import MetaTensor
from monai.inferers import Inferer, sliding_window_inference
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy, convert_to_tensor, ensure_tuple_rep

from pgl_ext.files import write_nifti
from pgl_ext.transforms.crops import pad_to_minimum

__all__ = ["FEATURES_SUFFIX", "FeatureMapInferer", "SaveFeatureMapd"]

FEATURES_SUFFIX = "_features.nii.gz"
"""Ending of the files of feature maps."""

# Standard deviation of a window's weights, as a part of the window.
_SIGMA = 0.125


class FeatureMapInferer(Inferer):
    """Sliding-window inference that leaves feature j of the stitched map on voxel ``stride * j`` of the volume.

    The volume is padded to a multiple of the stride at the end of each axis only, with each channel's minimum. Windows
    start at multiples of the stride and have Gaussian weights, as the network sees zeros instead of the volume at their
    borders. A volume of at most twice a window's voxels is passed whole: faster, and without borders inside it.

    Args:
        stride: output stride of the network per axis, in voxels.
        roi_size: size of the windows in voxels, a multiple of the stride. Larger windows need more memory and lose
            less at their borders.
        overlap: least overlap of neighbouring windows, in [0, 1), as a part of the window; rounded up to the stride.
        sw_batch_size: windows per forward pass.
        options: of ``sliding_window_inference``: ``sw_device``, ``device``, ``progress``.

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
        **options: Any,
    ) -> None:
        super().__init__()
        self.stride, self.roi_size = ensure_tuple_rep(stride, 3), ensure_tuple_rep(roi_size, 3)
        nearest = [max(1, round(n / step)) * step for n, step in zip(self.roi_size, self.stride, strict=True)]
        if nearest != list(self.roi_size):
            raise ValueError(
                f"roi_size {self.roi_size} is not a multiple of the network's output stride {self.stride}. Choose a "
                f'multiple on each axis, for example --roi_size "{nearest}".'
            )
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be in [0, 1), got {overlap}.")
        self.overlap = overlap
        self.sw_batch_size = sw_batch_size
        self.options = options

    def __call__(self, inputs: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Features (B, F, ceil(X / s_x), ceil(Y / s_y), ceil(Z / s_z)) of volumes (B, C, X, Y, Z)."""
        ends = [-n % step for n, step in zip(inputs.shape[2:], self.stride, strict=True)]
        margins = np.array([(0, end) for end in ends])
        padded = torch.stack([pad_to_minimum(volume, margins) for volume in convert_to_tensor(inputs)])
        size = tuple(padded.shape[2:])
        whole = math.prod(size) <= 2 * math.prod(self.roi_size)
        window = size if whole else tuple(map(min, self.roi_size, size))
        return sliding_window_inference(
            padded,
            window,
            self.sw_batch_size,
            # Half precision, as from autocast, could not hold the smallest weights.
            lambda windows: network(windows).float(),
            overlap=[self._aligned_overlap(roi, step) for roi, step in zip(window, self.stride, strict=True)],
            roi_weight_map=_weights(window),
            **self.options,
        )

    def _aligned_overlap(self, roi: int, stride: int) -> float:
        """Overlap with which MONAI's step between windows, ``int(roi * (1 - overlap))``, is a multiple of the stride.

        The last window of an axis is moved back to end with the volume, which is a multiple of the stride too.
        """
        step = max(1, int(roi * (1 - self.overlap)) // stride) * stride
        # Half a voxel more, so that rounding cannot lose one.
        return max(0.0, 1 - (step + 0.5) / roi)


def _weights(window: Sequence[int]) -> torch.Tensor:
    """Product of three Gaussians. MONAI's has a floor of 1e-3, so that edges would weigh as much as each other."""
    axes = [(torch.arange(n) - (n - 1) / 2) / (n * _SIGMA) for n in window]
    x, y, z = (torch.exp(-0.5 * axis.square()) for axis in axes)
    return x[:, None, None] * y[:, None] * z


class SaveFeatureMapd(MapTransform):
    """Write feature maps as compressed 4D NIfTI files ``NAME_features.nii.gz`` that overlay their scans in a viewer.

    Features lie along the fourth axis. Feature j of an axis is placed on voxel ``stride * j`` of the preprocessed scan,
    the item's ``image`` (C, X, Y, Z): the affine is the scan's times ``diag(stride)``; the item's map gets it too.
    Values are rounded to float16, where they are in its range, and stored as float32, which halves the file.

    Args:
        keys: keys of the feature maps (F, x, y, z).
        output_dir: folder of the files; made if missing.
        stride: output stride of the network per axis, in voxels.
    """

    def __init__(self, keys: KeysCollection, output_dir: PathLike, stride: Sequence[int]) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.stride = tuple(stride)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        affine = convert_to_numpy(out["image"].affine, dtype=np.float64) @ np.diag([*self.stride, 1.0])
        path = self.output_dir / f"{out['name']}{FEATURES_SUFFIX}"
        for key in self.key_iterator(out):
            features = convert_to_tensor(out[key], dtype=torch.float32, device="cpu")
            out[key] = MetaTensor(features, affine=torch.from_numpy(affine))
            rounded = features.half().float()
            features = rounded if bool(rounded.isfinite().all()) else features
            write_nifti(features.movedim(0, -1).numpy(), affine, path)
        return out
