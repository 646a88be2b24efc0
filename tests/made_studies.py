"""Study files for tests, and runs that look as if they had been run."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import pgl_ext
from pgl_ext.files import write_csv
from pgl_ext.tools.study.plan import Study
from pgl_ext.tools.study.runs import Run, evaluation_folder

FINGERPRINT = {"code": {}, "versions": {}, "settings": {}, "data": {}, "encoder": None}


def write_list(path: Path, cases: int, **lists: int) -> str:
    """A data list whose images and label maps are empty files; further lists count on from its cases."""
    names = iter(f"case_{number}.nii.gz" for number in itertools.count())
    content = {}
    for key, count in {"training": cases, **lists}.items():
        content[key] = [
            {"image": f"images/{name}", "label": f"labels/{name}"} for name in itertools.islice(names, count)
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    for entry in itertools.chain(*content.values()):
        for name in entry.values():
            (path.parent / name).parent.mkdir(exist_ok=True)
            (path.parent / name).touch()
    path.write_text(json.dumps(content))
    return str(path)


def other_scans(folder: Path) -> dict[str, Any]:
    """An entry that pre-trains on scans of its own."""
    return {"configs": ["train.json"], "settings": {"data_list_file_path": write_list(folder / "scans/list.json", 5)}}


def write_study(folder: Path, **entries: Any) -> Path:
    """A study of the small presets on lists of empty files, with some entries replaced."""
    data = write_list(folder / "data" / "dataset.json", 10, test=4)
    content = {
        "title": "A study",
        "pretraining": {"configs": ["train.json", "small.yaml"], "settings": {"data_list_file_path": data}},
        "fine_tuning": {
            "configs": ["train.json", "tasks/phantom.yaml", "small.yaml"],
            "settings": {"data_list_file_path": data},
            "patches_per_epoch": 48,
        },
        "test": {"settings": {"data_list_file_path": data, "data_list_key": "test"}},
        "methods": {"random": {"encoder": None}, "PGL": {}},
        "labelled_cases": [3, 5],
        "seeds": [0, 1],
        **entries,
    }
    path = folder / "study.yaml"
    path.write_text(
        yaml.safe_dump({name: value for name, value in content.items() if value is not None}, sort_keys=False)
    )
    return path


def copy_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's code that fingerprints are made of from now on."""
    package = folder / "pgl_ext"
    shutil.copytree(Path(pgl_ext.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("pgl_ext.code_digest._FOLDER", package)
    return package


def make_study(folder: Path, overrides: Mapping[str, Any] | None = None, **entries: Any) -> Study:
    return Study(write_study(folder, **entries), folder / "runs", overrides=overrides)


def finish(
    run: Run, dice: Mapping[str, list[float]] | None = None, kept: Mapping[int, Any] | None = None, **noted: Any
) -> None:
    """Leave what a finished run leaves.

    Args:
        run: a pre-training or a fine-tuning.
        dice: of the fine-tuning, by organ; NaN becomes an empty field.
        kept: the same after kept steps.
        noted: results other than the usual ones.
    """
    cost = {"seconds": 60.0, "cost": 0.5, "unit": "CPU-core-hours"}
    result = (
        {"steps": 10, "pairs": 160} if run.is_pretraining else {"steps": 10, "val_mean_dice": 0.5, "mean_dice": 0.6}
    )
    write = {"started.json": {"fingerprint": FINGERPRINT, "attempts": []}, "run.json": {**result, **cost, **noted}}
    run.folder.mkdir(parents=True, exist_ok=True)
    for name, content in write.items():
        (run.folder / name).write_text(json.dumps(content))
    evaluations = {**(kept or {}), **({} if dice is None else {None: dice})}
    for step, of_step in evaluations.items():
        rows = [
            {"case": f"case_{number}", "organ": organ, "dice": value, "iou": value / (2 - value)}
            | {"hd_mm": 20 - value, "hd95_mm": 10 - value, "nsd": value / 2}
            for organ, values in of_step.items()
            for number, value in enumerate(values)
        ]
        write_csv(evaluation_folder(run.folder, step) / "cases.csv", rows)
