"""Running the bundles as a user does: real processes, from another working directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from warm_processes import WarmProcess

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "bundles" / "pgl_pretrain" / "configs"
SEGMENTATION_CONFIGS = ROOT / "bundles" / "pgl_segmentation" / "configs"
# Public data sets and MONAI's metadata schema, where there are any.
TEST_DATA = Path(os.environ.get("PGL_TEST_DATA", ROOT.parent / "shared"))
SCHEMA = TEST_DATA / "schemas" / "meta_schema_20240725.json"

# Seconds after which a program hangs, on however busy a machine.
TOO_LONG = 1800

# A network and a schedule that take seconds; everything else is as in small.yaml.
TINY = {
    "view_size": [32, 32, 16],
    "encoder#widen_factor": 0.125,
    "hidden_channels": 32,
    "out_channels": 16,
    "patches_per_volume": 4,
    "batch_size": 4,
    "max_epochs": 3,
    "log_interval": 1,
    "picture_interval": 1000,
}
# The same of the segmentation bundle, for phantoms of 64 x 64 x 32 voxels.
TINY_SEGMENTATION = {
    "patch_size": [32, 32, 16],
    "encoder#widen_factor": 0.125,
    "network_def#aspp_channels": 16,
    "network_def#decoder_channels": [16, 8, 8],
    "patches_per_case": 4,
    "batch_size": 4,
    "max_epochs": 3,
    "log_interval": 1,
    "picture_interval": 1000,
}


def environment() -> dict[str, str]:
    """One thread per process: bit-identical sums, and no two processes waiting for each other's cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def training_arguments(*overlays: str, **overrides: object) -> list[str]:
    """Arguments after ``python`` or ``torchrun`` that pre-train the tiny network."""
    return _arguments("training", CONFIGS, ("train.json", "small.yaml", *overlays), {**TINY, **overrides})


def fine_tuning_arguments(*overlays: str, **overrides: object) -> list[str]:
    """Arguments after ``python`` or ``torchrun`` that fine-tune the tiny segmentation network on phantoms."""
    files = ("train.json", "tasks/phantom.yaml", "small.yaml", *overlays)
    return _arguments("training", SEGMENTATION_CONFIGS, files, {**TINY_SEGMENTATION, **overrides})


def probing_arguments(**overrides: object) -> list[str]:
    """Arguments after ``python`` that probe the tiny encoder on phantoms."""
    files = ("train.json", "tasks/phantom.yaml", "small.yaml", "probe.yaml")
    return _arguments("probing", SEGMENTATION_CONFIGS, files, {**TINY_SEGMENTATION, **overrides})


def _arguments(section: str, folder: Path, files: Sequence[str], settings: Mapping[str, object]) -> list[str]:
    paths = [str(folder / name) for name in files]
    arguments = ["-m", "monai.bundle", "run", section, "--config_file", str(paths)]
    for name, value in settings.items():
        arguments += [f"--{name.replace('#', '::')}", str(value)]
    return arguments


def write_start_method(folder: Path, method: str) -> str:
    """An overlay for both bundles that has loading processes started by ``fork``, ``spawn`` or ``forkserver``."""
    path = folder / f"{method}.json"
    path.write_text(json.dumps({"+initialize": [f"$torch.multiprocessing.set_start_method('{method}', force=True)"]}))
    return str(path)


def start(arguments: list[str], cwd: Path, log: Path) -> subprocess.Popen | WarmProcess:
    """Start ``python ARGUMENTS``, its output to ``log``."""
    if WarmProcess.can_run(arguments):
        return WarmProcess(arguments, cwd, environment(), log)
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, env=environment(), stdout=file, stderr=subprocess.STDOUT
        )


def run(arguments: list[str], cwd: Path, timeout: float = TOO_LONG) -> subprocess.CompletedProcess:
    """Run ``python ARGUMENTS`` and return its status and output."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = start(arguments, cwd, log)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        # UTF-8 whatever locale a library has set in this process.
        return subprocess.CompletedProcess(arguments, status, log.read_text(encoding="utf-8"))


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(encoding="utf-8")[-3000:]


def wait_for(condition, process: subprocess.Popen | WarmProcess, log: Path, seconds: float = TOO_LONG) -> None:
    """Wait until ``condition()`` holds while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}:\n{log.read_text(encoding='utf-8')[-3000:]}"
        assert time.monotonic() < deadline, (
            f"nothing happened for {seconds} s:\n{log.read_text(encoding='utf-8')[-3000:]}"
        )
        time.sleep(0.02)


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("checkpoint_*.pt"))


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = (torch.load(path, weights_only=True) for path in (first, second))
    assert a["step"] == b["step"]
    for key, value in a["network"].items():
        assert torch.equal(value, b["network"][key]), key
