"""Sliding windows over whole volumes, and averaging over flips and networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer, SlidingWindowInferer
from monai.utils import convert_to_tensor, ensure_tuple_rep

from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.crops import pad_to_minimum

__all__ = ["FlipInferer", "VolumeInferer"]

_Network = Callable[[torch.Tensor], torch.Tensor]


class VolumeInferer(SlidingWindowInferer):
    """MONAI's sliding windows with Gaussian weights, padded as training pads its patches, for any precision.

    Volumes smaller than a window are padded with each channel's minimum instead of 0, which after normalisation would
    be tissue.
    Windows are added up in float32: half precision, as from autocast, cannot hold their smallest weights.

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

    def __call__(self, inputs: torch.Tensor, network: _Network) -> torch.Tensor:
        """Outputs (B, out_channels, X, Y, Z), float32, of volumes (B, C, X, Y, Z)."""
        # A MetaTensor is slow: it tracks its metadata through every operation of the network.
        inputs = convert_to_tensor(inputs)
        size = inputs.shape[2:]
        missing = np.maximum(np.subtract(self.roi_size, size), 0)
        before = missing // 2
        if missing.any():
            margins = np.stack([before, missing - before], axis=1)
            inputs = torch.stack([pad_to_minimum(volume, margins) for volume in inputs])
        outputs = super().__call__(inputs, lambda windows: network(windows).float())
        return outputs[(..., *(slice(start, start + length) for start, length in zip(before, size, strict=True)))]


class FlipInferer(Inferer):
    """Run another inferer on a volume and its mirror images, and average the probabilities, flipped back.

    Where there are several networks, as of the folds of a cross-validation, their probabilities are averaged too.
    With n axes a network sees 2^n volumes. Use only axes along which training flipped: another network takes the left
    kidney of a mirrored scan for the right one. Without axes, the default, it is plain inference whose output are
    probabilities.

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
        self, inputs: torch.Tensor, network: _Network | torch.nn.ModuleList, models: Iterable[int] | None = None
    ) -> torch.Tensor:
        """Segment volumes.

        Args:
            inputs: (B, C, X, Y, Z).
            network: one, or a list of several.
            models: numbers, from 0, of those in the list that are averaged; None: all.

        Returns:
            Probabilities (B, out_channels, X, Y, Z), float32.
        """
        inputs = convert_to_tensor(inputs)
        networks = network if isinstance(network, torch.nn.ModuleList) else [network]
        networks = networks if models is None else [networks[int(number)] for number in models]
        dims = [2 + axis for axis in self.axes]
        flips = itertools.chain(*(itertools.combinations(dims, count) for count in range(len(dims) + 1)))
        passes = list(itertools.product(networks, flips))
        probabilities = self._predict(inputs, *passes[0])
        for one in passes[1:]:
            probabilities += self._predict(inputs, *one)
        return probabilities.div_(len(passes))

    def _predict(self, inputs: torch.Tensor, network: _Network, flip: tuple[int, ...]) -> torch.Tensor:
        outputs = self.inferer(inputs.flip(flip) if flip else inputs, network).float()
        # In place and in slices: all classes of a whole scan are gigabytes, which need not be held twice.
        for slab in outputs.split(16, dim=2):
            slab.copy_(self.task.probabilities(slab))
        return outputs.flip(flip) if flip else outputs
