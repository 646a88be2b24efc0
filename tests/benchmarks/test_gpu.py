"""The GPU runs of benchmarks/gpu in miniature, on the CPU, so that a change of the layout cannot break them unseen."""

import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from programs import ROOT

KIT = ROOT / "benchmarks" / "gpu"
ORGANS = (1, 2, 3, 4, 7)  # label values of tasks/openkbp.yaml


def write_set(folder, counts: dict[str, int], labels: bool) -> None:
    """Small volumes with bright blocks, and their data list."""
    folder.mkdir()
    lists = {}
    for key, count in counts.items():
        lists[key] = []
        for number in range(count):
            label = np.zeros((64, 60, 40), dtype=np.uint8)
            for place, value in enumerate(ORGANS):
                label[6 + 10 * place : 16 + 10 * place, 15:45, 8:32] = value
            voxels = (-1000 + 180.0 * label + np.random.default_rng(number).normal(0, 20, label.shape)).astype(np.int16)
            entry = {"image": f"{key}{number}.nii.gz"} | ({"label": f"{key}{number}_label.nii.gz"} if labels else {})
            for name, array in zip(entry.values(), (voxels, label), strict=False):
                nib.save(nib.Nifti1Image(array, np.diag([4.0, 4.0, 3.0, 1.0])), folder / name)
            lists[key].append(entry)
    (folder / "dataset.json").write_text(json.dumps(lists))


@pytest.mark.slow
def test_in_miniature(tmp_path):
    write_set(tmp_path / "ssl", {"training": 5}, labels=False)
    write_set(tmp_path / "seg", {"training": 4, "validation": 2}, labels=True)
    subprocess.run([sys.executable, KIT / "archives.py", "pack", tmp_path / "ssl", tmp_path / "ssl.tar.xz"], check=True)
    places = {"OUT": tmp_path / "out", "WORK": tmp_path / "work", "PY": sys.executable}
    data = {"SSL": tmp_path / "ssl.tar.xz", "SEG": tmp_path / "seg"}
    parts = {"TINY": 1, "PARTS": "numerics speed", "OMP_NUM_THREADS": 1}
    environment = {**os.environ, **{name: str(value) for name, value in {**places, **data, **parts}.items()}}
    command = ["bash", str(KIT / "run.sh"), "check", "campaign"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "FAILED" not in summary
    assert "ENDED WITH" not in summary
    assert "| micro-batch 64 |" in summary
    results = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert [line.split(" | ")[:3] for line in results[2:]] == [["| 3", "0", "PGL"], ["| 3", "0", "random"]]
    encoder = tmp_path / "encoder.pt"
    subprocess.run([sys.executable, KIT / "encoder8.py", "unpack", tmp_path / "out", encoder], check=True)
    # In 8 bit, the weights are those of the file but for rounding.
    exact, rounded = (
        torch.load(path, weights_only=True)
        for path in (tmp_path / "work" / "pre_PGL" / "models" / "pgl_encoder.pt", encoder)
    )
    assert exact.keys() == rounded.keys()
    for key, value in exact.items():
        torch.testing.assert_close(rounded[key], value, rtol=0, atol=float(value.abs().max()) / 127)
