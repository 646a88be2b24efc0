"""Jobs of a real SLURM, which slurm.sh starts for this machine alone: `make test-slurm`."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pgl_ext.tools.cluster import Cluster, run_jobs

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        os.name == "nt" or not shutil.which("slurmctld") or os.geteuid() != 0, reason="needs slurmctld and root"
    ),
]

SCRIPT = Path(__file__).with_name("slurm.sh")


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", str(SCRIPT), "start", str(folder)], check=True, stdin=subprocess.DEVNULL, timeout=120)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield
    del os.environ["SLURM_CONF"]
    subprocess.run(["bash", str(SCRIPT), "stop", str(folder)], check=True, timeout=60)


def cancel_a_running_job() -> None:
    while not (
        running := subprocess.run(
            ["squeue", "-h", "-t", "R", "-o", "%i"], capture_output=True, text=True, check=True
        ).stdout
    ):
        time.sleep(0.2)
    subprocess.run(["scancel", running.split()[0]], check=True)


def test_a_job_that_is_cancelled_is_named_and_done_by_the_same_command_again(tmp_path):
    """As the shards of a cache: each leaves whole files, or none."""
    code = "import pathlib, sys, time; time.sleep(float(sys.argv[2])); pathlib.Path(sys.argv[1]).touch()"
    files = [tmp_path / str(number) for number in range(3)]

    def commands(seconds: float) -> list[list[str]]:
        return [
            [sys.executable, "-I", "-S", "-c", code, str(file), str(seconds)] for file in files if not file.exists()
        ]

    cluster = Cluster(tmp_path / "jobs", "slurm", {"timeout_min": 5, "mem_gb": 0.5})
    canceller = threading.Thread(target=cancel_a_running_job)
    canceller.start()
    with pytest.raises(ChildProcessError, match=r"1 of 3 jobs failed or were lost:\n.*stopped by its scheduler"):
        run_jobs(cluster, commands(8), "test")
    canceller.join()
    assert [file.exists() for file in files].count(True) == 2
    run_jobs(cluster, commands(0), "test")
    assert all(file.exists() for file in files)
