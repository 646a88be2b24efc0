"""From cached volumes to batches of samples."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from pgl_ext.data.cache import VolumeCache
from pgl_ext.data.cache_file import CachedVolume, CacheReadError
from pgl_ext.data.datalist import SOURCE_FIELDS, item_name
from pgl_ext.data.memory import available_memory
from pgl_ext.distributed import launched_rank_and_world_size, local_world_size, workers_are_forked
from pgl_ext.errors import transform_error
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.checks import BadVolumeError

__all__ = ["CaseDataset", "EpochBatchSampler", "VolumeDataset"]

logger = logging.getLogger(__name__)

_READ_ATTEMPTS = 3
_SECONDS_BETWEEN_ATTEMPTS = 0.2
_POINTS_PER_ORGAN = 10_000


class VolumeDataset(Dataset):
    """Samples of cached volumes, such as pairs of views, each a function of (seed, epoch, index) alone.

    The same samples come whatever the number of workers and the way that they are started, and after a resume. Volumes
    are held in memory as long as they fit, where workers are forked and so share it (on Linux before Python 3.14); the
    others' crops are read from the cache.

    Args:
        data: items of a data list.
        cache: the cache they were prepared in.
        transform: takes ``{"image": (C, X, Y, Z) array}``, with ``task`` and ``group`` of items that have them, and
            returns the sample; a MONAI randomizable transform.
        seed: of all samples.
        memory_limit_gib: memory for volumes, in GiB; default: half of what is available, shared by the training
            processes on this machine. 0 reads everything from the cache.
    """

    def __init__(
        self,
        data: Sequence[dict],
        cache: VolumeCache,
        transform: Callable[[dict], dict],
        seed: int = 0,
        memory_limit_gib: float | None = None,
    ) -> None:
        self.data = list(data)
        self.cache = cache
        self.transform = transform
        self.seed = seed
        if memory_limit_gib is None:
            memory_limit_gib = 0.5 * available_memory() / local_world_size() / 2**30
        # A worker that is not forked would be sent a copy of its own.
        self._in_memory = self._load(memory_limit_gib * 2**30) if workers_are_forked() else {}

    def _load(self, limit: float) -> dict[int, np.ndarray]:
        volumes: dict[int, np.ndarray] = {}
        for index, item in enumerate(self.data):
            limit -= self.cache.nbytes(item)
            if limit < 0:
                break
            try:
                volumes[index] = self._open(index)[:]
            except CacheReadError as error:
                logger.warning("not held in memory, %s: %s", item_name(item), error)
        return volumes

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[dict]:
        """One sample of each volume; indices themselves have no end."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        """Return the sample drawn for ``index`` or ``(epoch, index)``; index modulo length is the volume.

        ``read_errors`` counts volumes that could not be read and were replaced by the next one.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        for skipped in range(len(self.data)):
            volume = (index + skipped) % len(self.data)
            seed = int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])
            try:
                sample = self._read_and_transform(volume, seed)
            except CacheReadError as error:
                logger.warning("skipped %s: %s", item_name(self.data[volume]), error)
                continue
            return {**sample, "read_errors": skipped}
        raise OSError(f"none of the {len(self.data)} volumes could be read from {self.cache.cache_dir}.")

    def inputs(self, volume: int, array: Any) -> dict:
        """What the transform is given for a volume, whose array (C, X, Y, Z) may lie on disk."""
        item = self.data[volume]
        return {"image": array, **{field: item[field] for field in SOURCE_FIELDS if field in item}}

    def _read_and_transform(self, volume: int, seed: int, attempts: int = _READ_ATTEMPTS) -> dict:
        # Anew each time: a transform may have drawn before it reads.
        self.transform.set_random_state(seed)
        try:
            array = self._in_memory[volume] if volume in self._in_memory else self._open(volume)
            return self.transform(self.inputs(volume, array))
        except Exception as error:
            cause = transform_error(error)
            if not isinstance(cause, CacheReadError):
                raise
            if attempts == 1:
                raise cause from cause.__cause__
        # Network file systems fail for moments; a broken cache file is rebuilt by open().
        time.sleep(_SECONDS_BETWEEN_ATTEMPTS)
        return self._read_and_transform(volume, seed, attempts - 1)

    def _open(self, volume: int) -> CachedVolume:
        try:
            return self.cache.open(self.data[volume])
        except (OSError, BadVolumeError) as error:
            raise CacheReadError(f"{type(error).__name__}: {error}") from error


