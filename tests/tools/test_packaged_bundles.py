"""Packaged bundles at work, in processes in which any other copy of the package fails."""

from __future__ import annotations

import json
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
from pgl_ext.weights import EncoderRecord, InputRecord, ModelRecord, save_encoder, save_weights

CHECKS = Path(__file__).with_name("packaged_checks.py")
NAMES = ("pgl_pretrain", "pgl_segmentation")
TINY_ENCODER = {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 0.125}

# An environment in which another copy of the package is installed, which is of no use; this project's is not.
ANOTHER_COPY = 'raise ImportError("not the copy in the bundle")'
WITHOUT_EDITABLE_INSTALLATIONS = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
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
    record = EncoderRecord(
        architecture=encoder.architecture,
        stride=encoder.stride,
        channels=encoder.channels,
        input=InputRecord(hu_window=[-1024, 325]),
    )
    save_encoder(encoder, folder / "encoder.pt", record)
    network = SegmentationNet(1, 3, encoder=TINY_ENCODER, aspp_channels=16, decoder_channels=(16, 8, 8))
    record = ModelRecord(
        task=SegmentationTask({"liver": [1], "spleen": [2]}).description(),
        network=network.architecture,
        input=InputRecord(hu_window=[-1024, 325], patch_size=[32, 32, 16]),
    )
    save_weights(network.state_dict(), folder / "model.pt", record)
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
    """First on the Python path of the processes, with another copy of the package."""
    folder = tmp_path / "path"
    (folder / "pgl_ext").mkdir(parents=True)
    (folder / "pgl_ext" / "__init__.py").write_text(ANOTHER_COPY)
    (folder / "sitecustomize.py").write_text(WITHOUT_EDITABLE_INSTALLATIONS)
    (folder / "utils.py").write_text(UTILS)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def check(name: str, *arguments: object, cwd: Path) -> None:
    succeeds([str(CHECKS), name, *map(str, arguments)], cwd)


def succeeds(arguments: list[str], cwd: Path) -> None:
    result = run(arguments, cwd)
    assert result.returncode == 0, result.stdout[-3000:]


def test_without_a_bundle_another_copy_is_found(tmp_path):
    assert "not the copy in the bundle" in run(["-c", "import pgl_ext"], tmp_path).stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_zoos_checks(dist, name, tmp_path):
    for file in ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/README.md"):
        assert (dist / "models" / name / file).stat().st_size > 0
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
    """Only the bundle's folder is there; test_monai_label.py does it with MONAI Label itself."""
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


def test_the_copy_has_no_commands(dist):
    result = run(["-m", "pgl_ext", "phantom", "data"], dist / "models" / "pgl_segmentation")
    assert result.returncode == 1
    assert result.stdout.startswith("error: this copy of pgl_ext comes with a bundle and has no commands: pip install")


def test_style(dist):
    """What the zoo asks of flake8 and black, by ruff; long lines as bugbear does, from 10 % too long."""
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--select", "E,F,W,B,C4,N", "--ignore", "C408,N812,E741,B023"]
    lint = ["check", "--isolated", *rules, "--line-length", "132"]
    layout = ["format", "--isolated", "--check", "--line-length", "120"]
    layout += ["--config", "format.skip-magic-trailing-comma=true"]
    for arguments in (lint, layout):
        result = subprocess.run([*ruff, *arguments, str(dist)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:]
