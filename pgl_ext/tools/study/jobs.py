"""Carries out the runs of a study as jobs of a cluster."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pgl_ext.tools.cluster import Cluster, failure
from pgl_ext.tools.study.runner import RunError, Runner, last_error
from pgl_ext.tools.study.runs import Run

__all__ = ["JobRunner"]

_ATTEMPTS = 3


class JobRunner(Runner):
    """A :class:`Runner` that has each run carried out by a job, which takes the run's lock and goes on with it.

    A job that is lost, or at its time limit, is sent again, up to three times in all, and goes on from its checkpoint.
    Where this process is stopped, so are the jobs.

    Args:
        runs, fingerprints, jobs: see :class:`Runner`; ``jobs`` is how many are sent at a time.
        cluster: where they are sent.
        command: what the job of a run executes.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        fingerprints: Mapping[str, Mapping[str, Any]],
        jobs: int,
        cluster: Cluster,
        command: Callable[[Run], Sequence[str]],
    ) -> None:
        super().__init__(runs, fingerprints, jobs)
        self._cluster, self._command_of = cluster, command
        self._jobs: list[Any] = []

    def _commands(self, run: Run, slot: int, lock: int) -> Iterator[bool]:
        for _ in range(_ATTEMPTS):
            if run.is_finished:
                return
            fcntl.flock(lock, fcntl.LOCK_UN)  # for the job
            (job,) = self._cluster.submit([self._command_of(run)], "pgl-study")
            self._say(f"{run}: job {job.job_id}, log in {run.log}")
            self._jobs.append(job)
            while not job.done():
                yield True
            why, is_lost = failure(job)
            if why and not is_lost:
                raise RunError(last_error(run.log) if run.log.is_file() else why)
        if not run.is_finished:
            raise RunError(f"its jobs were stopped {_ATTEMPTS} times: {why}")

    def _stop(self) -> None:
        for job in self._jobs:
            if not job.done():
                job.cancel(check=False)
