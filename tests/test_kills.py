"""Commands that are killed at random moments and go on: nothing is lost, and nothing differs."""

from __future__ import annotations

import csv
import random
import subprocess
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from made_weights import as_trained, model_record, small_network
from programs import TOO_LONG, checkpoints, fine_tuning_arguments, run, start, tail, training_arguments

from pgl_ext.task import SegmentationTask
from pgl_ext.tools.phantom import write_dataset
from pgl_ext.weights import save_weights

pytestmark = pytest.mark.slow

KILLS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_dataset(folder, 5, test_cases=1, shape=(64, 64, 32))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    task = SegmentationTask({f"structure {value}": value for value in range(1, 9)})
    network = as_trained(small_network("dynunet", out_channels=task.out_channels))
    path = tmp_path_factory.mktemp("model") / "models" / "model.pt"
    path.parent.mkdir()
    save_weights(network.state_dict(), path, model_record(network, task))
    return path


def arguments_of(command: str, data: Path, model: Path, out: Path) -> list[str]:
    training = {"output_dir": out, "checkpoint_interval": 1, "num_workers": 1}
    if command == "pretrain":
        return training_arguments(data_list_file_path=data / "dataset.json", **training)
    if command == "finetune":
        return fine_tuning_arguments(data_list_file_path=data / "dataset.json", **training)
    return ["-m", "pgl_ext", command, str(model), str(data), str(out), "--data_list_key", "training"]


def results(out: Path) -> dict[str, object]:
    """All that a command leaves to be used: weights, label maps, and tables without times."""
    left = {}
    for path in out.rglob("*.pt"):
        if path.parent.name == "models":
            left[path.name] = {key: value.numpy() for key, value in torch.load(path, weights_only=True).items()}
    for path in out.rglob("*.nii.gz"):
        left[path.name] = np.asarray(nibabel.load(path).dataobj)
    for name in ("cases.csv", "volumes.csv"):
        for path in out.rglob(name):
            with open(path, newline="", encoding="utf-8") as file:
                left[name] = sorted(map(str, csv.DictReader(file)))
    return left


def resume(command: str, out: Path, times: int) -> list[str]:
    """What a user adds to go on: a training that has no checkpoint yet begins anew."""
    goes_on = checkpoints(out) if command in ("pretrain", "finetune") else times
    return ["--resume", "true"] if goes_on else []


@pytest.mark.parametrize("command", ["pretrain", "finetune", "segment", "evaluate"])
def test_killed_at_random_moments(command, data, model, tmp_path):
    began = time.monotonic()
    straight = run(arguments_of(command, data, model, tmp_path / "straight"), cwd=tmp_path)
    seconds = time.monotonic() - began
    assert straight.returncode == 0, straight.stdout[-3000:]
    arguments, draw, kills = arguments_of(command, data, model, tmp_path / "killed"), random.Random(0), 0
    for number in range(KILLS):
        process = start([*arguments, *resume(command, tmp_path / "killed", number)], tmp_path, tmp_path / "log")
        try:
            process.wait(draw.uniform(0.2, 0.7) * seconds)
        except subprocess.TimeoutExpired:
            kills += 1
        process.kill()
        status = process.wait(TOO_LONG)
        assert status in (0, -9), tail(tmp_path / "log")
    assert kills
    last = run([*arguments, *resume(command, tmp_path / "killed", KILLS)], cwd=tmp_path)
    assert last.returncode == 0, last.stdout[-3000:]
    expected, left = results(tmp_path / "straight"), results(tmp_path / "killed")
    assert expected
    np.testing.assert_equal(left, expected)
