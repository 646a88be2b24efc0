"""A study whose runs are jobs, of submitit's local executor."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from made_studies import make_fast, scores, write_study

from pgl_ext.tools.cluster import Cluster
from pgl_ext.tools.study.run import run_one, run_study

pytestmark = pytest.mark.slow


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    make_fast(monkeypatch)
    job = str(Path(__file__).with_name("job_stand_in.py"))
    monkeypatch.setattr(
        "pgl_ext.tools.study.run._job", lambda run, file, out, _: [sys.executable, job, str(file), str(out), run.name]
    )
    return write_study(tmp_path, labelled_cases=[3], seeds=[0])


def test_a_study_of_jobs_one_of_which_is_killed_has_the_same_scores(path, tmp_path, monkeypatch, capsys):
    run_study(path, tmp_path / "straight")
    monkeypatch.setenv("STAND_IN_PAUSE", "0.3")
    out = tmp_path / "out"
    started = out / "pretraining" / "PGL" / "seed_0" / "started.json"

    def kill_job() -> None:
        """The job of the pre-training and all that it runs, as a node that is lost."""
        while not list(started.parent.glob("checkpoints/*")):
            time.sleep(0.01)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                line = (process / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(out) in " ".join(line) and ("PGL" in " ".join(line) or "submitit" in " ".join(line)):
                os.kill(int(process.name), signal.SIGKILL)

    killer = threading.Thread(target=kill_job)
    killer.start()
    cluster = Cluster(tmp_path / "jobs", "local", {"timeout_min": 5})
    run_study(path, out, cluster=cluster)
    killer.join()
    assert scores(out) == scores(tmp_path / "straight")
    assert len(json.loads(started.read_text())["attempts"]) == 2
    assert capsys.readouterr().out.count("PGL, pre-training, seed 0: job") == 2


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import sys; sys.exit('error: no such module')", "error: no such module"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "its jobs were stopped 3 times"),
    ],
)
def test_why_a_job_failed_is_said(path, tmp_path, monkeypatch, code, why):
    monkeypatch.setattr("pgl_ext.tools.study.run._job", lambda *_: [sys.executable, "-I", "-S", "-c", code])
    with pytest.raises(ChildProcessError, match=f"(?s)3 of 3 runs failed.*{why}.*its pre-training failed"):
        run_study(path, tmp_path / "out", cluster=Cluster(tmp_path / "jobs", "local"))


def test_a_run_that_the_study_does_not_have(path, tmp_path):
    with pytest.raises(ValueError, match=r"no run 'seed_7': its runs are .*fine_tuning/random/3_cases/seed_0"):
        run_one(path, tmp_path / "out", "seed_7")
