from __future__ import annotations

import json
import re

import pytest
import yaml

from pgl_ext.model_card import write_model_card
from pgl_ext.networks import SegmentationNet
from pgl_ext.evaluation.summary import summarise
from pgl_ext.task import SegmentationTask
from pgl_ext.weights import save_encoder, save_weights

INPUT = {
    "normalization": {"clip_hu": [-1024, 325], "subtract_mean_divide_std": "per volume"},
    "orientation": "RAS",
    "spacing": [1.5, 1.5, 3],
}


@pytest.fixture
def encoder_file(make_encoder, tmp_path):
    encoder = make_encoder()
    description = {
        "version": "1.2.3",
        "architecture": encoder.architecture,
        "stride": list(encoder.stride),
        "channels": list(encoder.channels),
        "method": "PGL",
        "steps": 161,
        "pairs": 2527,
        **INPUT,
        "view_size": [32, 32, 16],
        "views": {"scale_range": [1.1, 1.4], "min_overlap": 0.1, "flip_prob": 0.5},
        "optimizer": "LARS",
        "lr": 0.2,
        "seed": 0,
        "data": {"training_volumes": 157},
    }
    save_encoder(encoder, tmp_path / "pgl_encoder.pt", description)
    return tmp_path / "pgl_encoder.pt"


@pytest.fixture
def model_file(make_encoder, tmp_path):
    encoder = make_encoder()
    architecture = {"in_channels": 1, "out_channels": 3, "encoder": encoder.architecture, "aspp_channels": 8}
    network = SegmentationNet(**architecture, decoder_channels=(8, 6, 4))
    description = {
        "version": "1.2.3",
        "task": SegmentationTask({"liver": [1], "spleen": [2]}).description(),
        "network": network.architecture,
        **INPUT,
        "patch_size": [32, 32, 16],
        "pretrained_encoder": "/home/someone/runs/pgl_encoder.pt",
        "pretrained_decoder": None,
        "data": {"training_cases": 8, "validation_cases": 2},
        "steps": 384,
        "epoch": 24,
        "val_mean_dice": 0.69,
    }
    save_weights(network.state_dict(), tmp_path / "model.pt", description)
    return tmp_path / "model.pt"


@pytest.fixture
def evaluation(tmp_path):
    """Of three cases, with one organ that is never found and has no distances."""
    scores = {"liver": (0.9, 0.8, 30.0, 12.5), "spleen": (0.0, 0.0, float("nan"), float("nan"))}
    names = ("dice", "iou", "hd_mm", "hd95_mm")
    rows = [
        {"case": f"case{n}", "organ": organ, "status": "ok", **dict(zip(names, values, strict=True))}
        for n in range(3)
        for organ, values in scores.items()
    ]
    summary = summarise(rows)
    content = {"cases": 3, "average": summary.pop("average"), "organs": summary}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "summary.json").write_text(json.dumps(content))
    return tmp_path / "evaluation"


def header_of(card: str) -> dict:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(match[1])


def table_of(card: str, section: str) -> list[list[str]]:
    """Rows of the table in a section, without its head."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)[1]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert set("".join(rows[1])) == {"-"}
    return [[cell.strip() for cell in row] for row in rows[2:]]


def run_code_of(card: str) -> dict:
    """What the card's Python leaves behind."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(code, names)
    return names


