import os

import pytest

from pgl_ext.distributed import usable_cores


@pytest.mark.parametrize(
    ("known", "cores"),
    [
        ({"process_cpu_count": lambda: 3}, 3),
        ({"sched_getaffinity": lambda process: {4, 6}}, 2),
        ({"cpu_count": lambda: 5}, 5),
        ({"cpu_count": lambda: None}, 1),
    ],
    ids=["Python 3.13", "Linux", "elsewhere", "not known"],
)
def test_usable_cores(monkeypatch, known, cores):
    for name in ("process_cpu_count", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    for name, function in known.items():
        monkeypatch.setattr(os, name, function, raising=False)
    assert usable_cores() == cores