class CaseDataset(VolumeDataset):
    """Samples of labelled cases, each a function of (seed, epoch, index) alone.

    The transform is given the cached case as ``image`` (C + 1, X, Y, Z), ``organ_points`` (for each organ of the task
    up to 10,000 of its voxels, (N, 3)), and, for cases that say which organs were annotated, ``annotated`` (organs,).

    Args:
        data: items with ``image`` and ``label``, optionally ``annotated``.
        cache, transform, kwargs: see :class:`VolumeDataset`.
        task: the organs.
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

    def inputs(self, volume: int, array: Any) -> dict:
        if volume not in self._organ_points:
            self._organ_points[volume] = self._find_organs(array)
        sample = {"image": array, "organ_points": self._organ_points[volume]}
        if self._partly_annotated:
            annotated = self.data[volume].get("annotated", self.task.names)
            sample["annotated"] = torch.tensor(self.task.channels_of(annotated))
        return sample

    def _find_organs(self, array: Any) -> list[np.ndarray]:
        """Voxels of each organ, a random choice where there are many; the same in every worker."""
        labels = np.asarray(array[array.shape[0] - 1 :])[0]
        places = np.flatnonzero(labels)
        values = labels.ravel()[places]
        generator = np.random.default_rng(0)
        points = []
        for organ in self.task.organs.values():
            voxels = places[np.isin(values, organ)]
            if len(voxels) > _POINTS_PER_ORGAN:
                voxels = generator.choice(voxels, _POINTS_PER_ORGAN, replace=False)
            points.append(np.stack(np.unravel_index(voxels, labels.shape), axis=1).astype(np.int32))
        return points


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for ``VolumeDataset``, through all epochs without a pause.

    In an epoch every volume is drawn ``patches_per_volume`` times, each draw by one process. The draws are cut into
    batches as even as possible, at most ``batch_size`` over all processes: no volume is dropped and no batch is tiny.

    Args:
        num_volumes: volumes in the data set.
        batch_size: largest number of samples per optimiser step, over all processes.
        max_epochs: epochs to run through.
        patches_per_volume: samples per volume and epoch; None: as many as ``steps_per_epoch`` needs.
        seed: of the order.
        rank: this process; default: as torchrun started it, like ``world_size``.
        world_size: number of processes.
        steps_per_epoch: of full batches, however many volumes there are, in which each is drawn as often as any other,
            give or take one; counts where ``patches_per_volume`` is None.

    Raises:
        ValueError: a number is less than 1, or there are fewer samples per step than processes.
    """

    def __init__(
        self,
        num_volumes: int,
        batch_size: int,
        max_epochs: int,
        patches_per_volume: int | None = 1,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        steps_per_epoch: int = 250,
    ) -> None:
        launched = launched_rank_and_world_size()
        self.rank = launched[0] if rank is None else rank
        self.world_size = launched[1] if world_size is None else world_size
        length = steps_per_epoch if patches_per_volume is None else patches_per_volume
        if min(num_volumes, batch_size, max_epochs, length) < 1:
            raise ValueError(
                "num_volumes, batch_size, max_epochs and patches_per_volume, or steps_per_epoch, must be at least 1, "
                f"got {num_volumes}, {batch_size}, {max_epochs} and {length}."
            )
        self.draws = length * (batch_size if patches_per_volume is None else num_volumes)
        self.steps = math.ceil(self.draws / batch_size)
        if self.draws // self.steps < self.world_size:
            raise ValueError(
                f"{self.draws} samples in {self.steps} steps leave some of {self.world_size} processes without work: "
                "use fewer processes, a larger --batch_size, or more patches of each volume or case per epoch."
            )
        self.max_epochs = max_epochs
        self.seed = seed
        self.start_step = 0

    def __len__(self) -> int:
        """Optimiser steps per epoch."""
        return self.steps

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all epochs."""
        return self.max_epochs * self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """All batches from ``start_step`` on.

        An iterator that ended with each epoch would empty the workers' queues.
        """
        step = self.start_step
        while step < self.total_steps:
            epoch = step // self.steps
            order = np.random.default_rng([self.seed, epoch]).permutation(self.draws)
            for batch in np.array_split(order, self.steps)[step % self.steps :]:
                yield [(epoch, int(index)) for index in batch[self.rank :: self.world_size]]
                step += 1

    def state_dict(self) -> dict[str, int]:
        """What the order depends on; compared on resume."""
        return {"draws": self.draws, "steps": self.steps, "seed": self.seed}

    def resume(self, step: int, state: dict[str, int]) -> None:
        """Go on after ``step`` optimiser steps of a run whose ``state_dict`` was ``state``.

        Raises:
            ValueError: the data or the batch size have changed since.
        """
        if state != self.state_dict():
            raise ValueError(
                f"the checkpoint was written with {state} (samples and steps per epoch, seed), this run has "
                f"{self.state_dict()}: resume with the same data, batch_size, patches_per_volume and seed."
            )
        self.start_step = step
