"""MONAI Label with the packaged bundle: what train.json does there, and a session with a server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser
from programs import ROOT, SEGMENTATION_CONFIGS, TINY_SEGMENTATION

from pgl_ext.tools.phantom import write_dataset
from pgl_ext.weights import EncoderRecord, InputRecord, save_encoder

sys.path.append(str(ROOT / "benchmarks"))
import monai_label


@pytest.fixture
def train_json(monkeypatch) -> ConfigParser:
    monkeypatch.delenv("MONAI_LABEL_APP_DIR", raising=False)
    parser = ConfigParser()
    parser.read_config(str(SEGMENTATION_CONFIGS / "train.json"))
    parser["bundle_root"] = "BUNDLE"
    parser.get_parsed_content("imports")
    return parser


class TestSettings:
    def test_elsewhere_a_run_is_its_own_and_never_overwritten(self, train_json):
        train_json["output_dir"] = "OUT"
        assert train_json.get_parsed_content("model_path") == "OUT/models/model.pt"
        assert train_json.get_parsed_content("overwrite") is False

    def test_there_the_bundles_model_is_replaced(self, train_json, monkeypatch):
        """By whoever presses the button: the next inference takes the model from there."""
        monkeypatch.setenv("MONAI_LABEL_APP_DIR", "APP")
        assert train_json.get_parsed_content("model_path") == "BUNDLE/models/model.pt"
        assert train_json.get_parsed_content("overwrite") is True

    def test_no_loader_of_ones_own(self, train_json):
        """Beside one, even a disabled one, MONAI Label ignores which weights were chosen."""
        handlers = train_json["train#handlers"]
        assert all(isinstance(handler, dict) for handler in handlers)
        assert not [handler for handler in handlers if "CheckpointLoader" in handler["_target_"]]

    @pytest.mark.parametrize(("there", "epochs"), [(True, 7), (False, 11)])
    def test_schedules_follow_the_epochs_that_it_sets(self, train_json, monkeypatch, there, epochs):
        """It sets those of the trainer alone; so does federated learning, but of one round, and its schedules go on."""
        if there:
            monkeypatch.setenv("MONAI_LABEL_APP_DIR", "APP")
        train_json["train#trainer#max_epochs"], train_json["max_epochs"] = 7, 11
        train_json["train#dataset"] = {"data": ["case"] * 3}
        train_json["batch_size"], train_json["patches_per_case"] = 4, 4
        assert train_json.get_parsed_content("train#sampler").max_epochs == epochs
        assert train_json.get_parsed_content("train#sampler").total_steps == epochs * 3


@pytest.mark.label
@pytest.mark.slow
@pytest.mark.skipif(not monai_label.LABEL_PYTHON.exists(), reason="needs .venv-label: make label-environment")
def test_session(tmp_path, make_encoder, capsys):
    """Requests are checked as they are sent, results for the grids of their images."""
    data_list = write_dataset(tmp_path / "data", 6, seed=0, test_cases=1, shape=(64, 64, 32))
    encoder = make_encoder()
    record = EncoderRecord(architecture=encoder.architecture, input=InputRecord(hu_window=[-1024, 325]))
    save_encoder(encoder, tmp_path / "encoder.pt", record)
    tiny = {name: value for name, value in TINY_SEGMENTATION.items() if not name.startswith(("encoder", "max_epochs"))}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**tiny, "patches_per_case": 16, "spacing": [7, 7, 10]}))
    results = monai_label.session(
        str(data_list),
        str(tmp_path / "session"),
        str(tmp_path / "encoder.pt"),
        f"tasks/phantom.yaml,small.yaml,{tmp_path / 'tiny.yaml'}",
        cases=6,
        test_cases=1,
        test_key="test",
        max_epochs=24,  # more than the preset's 20
    )
    before, after, _ = results["dice"]
    assert after > before + 0.05
    model = results["info"]["models"]["pgl_segmentation"]
    assert model["type"] == "segmentation"
    assert model["labels"] == results["numbered"]
    assert results["next_sample"] not in results["labelled"]
    tensors = len(encoder.state_dict())
    first, second = results["loaded"]
    assert f"all {tensors} tensors of the encoder: {tensors} of " in first
    assert f"all {tensors} tensors of the encoder" in second
    total = second.split(" of ")[-1].split()[0]
    assert f"{total} of {total} tensors loaded" in second
    printed = capsys.readouterr().out
    assert "ended" in printed.splitlines()[-3]
    process = int(printed.split("server ")[1].split()[0])
    assert not Path(f"/proc/{process}").exists()
