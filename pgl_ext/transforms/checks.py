"""Checks of volumes and label maps."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation
from nibabel.orientations import aff2axcodes

from pgl_ext.errors import few
from pgl_ext.task import SegmentationTask

__all__ = [
    "BadVolumeError",
    "BadVolumesError",
    "CheckLabeld",
    "CheckVolumed",
    "OtherGridError",
    "check_affine",
    "check_volume",
    "on_grid_of",
]

logger = logging.getLogger(__name__)

_LARGEST_LABEL = 2048  # up to which float16, the type of cached label maps, holds every whole number
_MOST_LABELS = 50
_SAMPLE = 100_000  # voxels
_GRID_TOLERANCE = 0.1  # voxels
_LISTED_VALUES = 10


class BadVolumeError(ValueError):
    """One volume cannot be used for training; the message names it and says why."""


class OtherGridError(BadVolumeError):
    """A volume lies on another grid than one that it belongs to, but overlaps it."""


class BadVolumesError(ValueError):
    """Some of ``total`` volumes cannot be used for training; the message lists them.

    Args:
        bad: reason by volume.
        can_skip: whether the program has the option to leave them out.
    """

    def __init__(self, bad: Mapping[str, str], total: int, can_skip: bool = True) -> None:
        super().__init__(dict(bad), total, can_skip)
        self.bad, self.total, self.can_skip = self.args

    def __str__(self) -> str:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in sorted(self.bad.items()))
        remedy = ", or leave them out with --skip_bad_files true" if self.can_skip else ""
        return (
            f"{len(self.bad)} of {self.total} volumes cannot be used:\n{lines}\nRepair them or remove them from the "
            f"data{remedy}."
        )


def check_volume(image: np.ndarray | torch.Tensor, source: str) -> None:
    """Raise where a volume cannot be used for training.

    Args:
        image: voxels ``(C, X, Y, Z)``. The affine of a :class:`monai.data.MetaTensor` is checked as well.
        source: what to call the volume in the message, usually its path.

    Raises:
        BadVolumeError: no voxels; NaN or infinite voxels; all voxels of a channel equal; or an affine that is singular,
            not finite, or of zero spacing.
    """
    affine = getattr(image, "affine", None)
    if affine is not None:
        check_affine(np.asarray(affine, dtype=np.float64), source)
    channels = np.asarray(image)
    if channels.size == 0:
        raise BadVolumeError(f"{source} is empty: shape {channels.shape}")
    for number, voxels in enumerate(channels):
        what = f"channel {number} of {source}" if len(channels) > 1 else source
        # Minimum and maximum pass NaN and infinity on, without a mask of the volume's size.
        low, high = voxels.min(), voxels.max()
        if not np.isfinite([low, high]).all():
            nan, inf = np.isnan(voxels).sum(), np.isinf(voxels).sum()
            raise BadVolumeError(f"{what} has {nan} NaN and {inf} infinite of {voxels.size} voxels")
        if low == high:
            raise BadVolumeError(f"{what} is constant: all {voxels.size} voxels are {low:g}")


def check_affine(affine: np.ndarray, source: str) -> None:
    """Raise where an affine (4, 4), voxel index to mm, is singular, not finite, or of zero spacing."""
    if not np.isfinite(affine).all():
        raise BadVolumeError(f"{source} has an affine that is not finite: {affine.tolist()}")
    spacing = np.linalg.norm(affine[:-1, :-1], axis=0)
    if (spacing == 0).any():
        raise BadVolumeError(f"{source} has zero spacing: {spacing.tolist()} mm")
    # Of unit vectors: the bound does not depend on the spacing.
    if abs(np.linalg.det(affine[:-1, :-1] / spacing)) < 1e-6:
        raise BadVolumeError(f"{source} has a singular affine: {affine.tolist()}")


class CheckVolumed(MapTransform):
    """Pass volumes through :func:`check_volume`, and warn of those that look like label maps.

    Those have whole numbers only, and at most 50 different ones. Place it right after ``LoadVolumed``: normalising
    would turn a constant volume into zeros, and clipping would hide infinite voxels.

    Args:
        keys: keys of the volumes (C, X, Y, Z).

    Raises:
        BadVolumeError: see :func:`check_volume`.
    """

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            source = str(getattr(data[key], "meta", {}).get("filename_or_obj", key))
            check_volume(data[key], source)
            values = _label_values(np.asarray(data[key]))
            if values is not None:
                warning = (
                    f"{source} looks like a label map, but is taken for a scan: its voxels have only {values.size} "
                    "different values, all whole numbers. Keep label maps out of the folder, or list the scans with "
                    "--data_list_file_path."
                )
                logger.warning("%s", warning)
                if isinstance(data[key], MetaTensor):
                    # For whoever keeps the volume, to say it again.
                    data[key].meta["warning"] = warning
        return dict(data)


def _label_values(voxels: np.ndarray) -> np.ndarray | None:
    """The values of what looks like a label map; None of a scan."""
    flat = voxels.ravel(order="K")  # not copied
    # Sorting all voxels takes seconds; for most scans a sample is enough.
    for sample in (flat[:: max(1, flat.size // _SAMPLE)], flat):
        values = np.unique(sample)
        if values.size > _MOST_LABELS or (values != np.rint(values)).any():
            return None
    return values


class CheckLabeld(MapTransform):
    """Check that label maps lie on the grid of their image and hold the task's values.

    Place it right after ``LoadVolumed`` and ``CheckVolumed``. Stored voxel axes of another order or direction are
    turned to the image's. Where the affines differ by rounding, the label map gets the image's, so that both are
    resampled alike.

    Args:
        keys: keys of the label maps ``(1, X, Y, Z)``.
        task: what is to be segmented.
        image_key: key of their image ``(1, X, Y, Z)``.

    Raises:
        ValueError: the task has label values that the cache cannot hold.
        BadVolumeError: a label map does not overlap its image, has another shape or a corner more than a tenth of a
            voxel off; holds a value that is NaN, not a whole number or not the task's; or shows no organ.
    """

    def __init__(self, keys: KeysCollection, task: SegmentationTask, image_key: str = "image") -> None:
        super().__init__(keys)
        if task.values[-1] > _LARGEST_LABEL:
            raise ValueError(
                f"the task has the label value {task.values[-1]}, but values above {_LARGEST_LABEL} are not kept "
                "exactly: renumber the labels."
            )
        self.task = task
        self.image_key = image_key

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = on_grid_of(out[key], out[self.image_key])
            self._check_values(out[key].numpy(), _name(out[key]))
        return out

    def _check_values(self, voxels: np.ndarray, source: str) -> None:
        unknown = voxels[~np.isin(voxels, self.task.values)]
        if unknown.size:
            raise BadVolumeError(f"{source} {self._describe(unknown)}")
        if np.isin(voxels, [*self.task.background_values, *self.task.ignored]).all():
            raise BadVolumeError(
                f"{source} is empty: none of its {voxels.size} voxels belongs to an organ of the task. Label the case "
                "or remove it"
            )

    def _describe(self, unknown: np.ndarray) -> str:
        """What is wrong with voxels that have none of the task's values."""
        fractions = unknown[unknown != np.rint(unknown)]  # NaN among them
        if fractions.size:
            nan = np.isnan(fractions).sum()
            return (
                f"has {nan} NaN voxels and {fractions.size - nan} whose value is not a whole number, such as "
                f"{fractions[0]:g}: it is no label map, or was resampled with interpolation. Give the label map, "
                "resampled with nearest neighbour"
            )
        values, counts = np.unique(unknown, return_counts=True)
        listed = [f"{value:g} ({count} voxels)" for value, count in zip(values, counts, strict=True)]
        return (
            f"has label values that are not the task's: {few(listed, _LISTED_VALUES)}; the task's are "
            f"{list(self.task.values)}. Add them to an organ or to background_values, or correct the label map"
        )


