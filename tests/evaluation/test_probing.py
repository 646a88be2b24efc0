"""Probing as a user runs it."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import pytest
import torch
from programs import fine_tuning_arguments, probing_arguments, run

from pgl_ext.networks import ResNetEncoder
from pgl_ext.tools.compare import compare_runs
from pgl_ext.tools.phantom import write_dataset
from pgl_ext.weights import EncoderRecord, InputRecord, save_encoder

pytestmark = pytest.mark.slow


def test_encoders_are_probed_on_the_cases_of_fine_tuning_and_compared(tmp_path):
    write_dataset(tmp_path / "data", 5, shape=(64, 64, 32), test_cases=2)
    torch.manual_seed(1)
    encoder = ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.125)
    record = EncoderRecord(architecture=encoder.architecture, input=InputRecord(hu_window=[-1024, 325]))
    save_encoder(encoder, tmp_path / "pgl_encoder.pt", record)
    shared = {
        "data_list_file_path": tmp_path / "data" / "dataset.json",
        "cache_dir": tmp_path / "cache",
        "labelled_cases": 3,
        "device": "cpu",
    }
    probe = {**shared, "test_data_list_key": "test", "voxels_per_organ": 100, "background_voxels": 300}
    runs = {
        "random": probing_arguments(**probe, output_dir=tmp_path / "random"),
        "loaded": probing_arguments(
            **probe,
            output_dir=tmp_path / "loaded",
            pretrained_encoder=tmp_path / "pgl_encoder.pt",
            levels="[2, 3, 4]",
            l2=0.1,
        ),
        "fine_tuned": fine_tuning_arguments(**shared, output_dir=tmp_path / "fine_tuned", max_epochs=1),
    }
    for name, arguments in runs.items():
        result = run(arguments, cwd=tmp_path)
        assert result.returncode == 0, f"{name}: {result.stdout[-3000:]}"
    splits = [json.loads((tmp_path / name / "split.json").read_text()) for name in ("random", "fine_tuned")]
    assert splits[0] == splits[1]

    summaries = {name: json.loads((tmp_path / name / "summary.json").read_text()) for name in ("random", "loaded")}
    assert summaries["random"]["average"]["dice"]["mean"] != summaries["loaded"]["average"]["dice"]["mean"]
    assert summaries["loaded"]["pretrained_encoder"] == str(tmp_path / "pgl_encoder.pt")
    settings = {"voxels_per_organ": 100, "background_voxels": 300, "labelled_cases": 3}
    assert summaries["random"]["probe"] == {"levels": [0, 1, 2, 3, 4], "l2": 0.01, **settings}
    assert summaries["loaded"]["probe"] == {"levels": [2, 3, 4], "l2": 0.1, **settings}

    # Scored on the grid of the files, as evaluations are.
    with open(tmp_path / "loaded" / "cases.csv", newline="") as file:
        cases = {row["case"] for row in csv.DictReader(file)}
    assert len(cases) == 2
    for prediction in (tmp_path / "loaded" / "predictions").iterdir():
        assert nib.load(prediction).shape == (64, 64, 32)
    assert "2 cases, paired" in compare_runs([tmp_path / "random", tmp_path / "loaded"])

    again = run(runs["loaded"], cwd=tmp_path)
    assert again.returncode != 0
    assert "holds the report of an earlier evaluation" in again.stdout
    assert "Traceback" not in again.stdout.split("error:")[-1]
