import ast
import re
import subprocess
import sys

import pytest
import torch
import typer
from programs import ROOT

from pgl_ext import __version__
from pgl_ext.tools import phantom
from pgl_ext.tools.bundles import config_names
from pgl_ext.tools.cli import app, main
from pgl_ext.weights import EncoderRecord, load_encoder

DESCRIPTION = {
    "architecture": {
        "family": "resnet",
        "arguments": {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 0.125},
    },
    "input": {"hu_window": [-1024, 325]},
    "method": "PGL",
    "steps": 3,
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``python -m pgl_ext`` with arguments and returns what it prints."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["pgl", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise
        return capsys.readouterr().out

    return call


@pytest.fixture
def checkpoint(tmp_path, make_pgl):
    path = tmp_path / "checkpoint_00000003.pt"
    torch.save({"network": make_pgl().state_dict(), "description": DESCRIPTION}, path)
    return path


def test_export_encoder(run, checkpoint, tmp_path, make_encoder):
    out = tmp_path / "models" / "encoder.pt"
    assert run("export", checkpoint, out).strip() == str(out)
    encoder = make_encoder(seed=1)
    load_encoder(encoder, out)
    assert torch.equal(encoder.conv1.weight, make_encoder(seed=0).conv1.weight)
    assert EncoderRecord.load(out).steps == 3


def test_export_encoder_with_monai_keys(run, checkpoint, tmp_path, make_encoder):
    run("export", checkpoint, tmp_path / "resnet.pt", "--to=monai")
    assert list(torch.load(tmp_path / "resnet.pt", weights_only=True)) == list(make_encoder().state_dict())


def test_export_decoder(run, tmp_path):
    network = {"decoder.head.bias": torch.ones(2), "aspp.pooled.0.weight": torch.ones(2)}
    torch.save({"network": network, "description": DESCRIPTION}, tmp_path / "c.pt")
    assert run("export", tmp_path / "c.pt", tmp_path / "d.pt", "--part", "decoder").strip() == str(tmp_path / "d.pt")
    assert torch.load(tmp_path / "d.pt", weights_only=True).keys() == {"aspp.pooled.0.weight"}


@pytest.mark.parametrize(
    ("checkpoint_name", "to", "message"),
    [("checkpoint_00000003.pt", "onnx", "to must be one of pgl, monai, nnunet"), ("none.pt", "pgl", "no such file")],
)
def test_errors_are_one_line(run, checkpoint, checkpoint_name, to, message):
    with pytest.raises(SystemExit) as stop:
        run("export", checkpoint.with_name(checkpoint_name), checkpoint.with_name("out.pt"), "--to", to)
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code
    assert "\n" not in stop.value.code


def test_phantom_passes_its_arguments_on(run, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(phantom, "write_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or "list.json")
    assert run("phantom", tmp_path, "--cases=3", "--seed=5", "--test_cases=2").strip() == "list.json"
    assert calls == [((tmp_path, 3), {"seed": 5, "test_cases": 2})]


def test_config_prints_what_config_file_takes(run):
    folder = ROOT / "bundles" / "pgl_pretrain" / "configs"
    assert run("config", "pgl_pretrain", "train.json") == f"{folder / 'train.json'}\n"
    several = run("config", "pgl_pretrain", "train.json", "small.yaml")
    assert ast.literal_eval(several) == [str(folder / "train.json"), str(folder / "small.yaml")]
    assert run("config", "pgl_pretrain").splitlines() == config_names("pgl_pretrain")


@pytest.mark.parametrize("command", typer.main.get_command(app).commands)
def test_every_command_has_a_help_page(run, command):
    """In groups, and of those that have settings of a bundle with a word on them."""
    assert f"pgl {command}" in run(command, "--help")


def test_help_loads_neither_torch_nor_monai():
    code = "import sys; from pgl_ext.tools.cli import main; print({'torch', 'monai'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_version(run):
    assert run("--version") == f"pgl {__version__}\n"


@pytest.mark.parametrize(("old", "new"), [("export_encoder", "pgl export"), ("export_decoder", "--part decoder")])
def test_old_names_say_what_replaces_them(run, old, new):
    with pytest.raises(SystemExit, match=new):
        run(old, "checkpoint.pt", "out.pt")


@pytest.mark.parametrize("arguments", [["fantom"], [], ["pretrain"], ["plan", "nowhere"], ["pretrain", ".", "o", "x"]])
def test_what_is_no_command_fails(run, arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code not in (0, None)


def test_options_are_spelt_as_settings_are():
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            assert not any("-" in option.lstrip("-") for option in parameter.opts), (name, parameter.opts)


def test_commands_in_the_documents_have_the_options_that_they_are_given():
    """But for commands that take any setting of a bundle, which the bundles check."""
    commands = typer.main.get_command(app).commands
    texts = [path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/*.md"))]
    texts += [path.read_text() for path in ROOT.glob("bundles/*/docs/*.md")]
    found = 0
    for line in re.findall(r"\bpgl ((?:[a-z]+) [^`\n|#]*)", "\n".join(texts).replace("\\\n", " ")):
        name, *words = line.split()
        if name not in commands or commands[name].context_settings.get("ignore_unknown_options"):
            continue
        known = {option for parameter in commands[name].params for option in parameter.opts}
        for word in words:
            if word.startswith("--") and word != "--":
                assert word.partition("=")[0].rstrip(".,;:)'\"") in known, line
                found += 1
    assert found > 10


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("finetune CASES OUT --fold 5", "--folds"),
        ("gain CASES OUT --pretrained P --seed 3", "--seeds"),
        ("pretrain S O --gpu 2", "--gpus"),
    ],
)
def test_misspelt_options_of_a_command(line, option, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pgl", *line.split()])
    with pytest.raises(SystemExit, match=f"did you mean {option}"):
        main()
