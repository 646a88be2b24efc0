"""Carries out the runs of a study, several at a time, each command in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from pgl_ext.distributed import usable_cores
from pgl_ext.tools.study.configs import Command
from pgl_ext.tools.study.fingerprint import differences, fingerprint
from pgl_ext.tools.study.runs import Run, bundle_command

__all__ = ["RunError", "Runner", "default_jobs", "last_error", "time_left"]

_PAUSE = 0.1  # seconds between looks at the running processes
_LOG_END = 65536  # bytes of a log in which its last error is looked for


def default_jobs() -> int:
    """One run at a time on each GPU, or one on the CPU."""
    return max(1, len(_gpus()))


def time_left(runs: Iterable[Run], jobs: int) -> str:
    """How long the runs that are not finished will take, by those that are; empty where that is not known.

    A pre-training takes as long as others of its method, or else of any, a fine-tuning as long as others.
    """
    runs = list(runs)
    seconds = {run: run.result()["seconds"] for run in runs if run.is_finished}
    left = []
    for run in runs:
        if run not in seconds:
            alike = [one for one in seconds if one.is_pretraining == run.is_pretraining]
            same = [one for one in alike if run.is_pretraining and one.method == run.method]
            if not alike:
                return ""
            left.append(fmean(seconds[one] for one in same or alike))
    return tqdm.format_interval(max([sum(left) / jobs, *left]))


class RunError(Exception):
    """Why a run failed."""


class Runner:
    """Carries out the runs that are not finished.

    A run is carried out by one process at a time: its lock is held by the study and by the command that it runs, so
    that a study whose predecessor was killed waits for what that one has left running, and several studies may share a
    folder. What was interrupted goes on from its checkpoint.

    Args:
        runs: in their order, pre-trainings before the fine-tunings that need them.
        fingerprints: of the runs, by name.
        jobs: runs at a time. With GPUs each has one of them, without they share the cores.
    """

    def __init__(self, runs: Sequence[Run], fingerprints: Mapping[str, Mapping[str, Any]], jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}.")
        self.runs = list(runs)
        self.fingerprints = fingerprints
        self.jobs = jobs
        self.failures: dict[str, str] = {}
        self._gpus = _gpus()
        self._threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, usable_cores() // jobs))
        self._waiting = [run for run in self.runs if not run.is_finished]
        self._running: dict[int, Iterator[bool]] = {}  # by slot
        self._processes: list[subprocess.Popen] = []
        self._told: set[str] = set()

    def run(self) -> dict[str, str]:
        """Carry out all runs; a failed one does not stop the others.

        Returns:
            Why runs failed, by name. Where this process is stopped, so are the commands, after saving a checkpoint.
        """
        try:
            while self._waiting or self._running:
                for run in list(self._waiting):
                    self._start_if_ready(run)
                time.sleep(_PAUSE)
                for slot, progress in list(self._running.items()):
                    if not next(progress, False):
                        del self._running[slot]
        finally:
            self._stop()
        return self.failures

    def _start_if_ready(self, run: Run) -> None:
        free = set(range(self.jobs)) - self._running.keys()
        if run.pretraining is not None and run.pretraining.name in self.failures:
            self._waiting.remove(run)
            self._fail(run, "its pre-training failed")
        elif free and (run.pretraining is None or run.pretraining.is_finished):
            lock = run.lock()
            if lock is not None:
                self._waiting.remove(run)
                self._running[min(free)] = self._progress(run, min(free), lock)
            elif run.name not in self._told:
                self._told.add(run.name)
                self._say(f"waiting for {run}: a process that another study started is at it")

    def _progress(self, run: Run, slot: int, lock: int) -> Iterator[bool]:
        """Carry out a run, giving True each time that it is still running."""
        try:
            yield from self._commands(run, slot, lock)
            self._report(run)
        except RunError as error:
            self._fail(run, str(error))
        finally:
            os.close(lock)

    def _commands(self, run: Run, slot: int, lock: int) -> Iterator[bool]:
        if run.is_finished:  # by another study, while this one waited for it
            return
        self._say(f"{run}: log in {run.log}")
        self._check_version(run)
        # What the run has for itself, and what an hour of it is called.
        share = min(1.0, len(self._gpus) / self.jobs)
        cores, unit = (share, "GPU-hours") if self._gpus else (self._threads, "CPU-core-hours")
        run.start(self.fingerprints[run.name], cores)
        for command in run.commands:
            if not run.has_done(command):
                yield from self._command(run, command, slot, lock)
                # The next command, hours later, reads code and settings anew.
                self._check_version(run)
        try:
            run.finish(unit)
        except (OSError, LookupError, ValueError) as error:
            raise RunError(f"it did not leave what it should: {error}") from error

    def _check_version(self, run: Run) -> None:
        expected = self.fingerprints[run.name]
        for other in (fingerprint(run), run.fingerprint() or expected):
            changes = differences(expected, other)
            if changes:
                raise RunError(f"while the study was running, there was a change: {changes}")

    def _command(self, run: Run, command: Command, slot: int, lock: int) -> Iterator[bool]:
        line = bundle_command(run, command)
        # The bundles share memory and data-loading processes among the trainings of a machine.
        environment = {**os.environ, "LOCAL_WORLD_SIZE": str(self.jobs), "OMP_NUM_THREADS": str(self._threads)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        with open(run.log, "ab") as log:
            log.write(f"\n$ {shlex.join(line)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
                # Ctrl-C is for the study alone, which then stops its commands with a signal that saves a checkpoint.
                start_new_session=True,
            )
        self._processes.append(process)
        while process.poll() is None:
            yield True
        if process.returncode:
            raise RunError(f"{command.section} ended with status {process.returncode}: {last_error(run.log)}")

    def _report(self, run: Run) -> None:
        result = run.result()
        score = f"mean Dice {result['mean_dice']:.4f}, " if result.get("mean_dice") is not None else ""
        left = time_left(self.runs, self.jobs)
        ending = f"; about {left} left" if left and len(self._running) + len(self._waiting) > 1 else ""
        self._say(f"{run}: {score}{tqdm.format_interval(result['seconds'])}{ending}")

    def _fail(self, run: Run, reason: str) -> None:
        self.failures[run.name] = f"{reason} (log: {run.log})"
        self._say(f"{run} FAILED: {reason}")

    def _say(self, text: str) -> None:
        print(f"[{sum(run.is_finished for run in self.runs)}/{len(self.runs)}] {text}", flush=True)

    def _stop(self) -> None:
        running = [process for process in self._processes if process.poll() is None]
        if running:
            self._say("stopping, after a checkpoint of what is running")
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names[:count] or [str(number) for number in range(count)]


def last_error(log: Path) -> str:
    """The message that the last command in a log ended with."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_END))
        text = file.read().decode(errors="replace").rpartition("\n$ ")[2]
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]
