"""Jobs on a cluster, through submitit: SLURM's, or processes of this machine."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.utils import optional_import

__all__ = ["Cluster", "failure", "run_jobs"]

_PAUSE = 0.2  # seconds between looks at the jobs
_LOG_END = 2000  # characters of a job's errors in which the message is looked for


class Cluster:
    """Where jobs are sent.

    Args:
        folder: for the jobs' logs, which their nodes have to reach too.
        name: ``"slurm"``; ``"local"``, processes of this machine; or ``"auto"``, the first where there is SLURM.
        resources: of a job, as submitit calls them: ``timeout_min``, ``mem_gb``, ``cpus_per_task``, ``gpus_per_node``,
            ``slurm_partition`` and so on. Default: a day on one core.

    Raises:
        ImportError: submitit is not installed.
        ValueError: a resource is not known.
    """

    def __init__(self, folder: Path, name: str = "auto", resources: Mapping[str, Any] | None = None) -> None:
        submitit, found = optional_import("submitit")
        if not found:
            raise ImportError("Jobs on a cluster need the package 'submitit': pip install submitit")
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=None if name == "auto" else name)
            self._executor.update_parameters(**{"timeout_min": 24 * 60, **(resources or {})})
        except (NameError, RuntimeError, ValueError) as error:
            raise ValueError(f"the cluster {name!r} or its resources {dict(resources or {})}: {error}") from error

    def submit(self, commands: Sequence[Sequence[str]], title: str) -> list[Any]:
        """Send commands as jobs, several as one array; the jobs, in submitit's class."""
        self._executor.update_parameters(name=title)
        if len(commands) == 1:
            return [self._executor.submit(subprocess.run, list(commands[0]), check=True)]
        with self._executor.batch():
            return [self._executor.submit(subprocess.run, list(command), check=True) for command in commands]


def run_jobs(cluster: Cluster, commands: Sequence[Sequence[str]], title: str) -> None:
    """Send commands to a cluster and wait for all of them; where this is stopped, they are cancelled.

    Raises:
        ChildProcessError: jobs failed or were lost; the message says which, and why.
    """
    jobs = cluster.submit(commands, title)
    print(f"{len(jobs)} jobs, {jobs[0].job_id} and on; logs in {jobs[0].paths.folder}", flush=True)
    waiting = list(jobs)
    try:
        while waiting := [job for job in waiting if not job.done()]:
            time.sleep(_PAUSE)
    finally:
        for job in waiting:
            job.cancel(check=False)
    failures = [f"  {job.job_id}: {why}" for job in jobs if (why := failure(job)[0])]
    if failures:
        raise ChildProcessError("\n".join([f"{len(failures)} of {len(jobs)} jobs failed or were lost:", *failures]))


def failure(job: Any) -> tuple[str, bool]:
    """Why a job that is done did not end well, with its log, empty where it did; and whether it was merely stopped."""
    error = str(job.exception() or "") if job.paths.result_pickle.is_file() else None
    if error == "":
        return "", False
    log = Path(job.paths.stderr)
    if error is None or re.search("exit status 143|SIGTERM|SIGKILL", error):
        return f"stopped by its scheduler, or killed (log: {log})", True
    lines = log.read_text(errors="replace")[-_LOG_END:].splitlines() if log.is_file() else []
    return f"{next((line for line in lines if line.startswith('error: ')), 'it failed')} (log: {log})", False
