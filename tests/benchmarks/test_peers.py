"""The comparison with other tools: its figures from made-up times, and its sides in small."""

import importlib.util
import json
import sys

import nibabel as nib
import numpy as np
import pytest
from programs import ROOT


@pytest.fixture
def peers():
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks" / "peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures(peers):
    own, other = (
        [{"cpu": cpu, "wall": 2 * cpu, "peak": 1.5, "precision": "float32"} for cpu in times]
        for times in ([1.0, 2.0, 4.0], [3.0, 2.0, 8.0])
    )
    first, second = peers.table_rows("steps", {"ours": own, "monai": other})
    assert first == "| steps | this float32 | 0.5 | 0.25 | 1.50 |  |  |"
    # Of each round by itself: 3, 1 and 2.
    assert second.split(" | ")[2:] == ["0.333", "0.167", "1.50", "2.00 (1.00 to 3.00)", "2.00 (1.00 to 3.00) |"]


def test_a_side_that_fails_is_quoted(peers, tmp_path):
    side = peers.Side([sys.executable, "-c", "raise SystemExit('no such part')"], {}, tmp_path / "log")
    with pytest.raises(RuntimeError, match="no such part"):
        side.turn()


@pytest.mark.slow
def test_in_small(peers, tmp_path, capsys):
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            {
                "modality": {"0": "MRI"},
                "labels": {"0": "background", "1": "block"},
                "training": [{"image": f"{n}.nii.gz", "label": f"{n}_label.nii.gz"} for n in range(4)],
            }
        )
    )
    label = np.zeros((36, 50, 40), np.uint8)
    label[10:20, 10:30, 10:30] = 1
    for number in range(4):
        voxels = (100 * label + np.random.default_rng(number).normal(0, 20, label.shape)).astype(np.int16)
        for name, array in ((f"{number}.nii.gz", voxels), (f"{number}_label.nii.gz", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / name)
    peers.main([str(tmp_path), "--quick", "--rows", "training", "views", "cold"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1].split()[0] for line in lines[2:]] == ["this", "stock", "this", "stock", "this"]
