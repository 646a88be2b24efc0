"""Packaged bundles at work, in processes in which the package itself cannot be imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from programs import SCHEMA, TINY, TINY_SEGMENTATION, run

from pgl_ext.networks import ResNetEncoder, SegmentationNet
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.packaging import package_bundles
from pgl_ext.weights import save_encoder, save_weights

CHECKS = Path(__file__).with_name("packaged_checks.py")
NAMES = ("pgl_pretrain", "pgl_segmentation")
TINY_ENCODER = {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 0.125}

# Stands for an environment without the package, whichever way it is installed here.
BLOCKER = """
import sys

class Blocker:
    def find_spec(name, path=None, target=None):
        if name == "pgl_ext":
            raise ModuleNotFoundError("the package is not installed here", name=name)

sys.meta_path.insert(0, Blocker)
"""
# What the zoo's module of this name does with a workflow.
UTILS = """
def check_workflow(workflow, check_properties=False):
    workflow.initialize()
    if check_properties and (wrong := workflow.check_properties()):
        raise ValueError(f"missing or wrong properties: {wrong}")
    workflow.run()
    workflow.finalize()
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Both bundles, with tiny weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    encoder = ResNetEncoder(**TINY_ENCODER)
    description = {
        "architecture": encoder.architecture,
        "stride": list(encoder.stride),
        "channels": list(encoder.channels),
        "normalization": {"clip_hu": [-1024, 325]},
        "spacing": None,
    }
    save_encoder(encoder, folder / "encoder.pt", description)
    task = SegmentationTask({"liver": [1], "spleen": [2]})
    network = SegmentationNet(1, 3, encoder=TINY_ENCODER, aspp_channels=16, decoder_channels=(16, 8, 8))
    description |= {"task": task.description(), "network": network.architecture, "patch_size": [32, 32, 16]}
    save_weights(network.state_dict(), folder / "model.pt", description)
    (folder / "license.txt").write_text("trained on nothing\n")
    package_bundles(
        [],
        folder / "dist",
        model=folder / "model.pt",
        encoder=folder / "encoder.pt",
        data_license=folder / "license.txt",
    )
    return folder / "dist"


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    for number in range(3):
        labels = np.random.default_rng(number).integers(0, 3, (48, 44, 24)).astype(np.uint8)
        for name, array in (("images", 100 * labels.astype(np.float32)), ("labels", labels)):
            (folder / name).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / name / f"case{number}.nii.gz")
    return folder


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch) -> Path:
    """First on the Python path of the processes; the package is blocked there."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    (folder / "utils.py").write_text(UTILS)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def check(name: str, *arguments: object, cwd: Path) -> None:
    succeeds([str(CHECKS), name, *map(str, arguments)], cwd)


def succeeds(arguments: list[str], cwd: Path) -> None:
    result = run(arguments, cwd)
    assert result.returncode == 0, result.stdout[-3000:]


def test_the_package_is_blocked(tmp_path):
    assert "not installed here" in run(["-c", "import pgl_ext"], tmp_path).stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_zoos_checks(dist, name, path, tmp_path, monkeypatch):
    for file in ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/README.md"):
        assert (dist / "models" / name / file).stat().st_size > 0
    # No workflow, so that nothing but the path says where the bundle's code is.
    monkeypatch.setenv("PYTHONPATH", f"{path}{os.pathsep}{dist / 'models' / name}")
    check("model_zoo", dist, name, *([SCHEMA] if SCHEMA.is_file() else []), cwd=tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_unit_tests_that_come_with_them(dist, name):
    """From the folder that stands for the zoo's repository."""
    succeeds([f"ci/unit_tests/test_{name}.py"], dist)


def test_both_beside_a_third_in_one_process(dist, tmp_path):
    check("one_process", dist, cwd=tmp_path)


@pytest.mark.parametrize(
    ("name", "settings", "folder"),
    [
        ("pgl_pretrain", {**TINY, "validation_fraction": 0.3}, "images"),
        ("pgl_segmentation", {**TINY_SEGMENTATION, "organs": {"liver": 1, "spleen": 2}}, "."),
    ],
    ids=NAMES,
)
def test_federated_learning(dist, cases, name, settings, folder, tmp_path):
    check("federated", dist, name, cases / folder, json.dumps({**settings, "num_workers": 0}), cwd=tmp_path)


def test_training_as_in_monai_label(dist, cases, tmp_path):
    """Only the bundle's folder is there; tests/test_monai_label.py does it with MONAI Label itself."""
    bundle = shutil.copytree(dist / "models" / "pgl_segmentation", tmp_path / "pgl_segmentation")
    check("monai_label", bundle, cases, cwd=tmp_path)
    assert (bundle / "output" / "metrics.csv").is_file()


def test_overlays_from_another_folder(dist, cases, tmp_path):
    configs = dist / "models" / "pgl_pretrain" / "configs"
    files = [str(configs / name) for name in ("train.json", "methods/pcrlv2.yaml", "small.yaml")]
    arguments = ["-m", "monai.bundle", "run", "training", "--config_file", str(files), "--output_dir", "out"]
    settings = {**TINY, "max_epochs": 1, "val_interval": 1000, "dataset_dir": cases / "images", "num_workers": 0}
    for key, value in settings.items():
        arguments += [f"--{key}", str(value)]
    succeeds(arguments, tmp_path)
    assert (tmp_path / "out" / "models" / "pgl_encoder.pt").is_file()


def test_commands_of_the_copy(dist, tmp_path):
    bundle = dist / "models" / "pgl_segmentation"
    succeeds(["-m", "scripts.pgl_ext", "phantom", str(tmp_path / "data"), "--cases", "1"], bundle)
    assert (tmp_path / "data" / "dataset.json").is_file()
    out = tmp_path / "again"
    succeeds(
        ["-m", "scripts.pgl_ext", "package", ".", "--out", str(out), "--overlays", "tasks/bcv.yaml,small.yaml"], bundle
    )
    again = out / "models" / "pgl_segmentation"
    assert json.loads((again / "configs" / "train.json").read_text())["encoder"]["block"] == "basic"
    assert (again / "models" / "model.pt").is_file()


def test_style(dist):
    """What the zoo asks of flake8, isort and black, by ruff; long lines as bugbear does, from 10 % too long."""
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--select", "E,F,W,I,B,C4,N", "--ignore", "C408,N812,E741,B023"]
    lint = ["check", "--isolated", *rules, "--line-length", "132"]
    layout = ["format", "--isolated", "--check", "--line-length", "120"]
    layout += ["--config", "format.skip-magic-trailing-comma=true"]
    for arguments in (lint, layout):
        result = subprocess.run([*ruff, *arguments, str(dist)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:]
