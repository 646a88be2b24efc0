"""From cached cases, image and label map together, to patches and whole volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pgl_ext.data.cache import VolumeCache
from pgl_ext.data.dataset import VolumeDataset
from pgl_ext.task import SegmentationTask

__all__ = ["CaseDataset"]

_POINTS_PER_ORGAN = 10_000


class CaseDataset(VolumeDataset):
    """Samples of labelled cases, each a function of (seed, epoch, index) alone, as in pre-training.

    The transform is given the cached case as ``image`` (2, X, Y, Z), ``organ_points`` (for each organ of the task up to
    10,000 of its voxels, (N, 3)), and, for cases that say which organs were annotated, ``annotated`` (organs,).

    Args:
        data: items with ``image`` and ``label``, optionally ``annotated``.
        cache: makes the cached cases.
        transform: makes a sample; a MONAI randomizable transform.
        task: the organs.
        kwargs: further arguments of :class:`VolumeDataset`.
    """

    def __init__(
        self,
        data: Sequence[dict],
        cache: VolumeCache,
        transform: Callable[[dict], dict],
        task: SegmentationTask,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, cache, transform, **kwargs)
        self.task = task
        self._partly_annotated = any("annotated" in item for item in self.data)
        self._organ_points: dict[int, list[np.ndarray]] = {}

    def inputs(self, volume: int, array: Any) -> dict[str, Any]:
        if volume not in self._organ_points:
            self._organ_points[volume] = self._find_organs(array)
        sample = {"image": array, "organ_points": self._organ_points[volume]}
        if self._partly_annotated:
            annotated = self.data[volume].get("annotated", self.task.names)
            sample["annotated"] = torch.tensor(self.task.channels_of(annotated))
        return sample

    def _find_organs(self, array: Any) -> list[np.ndarray]:
        """Voxels of each organ, a random choice where there are many; the same in every worker."""
        labels = np.asarray(array[1:2])[0]
        places = np.flatnonzero(labels)
        values = labels.ravel()[places]
        generator = np.random.default_rng(0)
        points = []
        for organ in self.task.organs.values():
            found = places[np.isin(values, organ)]
            if len(found) > _POINTS_PER_ORGAN:
                found = generator.choice(found, _POINTS_PER_ORGAN, replace=False)
            points.append(np.stack(np.unravel_index(found, labels.shape), axis=1).astype(np.int32))
        return points
