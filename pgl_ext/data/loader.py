"""Loading processes of a training, which outlive the signals that stop it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pgl_ext.data.cache import can_be_sent
from pgl_ext.distributed import local_world_size, usable_cores, workers_are_forked

__all__ = ["TrainingLoader", "default_workers", "delay_sigterm"]

_SECONDS_AFTER_SIGTERM = 30
_TELLS_WHO_SENT_IT = hasattr(signal, "sigtimedwait")


class TrainingLoader(DataLoader):
    """PyTorch's ``DataLoader`` for training: whole batches by a sampler, and workers that outlive SIGTERM and Ctrl-C.

    Args:
        dataset: what is loaded.
        batch_sampler: an :class:`EpochBatchSampler`.
        num_workers: loading processes; 0: load in this one.
        device: that the batches go to; memory is pinned for GPUs.

    Raises:
        ValueError: the data set cannot be sent to workers that are not forked.
    """

    def __init__(
        self, dataset: Dataset, batch_sampler: Sampler, num_workers: int, device: torch.device | str = "cpu"
    ) -> None:
        if num_workers and not workers_are_forked() and not can_be_sent(dataset):
            raise ValueError(
                "the data set cannot be sent to loading processes, probably since a transform has a lambda: give it a "
                "function that can be imported, or set --num_workers 0."
            )
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            worker_init_fn=delay_sigterm,
            pin_memory=torch.device(device).type == "cuda",
        )

    def __iter__(self) -> Iterator:
        """Batches of the workers.

        Raises:
            MemoryError: there is no room in shared memory for them.
        """
        try:
            yield from self._started()
        except RuntimeError as error:
            if "shared memory" not in str(error):  # as PyTorch 2.13 has it, where they were killed too
                raise
            raise MemoryError(
                "loading processes have no room in shared memory, /dev/shm: give the container more, as with 'docker "
                "run --shm-size 8g', or set --num_workers 0."
            ) from None

    def _started(self) -> Iterator:
        """Start the workers, all of whose threads inherit that SIGTERM is blocked, those of libraries included."""
        if not self.num_workers or not _TELLS_WHO_SENT_IT:
            return super().__iter__()
        resource_tracker.ensure_running()  # which unblocks the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def default_workers() -> int:
    """Loading processes for a training: one per core that it may use, at most 8."""
    return min(8, usable_cores() // local_world_size())


def delay_sigterm(worker: int) -> None:
    """For ``worker_init_fn``: let a loading process go on for 30 s after a SIGTERM of others than its training process.

    Torchrun and cluster schedulers send it to all processes of a job. The training one then finishes its step and saves
    a checkpoint, which needs those that load for it. On macOS and Windows, which do not tell who sent it, they end.
    """
    # Ctrl-C in a terminal goes to all processes too; the training one ends those that load for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _TELLS_WHO_SENT_IT:  # a handler would not be told either
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        training = multiprocessing.parent_process().pid  # not os.getppid(): a server may have forked this process
        threading.Thread(target=_end_after_sigterm, args=(training,), daemon=True).start()


def _end_after_sigterm(parent: int) -> None:
    sent = signal.sigwaitinfo({signal.SIGTERM})
    while sent is not None and sent.si_pid != parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, _SECONDS_AFTER_SIGTERM)
    os._exit(0)