def on_grid_of(
    label: MetaTensor,
    image: MetaTensor,
    its_image: str = "its image",
    remedy: str = "Resample the label map onto the image with nearest neighbour",
) -> MetaTensor:
    """A label map, or a channel, with the affine of its image, its voxel axes turned as the image's are.

    Args:
        label: (1, X, Y, Z).
        image: (C, X, Y, Z).
        its_image: what to call the image in messages.
        remedy: what to do about another grid.

    Raises:
        BadVolumeError: it does not overlap its image.
        OtherGridError: it has another shape, or a corner more than a tenth of a voxel off.
    """
    name, image_name = _name(label), _name(image)
    check_affine(label.affine.numpy(), name)
    axes = aff2axcodes(image.affine.numpy())
    if aff2axcodes(label.affine.numpy()) != axes:
        label = Orientation(axcodes="".join(axes), labels=None)(label)
    (low, high), (image_low, image_high) = _bounds(label), _bounds(image)
    if (low >= image_high).any() or (high <= image_low).any():
        raise BadVolumeError(
            f"{name} does not overlap {its_image} {image_name}: it spans {low.tolist()} to {high.tolist()} mm, the "
            f"other {image_low.tolist()} to {image_high.tolist()} mm. Check that the two belong together"
        )
    shape, image_shape = tuple(label.shape[1:]), tuple(image.shape[1:])
    if shape != image_shape:
        raise OtherGridError(
            f"{name} lies on another grid than {its_image} {image_name}: shape {shape} at {_rounded(label.pixdim)} mm "
            f"against {image_shape} at {_rounded(image.pixdim)} mm. {remedy}"
        )
    corners = _corners(shape)
    in_image = np.linalg.inv(image.affine.numpy()) @ label.affine.numpy() @ corners
    distance = np.abs(in_image - corners).max()
    if distance > _GRID_TOLERANCE:
        raise OtherGridError(
            f"{name} lies on another grid than {its_image} {image_name}: corners up to {distance:.3g} voxels off, "
            f"affine {_rounded(label.affine)} against {_rounded(image.affine)}. {remedy}, or correct its header"
        )
    if not torch.equal(label.affine, image.affine):
        label = label.clone()
        label.affine = image.affine.clone()
    return label


def _corners(shape: Sequence[int]) -> np.ndarray:
    """Homogeneous voxel indices (4, 8) of a volume's corners: edges of its outermost voxels."""
    return np.array([*itertools.product(*((-0.5, size - 0.5) for size in shape), (1.0,))]).T


def _bounds(volume: MetaTensor) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest coordinates of a volume's corners, in mm."""
    corners = (volume.affine.numpy() @ _corners(volume.shape[1:]))[:3].round(1)
    return corners.min(axis=1), corners.max(axis=1)


def _rounded(values: torch.Tensor) -> list:
    return np.round(np.asarray(values, dtype=np.float64), 4).tolist()


def _name(volume: MetaTensor) -> str:
    return str(volume.meta.get("filename_or_obj", "the volume"))
