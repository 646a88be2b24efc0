"""Processes that start with MONAI imported: forked from a server that has imported it once.

Importing MONAI takes a process seconds, what most tests want of it less. Beyond that they are as those that a user
starts: each has its own memory, arguments, working directory, output, signals and status.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["monai.bundle", "monai.engines", "pgl_ext.engines", "pgl_ext.methods"])
# Modules that are imported once can't be those of another path.
_PATH = os.environ.get("PYTHONPATH")


class WarmProcess:
    """``python -m MODULE ARGUMENTS``, with what the tests use of ``subprocess.Popen``."""

    def __init__(self, arguments: list[str], cwd: Path, env: Mapping[str, str], log: Path) -> None:
        self._process = _CONTEXT.Process(target=_run, args=(arguments, str(cwd), dict(env), str(log)))
        self._process.start()
        self.args = arguments
        self.pid = self._process.pid

    @staticmethod
    def can_run(arguments: list[str]) -> bool:
        """Whether these arguments of ``python`` name what the server has imported, from where it has."""
        return arguments[:2] in (["-m", "monai.bundle"], ["-m", "pgl_ext"]) and os.environ.get("PYTHONPATH") == _PATH

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _run(arguments: list[str], cwd: str, env: dict[str, str], log: str) -> None:
    # As from a terminal, also where the tests run in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:  # which is read when PyTorch is imported
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    os.chdir(cwd)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    module, sys.argv[1:] = arguments[1], arguments[2:]
    sys.path.insert(0, cwd)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())  # which the package sets; multiprocessing would print a traceback
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()
