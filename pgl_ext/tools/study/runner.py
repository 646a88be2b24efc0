"""Runs the cells of a study, several at a time, each command in a process of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pgl_ext.tools.study.cells import Cell, Stage, bundle_command
from pgl_ext.tools.study.fingerprint import code_digests, differences, fingerprint

__all__ = ["Runner", "default_jobs", "time_left"]

_PAUSE = 0.1  # seconds between looks at the running processes
_LOG_END = 65536  # bytes of a log in which its last error is looked for


def default_jobs() -> int:
    """One cell at a time on each GPU, or one on the CPU."""
    return max(1, len(_gpus()))


def time_left(cells: Iterable[Cell], jobs: int) -> str:
    """How long the cells that are not finished will take, by those that are; empty where that is not known.

    A pre-training takes as long as others of its method, or else of any, a fine-tuning as long as others.
    """
    cells = list(cells)
    finished = [(cell, cell.result()["seconds"]) for cell in cells if cell.is_finished]
    left = []
    for cell in cells:
        if not cell.is_finished:
            alike = [(one, seconds) for one, seconds in finished if one.is_pretraining == cell.is_pretraining]
            same = [seconds for one, seconds in alike if one.method == cell.method and cell.is_pretraining]
            if not alike:
                return ""
            left.append(float(np.mean(same or [seconds for _, seconds in alike])))
    return tqdm.format_interval(max([sum(left) / jobs, *left]))


class _CellError(Exception):
    """Why a cell failed."""


@dataclass
class _Run:
    """A cell that is being run."""

    cell: Cell
    slot: int
    lock: int
    commands: Iterator[subprocess.Popen]
    process: subprocess.Popen | None = None


class Runner:
    """Runs the cells that are not finished.

    A cell is run by one process at a time: its lock is held by the study and by the command that it runs, so that a
    study whose predecessor was killed waits for what that one has left running, and several studies may share a folder.
    What was interrupted goes on from its checkpoint.

    Args:
        cells: in the order to run them, pre-trainings before the fine-tunings that need them.
        fingerprints: of the cells, by name.
        jobs: cells at a time. With GPUs each has one of them, without they share the cores.
    """

    def __init__(self, cells: Sequence[Cell], fingerprints: Mapping[str, Mapping[str, Any]], jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}.")
        self.cells = list(cells)
        self.fingerprints = fingerprints
        self.jobs = jobs
        self.failures: dict[str, str] = {}
        self._gpus = _gpus()
        # A share of the cores that this process may use, which on a cluster are not all.
        self._threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // jobs))
        self._waiting = [cell for cell in self.cells if not cell.is_finished]
        self._running: list[_Run] = []
        self._told: set[str] = set()

    def run(self) -> dict[str, str]:
        """Run all cells; a failed one does not stop the others.

        Returns:
            Why cells failed, by name. Where this process is stopped, so are the commands, after saving a checkpoint.
        """
        try:
            while self._waiting or self._running:
                self._start_ready()
                time.sleep(_PAUSE)
                self._advance()
        finally:
            self._stop()
        return self.failures

    def _start_ready(self) -> None:
        for cell in list(self._waiting):
            free = set(range(self.jobs)) - {run.slot for run in self._running}
            if cell.pretraining is not None and cell.pretraining.name in self.failures:
                self._waiting.remove(cell)
                self._fail(cell, "its pre-training failed")
            elif free and (cell.pretraining is None or cell.pretraining.is_finished):
                self._start(cell, min(free))

    def _start(self, cell: Cell, slot: int) -> None:
        lock = cell.lock()
        if lock is None:
            if cell.name not in self._told:
                self._say(f"waiting for {cell}: a process that another study started is at it")
                self._told.add(cell.name)
            return
        self._waiting.remove(cell)
        self._running.append(_Run(cell, slot, lock, self._commands(cell, slot, lock)))

    def _advance(self) -> None:
        for run in list(self._running):
            try:
                run.process = next(run.commands, None)
                if run.process is not None:
                    continue
                self._report(run.cell)
            except _CellError as error:
                self._fail(run.cell, str(error))
            self._running.remove(run)
            os.close(run.lock)

    def _commands(self, cell: Cell, slot: int, lock: int) -> Iterator[subprocess.Popen]:
        """Run one command after another, giving the process each time that it is still running."""
        if cell.is_finished:  # by another study, while this one waited for it
            return
        self._say(f"{cell}: log in {cell.log}")
        self._check_version(cell)
        cores, unit = self._cost()
        cell.start(self.fingerprints[cell.name], cores)
        for stage in cell.stages:
            if not cell.has_done(stage):
                yield from self._command(cell, stage, slot, lock)
                # The next command, hours later, reads code and settings anew.
                self._check_version(cell)
        try:
            cell.finish(unit)
        except (OSError, LookupError, ValueError) as error:
            raise _CellError(f"it did not leave what it should: {error}") from error

    def _cost(self) -> tuple[float, str]:
        """What a cell has for itself while it runs, and what an hour of it is called."""
        if self._gpus:
            return min(1.0, len(self._gpus) / self.jobs), "GPU-hours"
        return self._threads, "CPU-core-hours"

    def _check_version(self, cell: Cell) -> None:
        expected = self.fingerprints[cell.name]
        for other in (fingerprint(cell, code_digests()), cell.fingerprint() or expected):
            changed = differences(expected, other)
            if changed:
                raise _CellError(f"while the study was running, there was a change: {changed}")

    def _command(self, cell: Cell, stage: Stage, slot: int, lock: int) -> Iterator[subprocess.Popen]:
        command = bundle_command(cell, stage)
        with open(cell.log, "ab") as log:
            log.write(f"\n$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                pass_fds=[lock],
                # Ctrl-C is for the study alone, which then stops its commands with a signal that saves a checkpoint.
                start_new_session=True,
            )
        while process.poll() is None:
            yield process
        if process.returncode:
            raise _CellError(f"{stage.section} ended with status {process.returncode}: {_last_error(cell.log)}")

    def _environment(self, slot: int) -> dict[str, str]:
        # The bundles share memory and data-loading processes among the trainings of a machine.
        environment = {**os.environ, "LOCAL_WORLD_SIZE": str(self.jobs), "OMP_NUM_THREADS": str(self._threads)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        return environment

    def _report(self, cell: Cell) -> None:
        result = cell.result()
        dice = result.get("mean_dice")
        score = "" if dice is None else f"mean Dice {dice:.4f}, "
        left = time_left(self.cells, self.jobs)
        ending = f"; about {left} left" if left and len(self._running) + len(self._waiting) > 1 else ""
        self._say(f"{cell}: {score}{tqdm.format_interval(result['seconds'])}{ending}")

    def _fail(self, cell: Cell, reason: str) -> None:
        self.failures[cell.name] = f"{reason} (log: {cell.log})"
        self._say(f"{cell} FAILED: {reason}")

    def _say(self, text: str) -> None:
        finished = sum(cell.is_finished for cell in self.cells)
        print(f"[{finished}/{len(self.cells)}] {text}", flush=True)

    def _stop(self) -> None:
        processes = [run.process for run in self._running if run.process is not None and run.process.poll() is None]
        if processes:
            self._say("stopping, after a checkpoint of what is running")
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(number) for number in range(count)]


def _last_error(log: Path) -> str:
    """The message that the last command in a log ended with."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_END))
        text = file.read().decode(errors="replace").rpartition("\n$ ")[2]
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")[1:]]
    said = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line] or ["no output"]
    return said[-1]
