"""Cross-validation: which trainings run, which are skipped, and by which network each case is scored."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import run, start, tail, wait_for

from pgl_ext.data.datalist import labelled_items
from pgl_ext.data.seen import scan_digests
from pgl_ext.tools.compare import read_scores
from pgl_ext.tools.folds import train_folds
from pgl_ext.tools.launch import BundleRun
from pgl_ext.tools.phantom import write_dataset
from pgl_ext.tools.plan import Data, Plan, read_data
from pgl_ext.tools.report import write_report
from pgl_ext.tools.workflows import model_file, recorded

PLAN = Plan(architecture="resnet50", small=True)
DATA = Data([{"image": str(number)} for number in range(7)], {"dataset_dir": "/cases"}, {}, "/cases")


@pytest.fixture
def runs(monkeypatch) -> list[BundleRun]:
    """What would be run; evaluation leaves its files, and fold 1 is stopped once."""
    seen = []

    def carry_out(workflow: BundleRun) -> None:
        seen.append(workflow)
        folder = Path(workflow.settings["output_dir"])
        if workflow.section == "evaluating":
            folder.mkdir(exist_ok=True)
            (folder / "cases.csv").touch()
            dice = {"mean": 0.5, "ci95": [0.25, 0.75]}
            (folder / "summary.json").write_text(json.dumps({"cases": 7, "average": {"dice": dice}}))
        elif folder.name == "fold_1" and "resume" not in workflow.settings:
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "checkpoint_00000004.pt").touch()
            raise SystemExit(130)

    monkeypatch.setattr(BundleRun, "run", carry_out)
    return seen


def said(runs: list[BundleRun]) -> list[tuple]:
    return [(one.section, one.settings.get("test_fold"), one.settings.get("resume")) for one in runs]


def test_goes_on_where_it_was_stopped(runs, tmp_path):
    out = tmp_path / "out"
    settings = {"max_epochs": "3", "device": "cpu"}
    with pytest.raises(SystemExit):
        train_folds(DATA, out, PLAN, None, settings, 3)
    with pytest.raises(FileNotFoundError, match="not finished"):
        model_file(out)
    assert said(runs) == [("training", [0, 3], None), ("training", [1, 3], None)]
    assert {one.settings["cache_dir"] for one in runs} == {str(out / "cache")}
    runs.clear()
    *_, sentence = train_folds(DATA, out, PLAN, None, settings, 3)
    assert said(runs) == [("training", [1, 3], True), ("training", [2, 3], None), ("evaluating", None, None)]
    assert runs[-1].settings == {"model_path": str(out), "output_dir": str(out / "evaluation"), "device": "cpu"}
    assert sentence.startswith("Mean Dice of all 7 cases, each scored by the network that has not seen it: 0.500 (95 %")
    assert model_file(out) == out
    (out / "models").mkdir()
    (out / "models" / "model.pt").touch()
    with pytest.raises(ValueError, match="of two trainings"):
        model_file(out)
    assert model_file(out / "models" / "model.pt") == out / "models" / "model.pt"
    runs.clear()
    assert train_folds(DATA, out, PLAN, None, settings, 3)[-1] == sentence
    assert not runs
    shutil.rmtree(out / "fold_2")
    train_folds(DATA, out, PLAN, None, settings, 3)
    assert said(runs) == [("training", [2, 3], None), ("evaluating", None, None)]


def test_finished_folds_of_other_settings_are_not_mixed_with_these(runs, tmp_path):
    with pytest.raises(SystemExit):
        train_folds(DATA, tmp_path, PLAN, None, {"lr": "0.1"}, 3)
    with pytest.raises(ValueError, match="digest of the cases was"):
        train_folds(replace(DATA, items=DATA.items[1:]), tmp_path, PLAN, None, {"lr": "0.1"}, 3)
    with pytest.raises(
        ValueError, match=r"fold_0 was trained otherwise: lr was 0\.1 and is 0\.2; test_fold was \[0, 3\]"
    ):
        train_folds(DATA, tmp_path, PLAN, None, {"lr": "0.2"}, 4)
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("settings", "folds", "message"),
    [
        ({"test_fold": "[0, 3]"}, 3, "--test_fold cannot be given with --folds"),
        ({"resume": "true"}, 3, "same command goes on"),
        ({}, 8, "--folds is 8, but there are 7"),
    ],
)
def test_what_cannot_be_trained(runs, tmp_path, settings, folds, message):
    with pytest.raises(ValueError, match=message):
        train_folds(DATA, tmp_path / "out", PLAN, None, settings, folds)
    assert not runs
    assert not (tmp_path / "out").exists()


# --- real trainings -------------------------------------------------------------------------------------------------

TINY = {
    "patch_size": "[32, 32, 16]",
    "encoder#widen_factor": "0.125",
    "network_def#aspp_channels": "16",
    "network_def#decoder_channels": "[16, 8, 8]",
    "patches_per_case": "4",
    "batch_size": "4",
    "max_epochs": "2",
    "checkpoint_interval": "1",
    "device": "cpu",
}


@pytest.mark.slow
def test_a_killed_one_ends_as_one_that_was_not(tmp_path, monkeypatch):
    """And no case was scored by a network that had seen it, by the contents of the files."""
    write_dataset(tmp_path / "data", 4, shape=(64, 64, 32))
    data, killed = read_data(tmp_path / "data", labelled=True), []

    def carry_out(workflow: BundleRun) -> None:
        result = run(workflow._strict[1:], tmp_path)
        assert result.returncode == 0, result.stdout[-3000:]

    def kill_the_second(workflow: BundleRun) -> None:
        folder, log = Path(workflow.settings["output_dir"]), tmp_path / "log"
        if folder.name != "fold_1" or killed:
            return carry_out(workflow)
        process = start(workflow._strict[1:], tmp_path, log)
        wait_for(lambda: list(folder.glob("checkpoints/*.pt")), process, log)
        process.kill()
        killed.append(tail(log))
        raise SystemExit(1)

    monkeypatch.setattr(BundleRun, "run", carry_out)
    straight, out = tmp_path / "straight", tmp_path / "out"
    train_folds(data, straight, PLAN, None, TINY, 2)
    monkeypatch.setattr(BundleRun, "run", kill_the_second)
    with pytest.raises(SystemExit):
        train_folds(data, out, PLAN, None, TINY, 2)
    train_folds(data, out, PLAN, None, TINY, 2)
    assert killed
    for fold in range(2):
        states = [torch.load(folder / f"fold_{fold}/models/model.pt", weights_only=True) for folder in (straight, out)]
        assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    assert str(read_scores(out)) == str(read_scores(straight))

    files = json.loads((out / "evaluation" / "summary.json").read_text())["files"]
    assert {case["image"] for case in files.values()} == {item["image"] for item in data.items}
    for case in files.values():
        (fold,) = case["models"]
        trained_on = recorded(out / f"fold_{fold}")["data"]["scans"]
        assert trained_on
        assert not {*scan_digests([case])} & {*trained_on}
        assert case["image"] in [item["image"] for item in labelled_items(out / f"fold_{fold}/split.json", key="test")]
    page = write_report(tmp_path / "report.html", {"cross-validated": out}).read_text()
    assert "There is no picture" not in page
