"""Blocks of voxels that are hidden, for methods that restore them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

__all__ = ["RandBlockMaskd"]


class RandBlockMaskd(RandomizableTransform, MapTransform):
    """Draw which blocks of views are hidden, for each view by itself (masked autoencoders, He et al. 2022).

    A grid of cubes is laid over the view at a random offset, and a share of them is hidden. The views themselves stay
    as they are: the method hides what the mask says.

    Args:
        keys: views (V, C, X, Y, Z); for the key ``views`` the mask is called ``mask`` by default.
        block_size: (smallest, largest) side of the cubes, in voxels, drawn per view.
        share: (smallest, largest) share of the cubes that are hidden, drawn per view.
        mask_key: of the mask (V, 1, X, Y, Z), true where hidden.

    Raises:
        ValueError: a range is empty, or lies outside [1, infinity) or (0, 1).
    """

    def __init__(
        self,
        keys: KeysCollection = "views",
        block_size: Sequence[int] = (4, 8),
        share: Sequence[float] = (0.6, 0.75),
        mask_key: str = "mask",
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        for name, (low, high), least, most in (("block_size", block_size, 1, np.inf), ("share", share, 0.01, 0.99)):
            if not least <= low <= high <= most:
                raise ValueError(f"{name} must be (smallest, largest) in [{least}, {most}], got {(low, high)}.")
        self.block_size, self.share, self.mask_key = block_size, share, mask_key

    def randomize(self, size: Sequence[int]) -> np.ndarray:
        """Draw a mask of size (X, Y, Z), in voxels."""
        side = self.R.randint(self.block_size[0], self.block_size[1] + 1)
        share = self.R.uniform(*self.share)
        grid = [-(-voxels // side) + 1 for voxels in size]
        hidden = np.zeros(np.prod(grid), dtype=bool)
        hidden[self.R.permutation(hidden.size)[: max(1, round(share * hidden.size))]] = True
        mask = hidden.reshape(grid)
        for axis, voxels in enumerate(size):
            start = self.R.randint(side)
            mask = mask.repeat(side, axis).take(range(start, start + voxels), axis)
        return mask

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        """Add the mask of the views."""
        out = dict(data)
        for key in self.key_iterator(out):
            views = out[key]
            masks = [self.randomize(views.shape[2:]) for _ in views]
            out[self.mask_key] = torch.from_numpy(np.stack(masks))[:, None]
        return out