class TestEncoder:
    def test_header(self, encoder_file, tmp_path):
        out = write_model_card(encoder_file, tmp_path / "card" / "README.md", license="cc-by-4.0")
        assert out == tmp_path / "card" / "README.md"
        header = header_of(out.read_text())
        assert header["license"] == "cc-by-4.0"
        assert header["library_name"] == "monai"
        assert header["pipeline_tag"] == "image-feature-extraction"
        assert {"monai", "medical", "3d", "self-supervised-learning"} <= set(header["tags"])

    def test_content(self, encoder_file, make_encoder, tmp_path):
        card = write_model_card(encoder_file, tmp_path / "README.md").read_text()
        parameters = sum(p.numel() for p in make_encoder().parameters())
        assert f"{parameters:,} parameters" in card
        assert "PGL for MONAI 1.2.3" in card
        assert dict(table_of(card, "Input")) == {
            "orientation": "RAS",
            "spacing": "1.5 x 1.5 x 3 mm",
            "range": "-1024 to 325 HU, clipped",
            "normalisation": "mean subtracted, divided by the standard deviation, per volume",
        }
        assert dict(table_of(card, "Training")) == {
            "method": "PGL",
            "steps": "161",
            "pairs": "2527",
            "view size": "32, 32, 16",
            "views": "scale range 1.1, 1.4, min overlap 0.1, flip prob 0.5",
            "optimizer": "LARS",
            "lr": "0.2",
            "seed": "0",
            "training volumes": "157",
        }
        assert "## Evaluation" not in card
        assert "No evaluation was recorded" in card
        assert "not for clinical use" in card

    def test_the_code_runs(self, encoder_file, make_encoder, tmp_path, monkeypatch, capsys):
        card = write_model_card(encoder_file, tmp_path / "README.md").read_text()
        monkeypatch.chdir(tmp_path)
        features = run_code_of(card)["features"]
        assert [f.shape[1] for f in features] == list(make_encoder().channels)
        assert re.fullmatch(r"(\d+) of \1 tensors loaded\n", capsys.readouterr().out)

    def test_older_files_record_less(self, encoder_file, tmp_path):
        description = {"architecture": {"layers": [1, 1, 1, 1]}, "normalization": {"clip_hu": None}, "spacing": None}
        encoder_file.with_suffix(".json").write_text(json.dumps(description))
        card = write_model_card(encoder_file, tmp_path / "README.md").read_text()
        rows = dict(table_of(card, "Input"))
        assert (rows["spacing"], rows["range"]) == ("as stored", "not clipped")

    def test_evaluation_is_that_of_a_fine_tuned_network(self, encoder_file, evaluation, tmp_path):
        card = write_model_card(encoder_file, tmp_path / "README.md", evaluation).read_text()
        assert "fine-tuned from this encoder" in card
        assert "No evaluation was recorded" not in card


class TestModel:
    def test_content(self, model_file, tmp_path):
        card = write_model_card(model_file, tmp_path / "README.md").read_text()
        header = header_of(card)
        assert header["pipeline_tag"] == "image-segmentation"
        assert header["license"] == "apache-2.0"
        assert "It segments: liver, spleen." in card
        assert dict(table_of(card, "Training")) == {
            "pretrained encoder": "pgl_encoder.pt",
            "steps": "384",
            "epoch": "24",
            "patch size": "32, 32, 16",
            "training cases": "8",
            "validation cases": "2",
        }
        assert "someone" not in card

    def test_the_code_runs(self, model_file, tmp_path, monkeypatch):
        card = write_model_card(model_file, tmp_path / "README.md").read_text()
        monkeypatch.chdir(tmp_path)
        assert run_code_of(card)["logits"].shape == (1, 3, 32, 32, 16)

    def test_evaluation(self, model_file, evaluation, tmp_path):
        card = write_model_card(model_file, tmp_path / "README.md", evaluation).read_text()
        assert table_of(card, "Evaluation") == [
            ["liver", "0.900 (0.900 to 0.900)", "0.800 (0.800 to 0.800)", "30.0 (30.0 to 30.0)", "12.5 (12.5 to 12.5)"],
            ["spleen", "0.000 (0.000 to 0.000)", "0.000 (0.000 to 0.000)", "n/a", "n/a"],
            [
                "average",
                "0.450 (0.450 to 0.450)",
                "0.400 (0.400 to 0.400)",
                "30.0 (30.0 to 30.0)",
                "12.5 (12.5 to 12.5)",
            ],
        ]
        assert "3 cases" in card


def test_no_report(model_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no summary\.json.*run evaluating"):
        write_model_card(model_file, tmp_path / "README.md", tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_no_json(model_file, tmp_path):
    model_file.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no description .*model\.json"):
        write_model_card(model_file, tmp_path / "README.md")


def test_json_of_something_else(model_file, tmp_path):
    model_file.with_suffix(".json").write_text('{"version": "1"}')
    with pytest.raises(ValueError, match=r"model\.json describes neither an encoder nor a model"):
        write_model_card(model_file, tmp_path / "README.md")
