"""The deformations of Models Genesis (Zhou et al. 2019), whose method restores a patch from its deformed copy.

Each takes a patch (C, X, Y, Z) of intensities in [0, 1] and returns one of the same shape and range. The method's
random flips are those of the views. MONAI's ``RandCoarseShuffle`` shuffles what earlier regions left, and its
``RandCoarseDropout`` draws the number of regions uniformly.

All raise a ValueError where an argument is out of range, or a patch is not (C, X, Y, Z).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import Compose, MapTransform, Randomizable, RandomizableTransform
from monai.utils import convert_to_dst_type, convert_to_numpy

from pgl_ext.settings import check_positive
from pgl_ext.transforms.crops import check_probability

__all__ = ["RandBezierIntensity", "RandDeformedCopyd", "RandLocalShuffle", "RandPaint", "rescale_to_unit"]

_CURVE_POINTS = 1000  # of a Bezier curve, linear between them
_PAINTED_BLOCKS = 5
_FURTHER_WINDOWS = 4  # that are kept beside the first
_BLOCK_PROB = 0.95  # of each block or window that may follow
_BORDER = 3  # voxels that are not painted in


class _RandDeformation(RandomizableTransform):
    """Apply ``deform`` with probability ``prob``."""

    def __init__(self, prob: float = 0.9) -> None:
        # MONAI would clip it.
        check_probability("prob", prob)
        super().__init__(prob)

    def __call__(self, patch: NdarrayOrTensor) -> NdarrayOrTensor:
        """Deform (C, X, Y, Z); returns a new array or tensor, or the same one with probability 1 - ``prob``."""
        if patch.ndim != 4:
            raise ValueError(f"expected a patch (C, X, Y, Z), got shape {tuple(patch.shape)}.")
        super().randomize(None)
        if not self._do_transform:
            return patch
        self.randomize(patch.shape[1:])
        return convert_to_dst_type(self.deform(convert_to_numpy(patch)), patch)[0]

    def deform(self, patch: np.ndarray) -> np.ndarray:
        """Change (C, X, Y, Z) as ``randomize`` drew for its size, (X, Y, Z) in voxels."""
        raise NotImplementedError


class RandLocalShuffle(_RandDeformation):
    """Permute the voxels within small blocks, the same way in all channels.

    The blocks' sides are drawn per axis from 1 to a tenth of the patch's, rounded down but at least 1. Each block is
    shuffled as it was in the original; where blocks overlap, the later one is seen.

    Args:
        prob: probability per patch.
        blocks: number of blocks. Of 10,000 many are covered by later ones or hold a single voxel.
    """

    def __init__(self, prob: float = 0.5, blocks: int = 10_000) -> None:
        super().__init__(prob)
        self.blocks = check_positive(blocks, "blocks", "without shuffling, give prob 0")

    def randomize(self, size: Sequence[int]) -> None:
        size = np.asarray(size)
        self.size = self.R.randint(1, np.maximum(size // 10, 1) + 1, size=(self.blocks, 3))
        self.start = self.R.randint(0, size - self.size + 1)

    def deform(self, patch: np.ndarray) -> np.ndarray:
        voxels, block = _voxels_of_blocks(self.start, self.size, patch.shape[1:])
        # One sort shuffles within all blocks and keeps their order.
        shuffled = voxels[np.argsort(block + self.R.random_sample(len(block)))]
        # NumPy leaves open which of several assignments to one voxel stays.
        last = np.full(patch[0].size, -1)
        np.maximum.at(last, voxels, np.arange(len(voxels)))
        source = np.where(last < 0, np.arange(last.size), shuffled[last])
        return patch.reshape(len(patch), -1)[:, source].reshape(patch.shape)


def _voxels_of_blocks(start: np.ndarray, size: np.ndarray, patch_size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The voxels of all blocks (n, 3), block after block, as flat indices of the patch, and the block of each."""
    voxels, block = np.ravel_multi_index(start.T, patch_size), np.arange(len(start))
    for axis, stride in enumerate((patch_size[1] * patch_size[2], patch_size[2], 1)):
        length = size[block, axis]
        along = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        voxels, block = np.repeat(voxels, length) + stride * along, np.repeat(block, length)
    return voxels, block


class RandBezierIntensity(_RandDeformation):
    """Map intensities through a random monotone curve from 0 to 1, half the time turned upside down.

    The curve is the cubic Bezier B(t) = (1 - t)^3 (0, 0) + 3 (1 - t)^2 t p + 3 (1 - t) t^2 q + t^3 (1, 1) whose control
    points p and q lie anywhere in the unit square: intensity B_x becomes B_y, or 1 - B_y.

    Args:
        prob: probability per patch.
    """

    def randomize(self, size: Sequence[int]) -> None:
        self.control_points = self.R.random_sample((2, 2))
        self.decreasing = self.R.random_sample() < 0.5

    def deform(self, patch: np.ndarray) -> np.ndarray:
        t = np.linspace(0, 1, _CURVE_POINTS)
        weights = np.stack([3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], axis=1)
        x, y = (weights @ [*self.control_points, (1, 1)]).T
        mapped = np.interp(patch, x, 1 - y if self.decreasing else y)
        return mapped.astype(patch.dtype)


