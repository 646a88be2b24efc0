"""The command lines of bundles, and what of a line is a setting."""

import shlex

import pytest

from pgl_ext.tools.launch import BundleRun, option_settings


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--max_epochs", "3"], {"max_epochs": "3"}),
        (["--max_epochs=3", "--lr", "1e-3"], {"max_epochs": "3", "lr": "1e-3"}),
        (["--spacing", "[4, 4, 3]"], {"spacing": "[4, 4, 3]"}),
        (["--network_def#filters", "[8, 16]"], {"network_def#filters": "[8, 16]"}),
        (["--output_dir", "run#2"], {"output_dir": "run#2"}),
        (["--hu_window", "-1024"], {"hu_window": "-1024"}),
        (["--note=a=b"], {"note": "a=b"}),
        ([], {}),
    ],
)
def test_settings_are_taken_verbatim(arguments, settings):
    assert option_settings(arguments) == settings


@pytest.mark.parametrize("arguments", [["max_epochs", "3"], ["--max_epochs"], ["--"], ["-x", "1"], ["--a", "1", "2"]])
def test_what_is_no_setting(arguments):
    with pytest.raises(ValueError, match="--name value"):
        option_settings(arguments)


def test_the_line_that_is_printed_is_what_a_shell_would_run(capfd, monkeypatch):
    run = BundleRun("training", ["a b.json", "c.yaml"], {"seed": 3, "lr": None, "amp": True, "organs": {"liver": 1}})
    monkeypatch.setattr("pgl_ext.tools.launch.subprocess.Popen", lambda line: Process(0))
    run.run()
    printed = capfd.readouterr().out.removeprefix("$ ").strip()
    assert shlex.split(printed) == run.line
    assert run.line[:6] == ["python", "-m", "monai.bundle", "run", "training", "--config_file"]
    assert run.line[6:] == [
        "['a b.json','c.yaml']", "--seed", "3", "--lr", "$None", "--amp", "true", "--organs", "{'liver': 1}"
    ]  # fmt: skip


def test_several_processes_go_through_torchrun():
    line = BundleRun("training", ["a.json"], processes=4).line
    assert line[:5] == ["torchrun", "--standalone", "--nproc_per_node=4", "-m", "monai.bundle"]
    assert line[5:] == ["run", "training", "--config_file", "a.json"]


@pytest.mark.parametrize(("status", "code"), [(3, 3), (-15, 143)])
def test_a_run_that_fails_ends_the_command(monkeypatch, status, code):
    monkeypatch.setattr("pgl_ext.tools.launch.subprocess.Popen", lambda line: Process(status))
    with pytest.raises(SystemExit) as stop:
        BundleRun("training", ["a.json"]).run()
    assert stop.value.code == code


class Process:
    """What a process that has ended is to its parent."""

    def __init__(self, status: int) -> None:
        self.status = status

    def wait(self) -> int:
        return self.status
