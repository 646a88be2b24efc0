"""Processes with time limits and a log each; a summary and an archive of results that grow as results come."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from settings import LOGS, OUT, PY, T0, WORK

_KEPT = (".csv", ".json", ".log", ".png", ".txt", ".md", ".yaml")
_LEFT_OUT = ("data", "site", "checkpoints", "predictions", "tensorboard", "benchmark_data")
_lock = threading.Lock()


def elapsed() -> float:
    """Seconds since the script began."""
    return time.time() - T0


def say(text: str) -> None:
    """Print a line with the time, into the summary too."""
    _write(f"[{elapsed():5.0f} s] {text}\n")


def table(text: str) -> None:
    """Print a table, into the summary too."""
    _write(f"\n{text}\n\n")


def _write(text: str) -> None:
    with _lock:
        print(text, end="", flush=True)
        with open(OUT / "summary.md", "a") as file:
            file.write(text)


def last_line(path: Path, words: Iterable[str] = ("Error", "error:", "FAILED")) -> str:
    """The last line of a log that tells of an error, or its last one."""
    lines = path.read_text(errors="replace").replace("\r", "\n").splitlines()
    telling = [line for line in lines if any(word in line for word in words)]
    return (telling or lines or [""])[-1][:300]


class Job:
    """A process in a session of its own, so that its loaders end with it.

    Args:
        name: of its log.
        arguments: after ``python``.
        limit: seconds; then it is asked to stop, and killed 10 s later.
    """

    def __init__(self, name: str, arguments: Iterable[object], limit: float) -> None:
        self.name, self.limit, self.start = name, limit, time.time()
        self.log = LOGS / f"{name}.log"
        self._file = open(self.log, "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [PY, *map(str, arguments)], stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._asked = False

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        code = self.process.poll()
        over = time.time() - self.start - self.limit
        if code is None and over > 0 and (over > 10 or not self._asked):
            # Training saves and ends within 10 s; what does not is killed.
            self._asked = True
            with contextlib.suppress(ProcessLookupError):
                if over > 10:
                    os.killpg(self.process.pid, signal.SIGKILL)
                else:
                    os.kill(self.process.pid, signal.SIGTERM)
        return code

    def wait(self) -> int:
        """Wait for the end, and say how it was."""
        while self.poll() is None:
            time.sleep(0.2)
        self._file.close()
        code = self.process.returncode
        ending = "done" if code == 0 else f"ENDED WITH {code}"
        reason = "" if code == 0 else f" -- {last_line(self.log)}"
        say(f"{self.name}: {ending} in {time.time() - self.start:.0f} s{reason}")
        return code


def run(name: str, arguments: Iterable[object], limit: float) -> int:
    """Run a process to its end."""
    return Job(name, arguments, limit).wait()


def run_all(jobs: Iterable[Job]) -> list[int]:
    """Wait for several."""
    return [job.wait() for job in list(jobs)]


def save() -> None:
    """Write results.tar.gz: logs, CSV, JSON and pictures, without weights and caches."""
    with _lock:
        with tarfile.open(OUT / ".part", "w:gz") as tar:
            for folder, names, files in os.walk(WORK):
                names[:] = [name for name in names if name not in _LEFT_OUT and not name.startswith("cache")]
                for path in (Path(folder) / name for name in files if name.endswith(_KEPT)):
                    if path.stat().st_size < 2e6:
                        tar.add(path, path.relative_to(WORK))
        os.replace(OUT / ".part", OUT / "results.tar.gz")
