"""The command lines of bundles, and what of a line is a setting."""

import json
import shlex

import pytest
from programs import run

from pgl_ext.tools.launch import BundleRun, option_settings, option_value


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


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-3", 0.001),
        ("lr", "0.1", 0.1),
        ("amp", "false", False),
        ("spacing", "null", None),
        ("spacing", "$None", None),
        ("spacing", "[4, 4, 3]", [4, 4, 3]),
        ("organs", "{'liver': 1}", {"liver": 1}),
        ("note", "a b", "a b"),
        *((name, text, text) for name in ("output_dir", "cache_dir") for text in ("2024", "run#2", "a,b", "$x", "[")),
        ("pretrained_encoder", "2024", "2024"),
        ("data_list_file_path", "['a.json', 'b.json']", ["a.json", "b.json"]),
        ("dataset_dir", "$None", None),
    ],
)
def test_values_are_read_as_yaml_but_names_verbatim(name, text, value):
    assert option_value(name, text) == value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2024", "a,b", "[x"])
def test_folders_have_the_name_that_was_typed(tmp_path, name):
    (tmp_path / "c.json").write_text(json.dumps({"output_dir": "", "run": ["$print(repr(@output_dir))"]}))
    done = run([*BundleRun("", [str(tmp_path / "c.json")], {"output_dir": name})._strict[1:]], tmp_path)
    assert repr(name) in done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run#2", "a::b"])
def test_names_that_monai_cannot_take_are_refused(tmp_path, name):
    (tmp_path / "c.json").write_text(json.dumps({"output_dir": "", "run": ["$print(repr(@output_dir))"]}))
    done = run([*BundleRun("", [str(tmp_path / "c.json")], {"output_dir": name})._strict[1:]], tmp_path)
    assert done.returncode == 1
    assert f"error: --output_dir is {name!r}: # and :: have a meaning" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run#2", "2024", "a,b"])
def test_plain_monai_refuses_what_it_reads_otherwise(tmp_path, name):
    steps = [{"_target_": "pgl_ext.config_check.check_config", "base": "c.json"}, "$print(repr(@output_dir))"]
    (tmp_path / "c.json").write_text(json.dumps({"output_dir": "", "run": steps}))
    line = ["-m", "monai.bundle", "run", "--config_file", str(tmp_path / "c.json"), "--output_dir"]
    done = run([*line, name], tmp_path)
    assert repr(name) in done.stdout.splitlines() if done.returncode == 0 else "error: --output_dir" in done.stdout
    assert run([*line, f"./{name}"], tmp_path).returncode == (1 if name in ("run#2", "a::b") else 0)
