"""Interleaved timing, shared by the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

__all__ = ["interleaved_times"]


def interleaved_times(
    calls: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, np.ndarray]:
    """Milliseconds that each call took, by name, in the order of the rounds.

    The calls take turns, so that a machine that slows down for a while slows all of them: compare times of one run
    only.

    Args:
        calls: what to time, by name; each is called once before, untimed.
        repeats: timed rounds.
        clock: seconds; ``time.process_time`` for work of one thread, so that a busy machine matters less.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(1e3 * (clock() - start))
    return {name: np.array(t) for name, t in times.items()}
