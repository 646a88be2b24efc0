from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pgl_ext.data.memory import available_memory, total_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    free = psutil.virtual_memory()._replace(available=100 * GIB, total=120 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)


def write_group(folder: Path, limit: object, usage: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("memory.max", limit), ("memory.current", usage)):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_the_machine_alone(tmp_path):
    assert available_memory(tmp_path / "none") == 100 * GIB
    write_group(tmp_path, "max", 3 * GIB)
    assert available_memory(tmp_path) == 100 * GIB


def test_a_container_has_less(tmp_path):
    # Files in memory count as taken, and make room where it is needed.
    write_group(tmp_path, 32 * GIB, 20 * GIB, inactive=8 * GIB)
    assert available_memory(tmp_path) == 20 * GIB
    write_group(tmp_path, 8 * GIB, 2 * GIB)
    assert available_memory(tmp_path) == 6 * GIB
    write_group(tmp_path, 32 * GIB, 33 * GIB)
    assert available_memory(tmp_path) == 0


def test_a_group_with_more_than_the_machine(tmp_path):
    write_group(tmp_path, 500 * GIB, 2 * GIB)
    assert available_memory(tmp_path) == 100 * GIB


@pytest.mark.parametrize(("limit", "total"), [("max", 120), (32 * GIB, 32), (500 * GIB, 120)])
def test_in_all(tmp_path, limit, total):
    assert total_memory(tmp_path / "none") == 120 * GIB
    write_group(tmp_path, limit, 2 * GIB)
    assert total_memory(tmp_path) == total * GIB


def test_this_machine():
    assert 0 < available_memory() <= 100 * GIB
