"""From cached volumes to batches of samples."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from pgl_ext.data.cache import VolumeCache, prepare_items
from pgl_ext.data.datalist import SOURCE_FIELDS, find_volumes, item_name, load_datalist, source_names, split_datalist
from pgl_ext.data.memory import available_memory
from pgl_ext.distributed import rank_and_world_size

__all__ = ["EpochBatchSampler", "VolumeDataset", "outlive_sigterm", "prepare_volumes"]

logger = logging.getLogger(__name__)

_READ_ATTEMPTS = 3
_SECONDS_BETWEEN_ATTEMPTS = 0.2
_SECONDS_AFTER_SIGTERM = 30


def prepare_volumes(
    cache: VolumeCache,
    dataset_dir: str | None = None,
    data_list_file_path: str | Sequence[str] | None = None,
    data_list_key: str = "training",
    validation_fraction: float = 0.05,
    seed: int = 0,
    skip_bad_files: bool = False,
    report_path: str | None = None,
    source_fields: Sequence[str] = (),
) -> dict[str, list[dict]]:
    """The start-up scan: find the volumes, check and cache each, and hold some out for validation.

    In a distributed run every process caches its share and learns of the others' bad files.

    Args:
        cache: where the preprocessed volumes are kept.
        dataset_dir: folder that is searched recursively, or that the data list's paths are relative to.
        data_list_file_path: Decathlon-style JSON to use instead of searching, or several.
        data_list_key: the list in that JSON.
        validation_fraction: share of the volumes held out, at least one.
        seed: of the split.
        skip_bad_files: go on without bad files and write their list to ``report_path``.
        report_path: text file, one ``path<TAB>reason`` per line.
        source_fields: what the method has to know of every scan, of ``"task"`` and ``"group"``.

    Returns:
        ``training`` and ``validation``: lists of items.

    Raises:
        BadVolumesError: listing all bad files at once.
        FileNotFoundError, ValueError: where folder or list are missing or empty, or scans lack a source field.
    """
    if data_list_file_path:
        items = load_datalist(data_list_file_path, dataset_dir, data_list_key)
    elif dataset_dir:
        items = find_volumes(dataset_dir)
    else:
        raise ValueError("no scans given: set --dataset_dir to a folder of scans, or --data_list_file_path to a list.")
    # Before volumes are prepared, which can take hours.
    for field in source_fields:
        source_names(items, field)
    items = prepare_items(cache, items, skip_bad_files, report_path)
    training, validation = split_datalist(items, validation_fraction, seed)
    if rank_and_world_size()[0] == 0:
        logger.info("%d volumes for training, %d held out for validation.", len(training), len(validation))
    return {"training": training, "validation": validation}


class VolumeDataset(Dataset):
    """Samples of cached volumes, such as pairs of views, each a function of (seed, epoch, index) alone.

    The same samples come whatever the number of workers, and after a resume. Volumes are held in memory as long as they
    fit; the others' crops are read from the cache.

    Args:
        data: items of a data list.
        cache: the cache they were prepared in.
        transform: takes ``{"image": (C, X, Y, Z) array}``, with ``task`` and ``group`` of items that have them, and
            returns the sample; a MONAI randomizable transform.
        seed: of all samples.
        memory_limit_gib: memory for volumes, in GiB; default: half of what is available to this process' share of the
            machine (``processes``). 0 reads everything from the cache.
        processes: training processes on this machine.
    """

    def __init__(
        self,
        data: Sequence[dict],
        cache: VolumeCache,
        transform: Callable[[dict], dict],
        seed: int = 0,
        memory_limit_gib: float | None = None,
        processes: int = 1,
    ) -> None:
        self.data = list(data)
        self.cache = cache
        self.transform = transform
        self.seed = seed
        if memory_limit_gib is None:
            memory_limit_gib = 0.5 * available_memory() / processes / 2**30
        self._in_memory = self._load(memory_limit_gib * 2**30)

    def _load(self, limit: float) -> dict[int, np.ndarray]:
        # Loaded before the workers are forked: they share these pages with this process.
        volumes: dict[int, np.ndarray] = {}
        for index, item in enumerate(self.data):
            limit -= self.cache.nbytes(item)
            if limit < 0:
                break
            volumes[index] = self.cache.open(item)[:]
        return volumes

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One sample of each volume; indices themselves have no end."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Return the sample drawn for ``index`` or ``(epoch, index)``; index modulo length is the volume.

        ``read_errors`` counts volumes that could not be read and were replaced by the next one.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        for skipped in range(len(self.data)):
            volume = (index + skipped) % len(self.data)
            seed = int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])
            self.transform.set_random_state(seed)
            try:
                sample = self._read_and_transform(volume)
            except OSError as error:
                logger.warning("skipped %s: %s", item_name(self.data[volume]), error)
                continue
            return {**sample, "read_errors": skipped}
        raise OSError(f"none of the {len(self.data)} volumes could be read from {self.cache.cache_dir}.")

    def inputs(self, volume: int, array: Any) -> dict[str, Any]:
        """What the transform is given for a volume, whose array (C, X, Y, Z) may lie on disk."""
        item = self.data[volume]
        return {"image": array, **{field: item[field] for field in SOURCE_FIELDS if field in item}}

    def _read_and_transform(self, volume: int) -> dict[str, Any]:
        if volume in self._in_memory:
            return self.transform(self.inputs(volume, self._in_memory[volume]))
        for attempt in range(_READ_ATTEMPTS):
            try:
                return self.transform(self.inputs(volume, self.cache.open(self.data[volume])))
            except Exception as error:
                # Network file systems fail for moments; a broken cache file is rebuilt by open().
                if attempt == _READ_ATTEMPTS - 1:
                    raise OSError(f"{type(error).__name__}: {error}") from error
                time.sleep(_SECONDS_BETWEEN_ATTEMPTS)
        raise AssertionError("unreachable")


def outlive_sigterm(worker: int) -> None:
    """For ``worker_init_fn``: let a loading process go on for 30 s after SIGTERM.

    Torchrun and cluster schedulers send the signal to all processes of a job. The training one then finishes its step
    and saves a checkpoint, which it could not do if those that load for it ended at once.

    Args:
        worker: number of the process, not used.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_AFTER_SIGTERM))


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for ``VolumeDataset``, through all epochs without a pause.

    In an epoch every volume is drawn ``patches_per_volume`` times, each draw by one process. The draws are cut into
    batches as even as possible, at most ``batch_size`` over all processes: no volume is dropped and no batch is tiny.

    Args:
        num_volumes: volumes in the data set.
        batch_size: largest number of samples per optimiser step, over all processes.
        max_epochs: epochs to run through.
        patches_per_volume: samples per volume and epoch.
        seed: of the order.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: where there are fewer samples per step than processes.
    """

    def __init__(
        self,
        num_volumes: int,
        batch_size: int,
        max_epochs: int,
        patches_per_volume: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if min(num_volumes, batch_size, max_epochs, patches_per_volume) < 1:
            raise ValueError(
                "num_volumes, batch_size, max_epochs and patches_per_volume must be at least 1, got "
                f"{num_volumes}, {batch_size}, {max_epochs} and {patches_per_volume}."
            )
        self.draws = num_volumes * patches_per_volume
        self.steps = math.ceil(self.draws / batch_size)
        if self.draws // self.steps < world_size:
            raise ValueError(
                f"{self.draws} samples in {self.steps} steps leave some of {world_size} processes without work: use "
                "fewer processes, a larger --batch_size, or more patches of each volume or case per epoch."
            )
        self.max_epochs = max_epochs
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_step = 0

    def __len__(self) -> int:
        """Optimiser steps per epoch."""
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """All batches from ``start_step`` on.

        An iterator that ended with each epoch would empty the workers' queues.
        """
        step = self.start_step
        while step < self.max_epochs * self.steps:
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
            ValueError: where the data or the batch size have changed since.
        """
        if state != self.state_dict():
            raise ValueError(
                f"the checkpoint was written with {state} (samples and steps per epoch, seed), this run has "
                f"{self.state_dict()}: resume with the same data, batch_size, patches_per_volume and seed."
            )
        self.start_step = step
