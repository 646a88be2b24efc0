import ast
import sys

import pytest
import torch
from programs import ROOT

from pgl_ext.tools import phantom
from pgl_ext.tools.bundles import config_names
from pgl_ext.tools.cli import main
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
        monkeypatch.setattr(sys, "argv", ["pgl_ext", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def checkpoint(tmp_path, make_pgl):
    path = tmp_path / "checkpoint_00000003.pt"
    torch.save({"network": make_pgl().state_dict(), "description": DESCRIPTION}, path)
    return path


def test_export_encoder(run, checkpoint, tmp_path, make_encoder):
    out = tmp_path / "models" / "encoder.pt"
    assert run("export_encoder", checkpoint, out).strip() == str(out)
    encoder = make_encoder(seed=1)
    load_encoder(encoder, out)
    assert torch.equal(encoder.conv1.weight, make_encoder(seed=0).conv1.weight)
    assert EncoderRecord.load(out).steps == 3


def test_export_encoder_with_monai_keys(run, checkpoint, tmp_path, make_encoder):
    run("export_encoder", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'resnet.pt'}", "--layout=monai_resnet")
    assert list(torch.load(tmp_path / "resnet.pt", weights_only=True)) == list(make_encoder().state_dict())


def test_export_decoder(run, tmp_path):
    network = {"decoder.head.bias": torch.ones(2), "aspp.pooled.0.weight": torch.ones(2)}
    torch.save({"network": network, "description": DESCRIPTION}, tmp_path / "c.pt")
    assert run("export_decoder", tmp_path / "c.pt", tmp_path / "d.pt").strip() == str(tmp_path / "d.pt")
    assert torch.load(tmp_path / "d.pt", weights_only=True).keys() == {"aspp.pooled.0.weight"}


@pytest.mark.parametrize(
    ("checkpoint_name", "layout", "message"),
    [("checkpoint_00000003.pt", "onnx", "layout must be one of"), ("none.pt", "pgl", "no such file")],
)
def test_errors_are_one_line(run, checkpoint, checkpoint_name, layout, message):
    with pytest.raises(SystemExit) as stop:
        run("export_encoder", checkpoint.with_name(checkpoint_name), checkpoint.with_name("out.pt"), layout)
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code
    assert "\n" not in stop.value.code


def test_phantom_passes_its_arguments_on(run, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(phantom, "write_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or "list.json")
    assert run("phantom", tmp_path, "--cases=3", "--seed=5", "--test_cases=2").strip() == "list.json"
    assert calls == [((str(tmp_path), 3), {"seed": 5, "test_cases": 2})]


def test_config_prints_what_config_file_takes(run):
    folder = ROOT / "bundles" / "pgl_pretrain" / "configs"
    assert run("config", "pgl_pretrain", "train.json") == f"{folder / 'train.json'}\n"
    several = run("config", "pgl_pretrain", "train.json", "small.yaml")
    assert ast.literal_eval(several) == [str(folder / "train.json"), str(folder / "small.yaml")]
    assert run("config", "pgl_pretrain").splitlines() == config_names("pgl_pretrain")


def test_unknown_commands_fail(run):
    with pytest.raises(SystemExit) as stop:
        run("fantom")
    assert stop.value.code not in (0, None)
