"""Sliding windows over whole volumes, for feature maps and for segmentation, and averaging over flips."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer, sliding_window_inference
from monai.utils import ensure_tuple_rep

from pgl_ext.task import SegmentationTask

__all__ = ["FeatureMapInferer", "FlipInferer", "VolumeInferer"]


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


class VolumeInferer(SlidingWindowInferer):
    """MONAI's sliding windows with Gaussian weights, padded as training pads its patches, for any precision.

    Volumes smaller than a window are padded with their smallest value instead of 0, which after normalisation would
    be tissue. Windows are added up in float32: half precision, as from autocast, cannot hold their smallest weights.

    Args:
        roi_size: size of the windows in voxels.
        sw_batch_size: windows per forward pass.
        overlap: of neighbouring windows, in [0, 1), as a part of the window.
        kwargs: other arguments of ``SlidingWindowInferer``: ``cpu_thresh``, ``sw_device``, ``device``, ``progress``.

    Raises:
        ValueError: ``overlap`` is outside [0, 1), or a size is not positive.
    """

    def __init__(self, roi_size: Sequence[int], sw_batch_size: int = 1, overlap: float = 0.5, **kwargs: Any) -> None:
        roi_size = ensure_tuple_rep(roi_size, 3)
        if min(roi_size) < 1:
            raise ValueError(f"roi_size must be positive on each axis, got {roi_size}.")
        if sw_batch_size < 1:
            raise ValueError(f"sw_batch_size must be at least 1, got {sw_batch_size}.")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be in [0, 1), got {overlap}.")
        super().__init__(roi_size, sw_batch_size, overlap, "gaussian", **kwargs)

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Outputs (B, out_channels, X, Y, Z), float32, of volumes (B, C, X, Y, Z)."""
        # A MetaTensor would keep its books in every layer of the network.
        inputs = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        self.cval = float(inputs.min())
        return super().__call__(inputs, lambda windows: network(windows, *args, **kwargs).float())


class FlipInferer(Inferer):
    """Run another inferer on a volume and its mirror images, and average the probabilities, flipped back.

    With n axes the network sees 2^n volumes. Organs keep their sides, as predictions are flipped back, provided that
    the network was trained on flipped scans too: one that was not takes the left kidney of a mirrored scan for the
    right one. Use only axes along which training flipped. Without axes, the default, it is plain inference whose
    output are probabilities.

    How much the flips disagree is part of :func:`pgl_ext.transforms.restore.predictive_entropy` of the average.

    Args:
        inferer: what runs the network, such as :class:`VolumeInferer`; its output is overwritten.
        task: turns logits into probabilities.
        axes: spatial axes to flip along, 0 to 2 for x, y, z of the network's input.

    Raises:
        ValueError: an axis is not one of 0, 1, 2, or is named twice.

    Example:
        >>> inferer = FlipInferer(VolumeInferer((16, 16, 8)), SegmentationTask({"spleen": [1]}), axes=(0, 1))
        >>> inferer(torch.rand(1, 1, 20, 16, 9), torch.nn.Conv3d(1, 2, 1)).shape
        torch.Size([1, 2, 20, 16, 9])
    """

    def __init__(self, inferer: Inferer, task: SegmentationTask, axes: Sequence[int] = ()) -> None:
        super().__init__()
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        if not set(axes) <= {0, 1, 2} or len(set(axes)) < len(axes):
            raise ValueError(f'flip axes must be different ones of 0, 1, 2 (x, y, z), such as "[0, 1]", got {axes}.')
        self.inferer = inferer
        self.task = task
        self.axes = axes

    @torch.no_grad()
    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Probabilities (B, out_channels, X, Y, Z), float32, of volumes (B, C, X, Y, Z)."""
        inputs = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        probabilities = self._predict(inputs, network, *args, **kwargs)
        for flip in self._flips():
            probabilities += self._predict(inputs.flip(flip), network, *args, **kwargs).flip(flip)
        return probabilities.div_(2 ** len(self.axes))

    def _flips(self) -> list[tuple[int, ...]]:
        """Dimensions of a batch to flip, for every combination of axes but the empty one."""
        dims = [2 + axis for axis in self.axes]
        return [flip for count in range(1, len(dims) + 1) for flip in itertools.combinations(dims, count)]

    def _predict(self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any):
        outputs = self.inferer(inputs, network, *args, **kwargs)
        outputs = (outputs.as_tensor() if isinstance(outputs, MetaTensor) else outputs).float()
        # In place and in slices: all classes of a whole scan are gigabytes, which need not be held twice.
        for part in outputs.split(16, dim=2):
            part.copy_(self.task.probabilities(part))
        return outputs
