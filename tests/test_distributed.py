import os

import pytest
from programs import run

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


WORKER = """
import datetime, time
import torch.distributed as dist
from pgl_ext.distributed import gather
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
time.sleep(5 * dist.get_rank())
print("gathered", gather(dist.get_rank(), wait=datetime.timedelta(minutes=5)))
"""


@pytest.mark.slow
def test_gather_waits_for_longer_than_the_group_does(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "worker.py"]
    result = run(arguments, cwd=tmp_path)
    assert result.stdout.count("gathered [0, 1]") == 2, result.stdout
