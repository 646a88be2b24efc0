"""Jobs of submitit's local executor."""

import sys

import pytest

from pgl_ext.tools.cluster import Cluster, run_jobs


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def test_jobs_are_waited_for(tmp_path):
    commands = [python(f"open({str(tmp_path / str(number))!r}, 'w').close()") for number in range(3)]
    run_jobs(Cluster(tmp_path / "jobs", "local"), commands, "test")
    assert all((tmp_path / str(number)).is_file() for number in range(3))


def test_jobs_that_fail_or_are_lost_are_named_and_the_others_end(tmp_path):
    lost = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    fails = "import sys; sys.exit('error: the scan is bad')"
    commands = [python(fails), python(lost), python(f"open({str(tmp_path / 'done')!r}, 'w').close()")]
    with pytest.raises(ChildProcessError) as caught:
        run_jobs(Cluster(tmp_path / "jobs", "local"), commands, "test")
    first, second, third = str(caught.value).splitlines()
    assert first == "2 of 3 jobs failed or were lost:"
    assert "error: the scan is bad" in second
    assert "stopped by its scheduler, or killed (log: " in third
    assert (tmp_path / "done").is_file()


@pytest.mark.parametrize(("name", "resources"), [("local", {"hours": 3}), ("moon", {})])
def test_what_the_cluster_does_not_know_is_refused(tmp_path, name, resources):
    with pytest.raises(ValueError, match=f"the cluster '{name}' or its resources"):
        Cluster(tmp_path, name, resources)
