"""Two overlapping views of a volume and small ones around them (PCRLv2)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection

from pgl_ext.transforms.crops import check_factors, checked_size, cut_view, draw_crop_sizes
from pgl_ext.transforms.views import RandOverlappingViewsd

__all__ = ["RandGlobalLocalViewsd"]


class RandGlobalLocalViewsd(RandOverlappingViewsd):
    """Cut two overlapping global views and some small local ones around them (PCRLv2's sub-crops).

    The global views are those of :class:`RandOverlappingViewsd`. The local crops' sizes are drawn per crop and axis
    from ``local_scale_range`` times ``local_size``; their centres lie anywhere in the bounding box of both global
    crops, as far as that lies in the volume. They are padded, resized and flipped as the global ones are.

    With ``min_overlap`` m the intersection over union of the global crops is at least m / (2 - m): with crops of V_1
    and V_2 voxels that share s >= m max(V_1, V_2), it is s / (V_1 + V_2 - s) >= m / (2 - m).

    Adds to the sample: ``views`` (2, C, X, Y, Z), ``affines`` (2, 4, 4) and ``local_views``
    (num_local, C, *local_size), float32.

    Args:
        keys, view_size, scale_range, min_overlap, flip_prob: see :class:`RandOverlappingViewsd`.
        local_size: (X, Y, Z) of the local views in voxels.
        local_scale_range: smallest and largest local crop, as multiples of ``local_size``. The default is a choice of
            ours: local views are to show parts of the global ones both magnified and reduced.
        num_local: how many local views.

    Raises:
        ValueError: where an argument is out of range, or the volume is not (C, X, Y, Z).

    Example:
        >>> transform = RandGlobalLocalViewsd("image", (32, 32, 16)).set_random_state(seed=0)
        >>> sample = transform({"image": torch.rand(1, 64, 64, 40)})
        >>> sample["views"].shape, sample["local_views"].shape
        (torch.Size([2, 1, 32, 32, 16]), torch.Size([6, 1, 16, 16, 16]))
    """

    def __init__(
        self,
        keys: KeysCollection,
        view_size: Sequence[int] | int,
        scale_range: Sequence[float] = (1.1, 1.4),
        min_overlap: float = 0.1,
        flip_prob: float = 0.5,
        local_size: Sequence[int] | int = 16,
        local_scale_range: Sequence[float] = (0.5, 2.0),
        num_local: int = 6,
    ) -> None:
        super().__init__(keys, view_size, scale_range, min_overlap, flip_prob)
        check_factors("local_scale_range", local_scale_range)
        if num_local < 1:
            raise ValueError(f"num_local must be at least 1, got {num_local}.")
        self.local_size = checked_size("local_size", local_size)
        self.local_scale_range = tuple(local_scale_range)
        self.num_local = num_local

    def randomize(self, volume_size: Sequence[int]) -> None:
        """Draw the global crops, then the local ones (num_local, 3), in voxels of the volume, and the flips."""
        super().randomize(volume_size)
        self.local_crop_size = draw_crop_sizes(self.R, self.num_local, self.local_size, self.local_scale_range)
        # A centre outside the volume could leave a crop without any voxel.
        lower = np.maximum(self.crop_start.min(axis=0), 0)
        upper = np.minimum((self.crop_start + self.crop_size).max(axis=0), volume_size)
        # In half voxels: the centre of a crop of an odd number of voxels lies between two edges.
        lowest = -((self.local_crop_size - 2 * lower) // 2)
        highest = (2 * upper - self.local_crop_size) // 2
        self.local_start = self.R.randint(lowest, highest + 1)
        self.local_flip = self.R.random_sample((self.num_local, 3)) < self.flip_prob

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = super().__call__(data)
        boxes = zip(self.local_start, self.local_crop_size, self.local_flip, strict=True)
        local_views = [cut_view(data[self.keys[0]], *box, self.local_size) for box in boxes]
        return {**sample, "local_views": torch.stack(local_views)}
