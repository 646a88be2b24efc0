"""The processes of a run, on one machine or several, and the cores that they have."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = [
    "gather",
    "launched_rank_and_world_size",
    "local_world_size",
    "rank_and_world_size",
    "usable_cores",
    "workers_are_forked",
]


def rank_and_world_size() -> tuple[int, int]:
    """This process' number among those of the process group and how many there are; (0, 1) without a group."""
    distributed = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)


def launched_rank_and_world_size() -> tuple[int, int]:
    """The same as torchrun says in the environment, also before there is a process group."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """How many training processes share this machine, as torchrun, or a study, says in the environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def usable_cores() -> int:
    """CPU cores that this process may use, which on a cluster are not all of the machine's."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on
        return os.process_cpu_count() or 1
    # Linux alone has the other.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_are_forked() -> bool:
    """Whether loading processes share this one's memory, as by default on Linux before Python 3.14."""
    # Not get_start_method() alone, which would settle the default for good.
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return method == "fork"


def gather(value: Any, wait: timedelta | None = None) -> list[Any]:
    """What each process has, by rank; all have to call it.

    Args:
        value: of this process.
        wait: for the slowest of the processes, where that may take longer than the group's limit of 10 or 30 minutes.
    """
    values = [value] * rank_and_world_size()[1]
    if len(values) > 1:
        group = None if wait is None else dist.new_group(timeout=wait, backend="gloo")
        dist.all_gather_object(values, value, group)
        if group is not None:
            dist.destroy_process_group(group)
    return values
