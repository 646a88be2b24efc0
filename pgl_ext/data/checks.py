"""Checks that find volumes which cannot be used for training."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

__all__ = ["BadVolumeError", "BadVolumesError", "CheckVolumed", "check_volume"]


class BadVolumeError(ValueError):
    """One volume cannot be used for training; the message names it and says why."""


class BadVolumesError(ValueError):
    """Some volumes of a data set cannot be used for training.

    Args:
        bad: reason by volume. The message lists all of them.
        total: number of volumes looked at.
    """

    def __init__(self, bad: Mapping[str, str], total: int) -> None:
        self.bad = dict(bad)
        self.total = total
        lines = [f"  {name}: {reason}" for name, reason in sorted(self.bad.items())]
        super().__init__(
            f"{len(self.bad)} of {total} volumes cannot be used:\n"
            + "\n".join(lines)
            + "\nRepair them or remove them from the data, or leave them out with --skip_bad_files true."
        )

    def __reduce__(self):
        # The default would rebuild the exception from its message alone, and fail in a process pool.
        return type(self), (self.bad, self.total)


def check_volume(image: np.ndarray | torch.Tensor, source: str) -> None:
    """Raise if a volume holds nothing to learn from or would spoil training.

    Args:
        image: voxels ``(C, X, Y, Z)``. Of a :class:`monai.data.MetaTensor` the affine is checked as well.
        source: what to call the volume in the message, usually its path.

    Raises:
        BadVolumeError: no voxels; NaN or infinite voxels; all voxels equal; or an affine that is singular, not
            finite, or of zero spacing.
    """
    affine = getattr(image, "affine", None)
    if affine is not None:
        _check_affine(np.asarray(affine, dtype=np.float64), source)
    voxels = np.asarray(image)
    if voxels.size == 0:
        raise BadVolumeError(f"{source} is empty: shape {voxels.shape}")
    # Minimum and maximum carry NaN and infinity along: no mask of the volume's size unless it is bad.
    low, high = voxels.min(), voxels.max()
    if not np.isfinite([low, high]).all():
        nan, inf = np.isnan(voxels).sum(), np.isinf(voxels).sum()
        raise BadVolumeError(f"{source} has {nan} NaN and {inf} infinite of {voxels.size} voxels")
    if low == high:
        raise BadVolumeError(f"{source} is constant: all {voxels.size} voxels are {low:g}")


def _check_affine(affine: np.ndarray, source: str) -> None:
    if not np.isfinite(affine).all():
        raise BadVolumeError(f"{source} has an affine that is not finite: {affine.tolist()}")
    spacing = np.linalg.norm(affine[:-1, :-1], axis=0)
    if (spacing == 0).any():
        raise BadVolumeError(f"{source} has zero spacing: {spacing.tolist()} mm")
    # Of unit direction vectors, so that the bound does not depend on the spacing.
    if abs(np.linalg.det(affine[:-1, :-1] / spacing)) < 1e-6:
        raise BadVolumeError(f"{source} has a singular affine: {affine.tolist()}")


class CheckVolumed(MapTransform):
    """Pass volumes through :func:`check_volume`; place it right after ``LoadVolumed``.

    There it sees the voxels as stored: normalising would turn a constant volume into zeros, and clipping would hide
    infinite voxels.

    Args:
        keys: keys of the volumes ``(C, X, Y, Z)``.
        allow_missing_keys: don't raise if a key is absent.

    Raises:
        BadVolumeError: see :func:`check_volume`.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            meta = getattr(out[key], "meta", {})
            check_volume(out[key], str(meta.get("filename_or_obj", key)))
        return out
