"""Overlapping views of a volume (PGL paper, section 3.2, steps 1 and 2), and small ones around them (PCRLv2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

from pgl_ext.settings import check_positive
from pgl_ext.transforms.crops import (
    check_factors,
    check_probability,
    checked_size,
    cut_view,
    draw_crop_sizes,
    start_limits,
)

__all__ = ["RandGlobalLocalViewsd", "RandOverlappingViewsd"]

# Positions drawn at once for the second crop. One in 2.5 is accepted at the paper's 10 %, so that all fail once in
# 10^7; at the 46 % of PCRLv2 one in 19, so that all rounds fail once in 10^6.
_CANDIDATES = 32
_ROUNDS = 8


class RandOverlappingViewsd(RandomizableTransform, MapTransform):
    """Cut two overlapping crops of random size from a volume, resize them to the view size and flip them at random.

    Crop sizes are drawn per view and axis from ``scale_range`` times the view size. The first crop lies anywhere in the
    volume, the second anywhere around it where the intersection is at least ``min_overlap`` of the larger crop. Where
    the volume is smaller than a crop, the rest is padded with each channel's smallest value nearby (air, in CT).

    Cropping, scaling and flipping are one linear interpolation per axis, half-pixel as MONAI's ``SpatialCropd``,
    ``Resized(mode="trilinear")`` and ``Flipd``; only the crops' voxels are read.

    Adds to the sample: ``views`` (2, C, X, Y, Z) float32 and ``affines`` (2, 4, 4) float32, view voxel index to voxel
    index of the volume.

    Args:
        keys: key of the volume, a (C, X, Y, Z) tensor or array, such as a compressed one on disk.
        view_size: (X, Y, Z) in voxels.
        scale_range: smallest and largest crop, as multiples of the view size. (1, 1) is the paper's "w/o CS" when
            ``min_overlap`` is 1: then both views are the same crop.
        min_overlap: smallest intersection volume as a fraction of the larger crop's volume, in (0, 1].
        flip_prob: probability of a flip, per view and axis. 0 is the paper's "w/o F".

    Raises:
        ValueError: where an argument is out of range, or the volume is not (C, X, Y, Z).

    Example:
        >>> transform = RandOverlappingViewsd("image", (32, 32, 16)).set_random_state(seed=0)
        >>> sample = transform({"image": torch.rand(1, 64, 64, 40)})
        >>> sample["views"].shape, sample["affines"].shape
        (torch.Size([2, 1, 32, 32, 16]), torch.Size([2, 4, 4]))
    """

    def __init__(
        self,
        keys: KeysCollection,
        view_size: Sequence[int] | int,
        scale_range: Sequence[float] = (1.1, 1.4),
        min_overlap: float = 0.1,
        flip_prob: float = 0.5,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob=1.0)
        if len(self.keys) != 1:
            raise ValueError(f"views are cut from one volume, but keys are {self.keys}.")
        check_factors("scale_range", scale_range)
        largest = (scale_range[0] / scale_range[1]) ** 3
        if not 0 < min_overlap <= largest + 1e-9:
            raise ValueError(
                f"min_overlap must lie in (0, {largest:.3f}] for scale_range {tuple(scale_range)} (a small crop "
                f"can not cover more of a large one), got {min_overlap}."
            )
        check_probability("flip_prob", flip_prob)
        self.view_size = checked_size("view_size", view_size)
        self.scale_range = tuple(scale_range)
        self.min_overlap = min_overlap
        self.flip_prob = flip_prob

    def randomize(self, volume_size: Sequence[int]) -> None:
        """Draw starts and sizes of both crops (2, 3), in voxels of the volume, and the flips (2, 3)."""
        super().randomize(None)
        self.crop_size = draw_crop_sizes(self.R, 2, self.view_size, self.scale_range)
        lowest, highest = start_limits(volume_size, self.crop_size)
        first = self.R.randint(lowest[0], highest[0] + 1)
        self.crop_start = np.stack([first, self._second_start(first, lowest[1], highest[1])])
        self.flip = self.R.random_sample((2, 3)) < self.flip_prob

    def _second_start(self, first: np.ndarray, lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
        """Start of the second crop: uniform over the places around the first where the overlap is large enough.

        Crops placed freely in a large volume hardly ever meet, so candidates are drawn from the places where they do.
        """
        size_1, size_2 = self.crop_size
        near_low = np.clip(first - size_2 + 1, lowest, highest)
        near_high = np.clip(first + size_1 - 1, lowest, highest)
        for _ in range(_ROUNDS):
            candidates = self.R.randint(near_low, near_high + 1, size=(_CANDIDATES, 3))
            shared = np.minimum(first + size_1, candidates + size_2) - np.maximum(first, candidates)
            overlap = np.maximum(shared, 0).prod(axis=1) / max(size_1.prod(), size_2.prod())
            accepted = candidates[overlap >= self.min_overlap]
            if len(accepted):
                return accepted[0]
        # Concentric crops overlap as much as any two of these sizes can.
        return np.clip(first + (size_1 - size_2) // 2, lowest, highest)

    def __call__(self, data: dict) -> dict:
        volume = data[self.keys[0]]
        if len(volume.shape) != 4:
            raise ValueError(f"expected a volume (C, X, Y, Z), got shape {tuple(volume.shape)}.")
        self.randomize(volume.shape[1:])
        boxes = list(zip(self.crop_start, self.crop_size, self.flip, strict=True))
        views = torch.stack([cut_view(volume, *box, self.view_size) for box in boxes])
        return {**data, "views": views, "affines": torch.stack([self._affine(*box) for box in boxes])}

    def _affine(self, start: np.ndarray, size: np.ndarray, flip: np.ndarray) -> torch.Tensor:
        """View voxel index to volume voxel index (4, 4): voxel edges meet, hence the half voxels."""
        zoom = size / self.view_size
        affine = np.diag([*np.where(flip, -zoom, zoom), 1]).astype(np.float32)
        affine[:3, 3] = start - 0.5 + zoom * np.where(flip, np.array(self.view_size) - 0.5, 0.5)
        return torch.from_numpy(affine)


class RandGlobalLocalViewsd(RandOverlappingViewsd):
    """Cut two overlapping global views and some small local ones around them (PCRLv2's sub-crops).

    The global views are those of :class:`RandOverlappingViewsd`. The local crops' sizes are drawn per crop and axis
    from ``local_scale_range`` times ``local_size``; their centres lie anywhere in the bounding box of both global
    crops, as far as that lies in the volume. They are padded, resized and flipped as the global ones are.

    With ``min_overlap`` m the intersection over union of the global crops is at least m / (2 - m).

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
        self.local_size = checked_size("local_size", local_size)
        self.local_scale_range = tuple(local_scale_range)
        self.num_local = check_positive(num_local, "num_local", "PCRLv2 takes 6 local views")

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

    def __call__(self, data: dict) -> dict:
        sample = super().__call__(data)
        boxes = zip(self.local_start, self.local_crop_size, self.local_flip, strict=True)
        local_views = [cut_view(data[self.keys[0]], *box, self.local_size) for box in boxes]
        return {**sample, "local_views": torch.stack(local_views)}
