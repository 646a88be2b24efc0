"""Resampling to a spacing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import Spacingd

__all__ = ["VolumeSpacingd"]


class VolumeSpacingd(Spacingd):
    """MONAI's ``Spacingd``, in items that hold more than volumes.

    MONAI 1.6 takes every entry of an item whose name begins with that of a volume, such as ``image_path``, for a
    dictionary to write into, and fails where it is text, as in MONAI Label. Here the volumes alone are handed on.

    Args:
        args: as of ``Spacingd``.
        kwargs: as of ``Spacingd``.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        volumes = {key: data[key] for key in self.key_iterator(dict(data))}
        return {**data, **super().__call__(volumes, lazy)}
