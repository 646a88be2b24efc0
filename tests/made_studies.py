"""Study files for tests, and runs that look as if they had been run."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from monai.utils import ensure_tuple

import pgl_ext
from pgl_ext.files import write_csv
from pgl_ext.tools.study.configs import Command
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


STAND_IN = Path(__file__).parent / "tools" / "study" / "stand_in.py"


def stand_in(run: Run, command: Command) -> list[str]:
    """A run's command, stood in for by one of milliseconds."""
    config, folder = command.config(), run.folder
    if command.section == "evaluating":
        arguments = [config["output_dir"], ",".join(ensure_tuple(config["model_path"]))]
    else:
        folder = Path(config["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        resume = any((folder / "checkpoints").glob("*.pt"))
        seed = run.seed + (config.get("test_fold") or [0])[0]
        arguments = [str(seed), str(resume), json.dumps(config.get("kept_steps", []))]
    return [sys.executable, "-I", "-S", str(STAND_IN), command.section, str(folder), *arguments]


def make_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let studies have runs of milliseconds, and nothing that other tests are about."""
    monkeypatch.setattr("pgl_ext.tools.study.runner.bundle_command", stand_in)
    monkeypatch.setattr("pgl_ext.tools.study.fingerprint.code_digests", lambda _: {})
    monkeypatch.setattr("pgl_ext.tools.study.run.draw_figures", lambda *_: None)  # the page takes no time, pictures do


def scores(out: Path) -> dict[str, object]:
    """All that a study says but its costs, which no two have in common."""
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("cases.csv"))
    with open(out / "table.csv", newline="") as file:
        table = [{name: text for name, text in row.items() if "cost" not in name} for row in csv.DictReader(file)]
    curves = [path.name for path in out.glob("curves.csv")]
    return {"table.csv": table, **{name: (out / name).read_text() for name in (*names, *curves, "study.csv")}}