class RandPaint(_RandDeformation):
    """Replace small blocks by noise (in-painting), or all but some large windows (out-painting).

    The noise is uniform in [0, 1], drawn per voxel. In-painting takes up to five blocks with sides of a sixth to a
    third of the patch's. Out-painting keeps a window and up to four more, with sides of 3 / 7 to 4 / 7 of the patch's.
    Both lie 3 voxels or more from its border where there is room. Another block or window follows with probability
    0.95; where one does not, there are no more. Sides are drawn per axis and at least 1.

    Args:
        prob: probability per patch.
        inpaint_prob: probability of in-painting where anything is painted; else it is out-painting.
    """

    def __init__(self, prob: float = 0.9, inpaint_prob: float = 0.2) -> None:
        super().__init__(prob)
        check_probability("inpaint_prob", inpaint_prob)
        self.inpaint_prob = inpaint_prob

    def randomize(self, size: Sequence[int]) -> None:
        size = np.asarray(size)
        self.inpaint = self.R.random_sample() < self.inpaint_prob
        if self.inpaint:
            count = self._count(_PAINTED_BLOCKS)
            smallest, largest = np.maximum(size // 6, 1), np.maximum(size // 3, 1)
        else:
            count = 1 + self._count(_FURTHER_WINDOWS)
            smallest, largest = size - 4 * size // 7, size - 3 * size // 7
        self.size = self.R.randint(smallest, largest + 1, size=(count, 3))
        room = size - self.size
        margin = np.minimum(_BORDER, room // 2)
        self.start = self.R.randint(margin, room - margin + 1)

    def _count(self, most: int) -> int:
        """Number of draws that succeed before the first failure, at most ``most``."""
        return int(np.logical_and.accumulate(self.R.random_sample(most) < _BLOCK_PROB).sum())

    def deform(self, patch: np.ndarray) -> np.ndarray:
        inside = np.zeros(patch.shape[1:], dtype=bool)
        for start, stop in zip(self.start, self.start + self.size, strict=True):
            inside[tuple(map(slice, start, stop))] = True
        noise = self.R.random_sample(patch.shape).astype(patch.dtype)
        return np.where(inside if self.inpaint else ~inside, noise, patch)


class RandSteps(Randomizable):
    """Transforms of a tensor in their order, which draw from one random state."""

    def __init__(self, transforms: Sequence[Callable]) -> None:
        self.transforms = Compose(list(transforms), map_items=False)

    def set_random_state(self, seed: int | None = None, state: Any = None) -> Randomizable:
        self.transforms.set_random_state(seed, state)
        return self


class RandDeformedCopyd(RandSteps, MapTransform):
    """Add a deformed copy of the views; the views themselves stay as they are.

    Each view's channels are rescaled to [0, 1] by their smallest and largest values, the view is deformed with draws of
    its own, and mapped back: what the encoder sees is normalised as the views are, in pre-training as in fine-tuning.

    Adds to the sample: ``deformed`` (V, C, X, Y, Z), float32.

    Args:
        keys: key of the views, a tensor (V, C, X, Y, Z).
        transforms: deformations in their order, each (C, X, Y, Z) in [0, 1] to the same.

    Raises:
        ValueError: where there is more than one key.
    """

    def __init__(self, keys: KeysCollection, transforms: Sequence[Callable]) -> None:
        MapTransform.__init__(self, keys)
        RandSteps.__init__(self, transforms)
        if len(self.keys) != 1:
            raise ValueError(f"views have one key, but keys are {self.keys}.")

    def __call__(self, data: dict) -> dict:
        scaled, lowest, span = rescale_to_unit(data[self.keys[0]])
        deformed = torch.stack([self.transforms(view) for view in scaled])
        return {**data, "deformed": deformed * span + lowest}


def rescale_to_unit(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rescale each channel of patches (B, C, X, Y, Z) to [0, 1] by its smallest and largest value; constants become 0.

    Returns:
        the rescaled patches, and smallest values and spans (B, C, 1, 1, 1) that map them back.
    """
    lowest = patches.amin((2, 3, 4), keepdim=True)
    span = (patches.amax((2, 3, 4), keepdim=True) - lowest).clamp_min(1e-7)
    return (patches - lowest) / span, lowest, span
