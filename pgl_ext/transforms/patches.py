"""Patches for fine-tuning: around an organ or anywhere, image and label map scaled and flipped together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import ensure_tuple_rep

from pgl_ext.transforms.crops import (
    check_factors,
    checked_size,
    draw_crop_sizes,
    pad_crop,
    pad_to_minimum,
    read_crop,
    resize_crop,
    resize_crop_nearest,
    start_limits,
)

__all__ = ["RandOrganPatchd"]


class RandOrganPatchd(RandomizableTransform, MapTransform):
    """Cut a patch of an image and its label map: a crop of random size, resized to the patch size and flipped.

    With probability ``organ_prob`` the crop is centred on a voxel of an organ, each organ of the case as often as any
    other; else it lies anywhere. The entry ``organ_points`` has (N, 3) voxel indices to centre on for each organ.
    Scaling and flipping are those of pre-training (PGL paper, section 3.2), one interpolation per axis: linear for the
    image, nearest for the label map. Where the volume is smaller than the crop, the image is padded with its smallest
    values nearby and the label map with 0.

    Args:
        keys: key of the case, a (C + 1, X, Y, Z) array or tensor of image and label map; read in part only. Replaced by
            the image's patch (C, *patch_size), float32; ``label`` gets that of the label map.
        patch_size: (X, Y, Z) in voxels.
        scale_range: smallest and largest crop, as multiples of the patch size, drawn per axis. Unlike pre-training's
            1.1 to 1.4 it should have 1 in its middle: scans are segmented at their own scale.
        flip_prob: probability of a flip, one for all axes or one for each. An axis along which left and right organs
            would be confused must not be flipped.
        organ_prob: probability that the patch is centred on an organ.

    Raises:
        ValueError: where an argument is out of range.
    """

    def __init__(
        self,
        keys: str,
        patch_size: Sequence[int] | int,
        scale_range: Sequence[float] = (0.8, 1.25),
        flip_prob: Sequence[float] | float = 0.5,
        organ_prob: float = 0.5,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.patch_size = checked_size("patch_size", patch_size)
        self.flip_prob = ensure_tuple_rep(flip_prob, 3)
        check_factors("scale_range", scale_range)
        if not all(0 <= probability <= 1 for probability in (*self.flip_prob, organ_prob)):
            raise ValueError(f"flip_prob {self.flip_prob} and organ_prob {organ_prob} must lie in [0, 1].")
        self.scale_range = tuple(scale_range)
        self.organ_prob = organ_prob

    def randomize(self, volume_size: Sequence[int], organ_points: Sequence[np.ndarray] = ()) -> None:
        """Draw start and size of the crop (3,), in voxels of the volume, and the flips (3,)."""
        super().randomize(None)
        (self.crop_size,) = draw_crop_sizes(self.R, 1, self.patch_size, self.scale_range)
        lowest, highest = start_limits(volume_size, self.crop_size)
        around_organ = self.R.random_sample() < self.organ_prob
        organs = [points for points in organ_points if len(points)]
        if around_organ and organs:
            points = organs[self.R.randint(len(organs))]
            centre = points[self.R.randint(len(points))].astype(np.int64)
            self.crop_start = np.clip(centre - self.crop_size // 2, lowest, highest)
        else:
            self.crop_start = self.R.randint(lowest, highest + 1)
        self.flip = self.R.random_sample(3) < self.flip_prob

    def __call__(self, data: dict) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            self.randomize(d[key].shape[1:], d.pop("organ_points", ()))
            crop, margins = read_crop(d[key], self.crop_start, self.crop_size)
            image, label = crop[:-1], crop[-1:]
            d[key] = resize_crop(pad_to_minimum(image, margins), self.patch_size, self.flip)
            d["label"] = resize_crop_nearest(pad_crop(label, margins, 0), self.patch_size, self.flip)
        return d
