from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pgl_ext.data.memory import available_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    free = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)


def write_group(folder: Path, version: int, limit: object, usage: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    field = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{field} {inactive}\n")


def available(tmp_path: Path, own: str) -> float:
    (tmp_path / "own").write_text(own)
    return available_memory(tmp_path / "groups", tmp_path / "own") / GIB


def test_the_machine_alone(tmp_path):
    assert available(tmp_path, "0::/\n") == 100
    assert available_memory(tmp_path / "groups", tmp_path / "none") == 100 * GIB


@pytest.mark.parametrize(
    ("version", "own"), [(2, "0::/job/step\n"), (1, "5:cpu,cpuacct:/x\n4:memory:/job/step\n0::/\n")]
)
def test_a_job_has_less(tmp_path, version, own):
    root = tmp_path / "groups" / ("." if version == 2 else "memory")
    write_group(root / "job" / "step", version, 9223372036854771712 if version == 1 else "max", 3 * GIB)
    # Files in memory count as taken, and make room where it is needed.
    write_group(root / "job", version, 32 * GIB, 20 * GIB, inactive=8 * GIB)
    assert available(tmp_path, own) == 20
    write_group(root / "job", version, 32 * GIB, 33 * GIB)
    assert available(tmp_path, own) == 0


def test_a_container_whose_path_is_the_host_s(tmp_path):
    write_group(tmp_path / "groups", 2, 8 * GIB, 2 * GIB)
    assert available(tmp_path, "0::/docker/0123abcd\n") == 6


def test_a_group_with_more_than_the_machine(tmp_path):
    write_group(tmp_path / "groups", 2, 500 * GIB, 2 * GIB)
    assert available(tmp_path, "0::/\n") == 100


def test_this_machine():
    assert 0 < available_memory() <= 100 * GIB
