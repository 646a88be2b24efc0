"""The studies of the PGL paper, on fakes of the layout that its data sets have."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from made_studies import write_list
from programs import ROOT, SEGMENTATION_CONFIGS

from pgl_ext.data.datalist import labelled_items, load_datalist
from pgl_ext.data.split import split_volumes
from pgl_ext.data.structures import listed_structures
from pgl_ext.tools.cli import main
from pgl_ext.tools.study.fingerprint import fingerprint
from pgl_ext.tools.study.plan import Study
from pgl_ext.tools.study.runs import Rates
from pgl_ext.tools.study.study_file import read_study_file

# Scans with and without labels in the paper's pre-training data; RibFrac's 660 are all in one list.
PAPER_SCANS = {
    "RibFrac": (660, 0),
    "Task08_HepaticVessel": (303, 140),
    "Task10_Colon": (126, 64),
    "Task07_Pancreas": (281, 139),
    "Task06_Lung": (63, 32),
}


CASES = {"bcv": 30, "kits19": 210, "msd_liver": 131, "msd_spleen": 41}


def touch(root: Path, *names: str) -> None:
    """Empty files, of which none counts as a copy of another."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def config_of(run):
    return run.commands[0].config()


def write_scans(folder: Path, scans: dict[str, tuple[int, int]]) -> None:
    """Empty files and data lists as RibFrac's one-liner and the Decathlon have them."""
    for name, (training, test) in scans.items():
        content = {"training": [{"image": f"imagesTr/{i}.nii.gz"} for i in range(training)]}
        content["test"] = [f"./imagesTs/{i}.nii.gz" for i in range(test)]
        touch(folder / name, *(entry["image"] for entry in content["training"]), *content["test"])
        (folder / name / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("name", "cases"), CASES.items())
def test_scans_and_splits_are_the_paper_s(name, cases, tmp_path, monkeypatch):
    """Of section 4: 1808 CTs to pre-train on, and the halves for training and testing."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "studies" / f"paper_{name}.yaml"
    labelled = read_study_file(path)["fine_tuning"]["settings"]["data_list_file_path"]
    write_scans(tmp_path, PAPER_SCANS)
    write_list(tmp_path / labelled, cases)
    study = Study(path, tmp_path / "runs")
    assert study.note.startswith("Pre-trained on 1808 scans: 660 of RibFrac/dataset.json, 443 of Task08_HepaticVessel/")
    run = study.fine_tuning("PGL", 1.0, 0)
    assert config_of(run.pretraining)["validation_fraction"] == 0
    fine_tuning = config_of(run)
    training = load_datalist(fine_tuning["data_list_file_path"], fine_tuning["dataset_dir"])
    assert fine_tuning["scale_range"] == config_of(run.pretraining)["scale_range"] == [1.1, 1.4]
    assert len(training) == {30: 15, 210: 105, 131: 66, 41: 20}[cases]
    if name != "msd_spleen":
        return
    lung = tmp_path / "Task06_Lung/dataset.json"
    lung.write_text(json.dumps(json.loads(lung.read_text()) | {"test": []}))
    with pytest.raises(ValueError, match=r"63 of Task06_Lung/dataset\.json, where the study has \[660, 443"):
        Study(path, tmp_path / "runs")
    note = Study(path, tmp_path / "runs", overrides={"pretraining#scans": []}).note
    assert note.startswith("Pre-trained on 1776 scans")


def commands_in(file: Path, program: str) -> list[str]:
    """The commands in a file's comments, as they stand; those of several lines end with a quotation mark."""
    text = "\n".join(line.removeprefix("#") for line in file.read_text().splitlines() if line.startswith("#"))
    return re.findall(rf'^   ({program} -c "(?:[^"]|\n)*"|{program} study .*)$', text, flags=re.MULTILINE)


def test_one_domain_and_three_have_as_many_pairs(tmp_path, monkeypatch):
    """On lists as long as the real ones, they differ by the scans alone."""
    monkeypatch.chdir(tmp_path)
    write_scans(tmp_path, {"openkbp_ssl": (165, 0), "sts_tumour": (36, 0), "ct_unlabelled_misc": (6, 0)})
    write_list(tmp_path / "openkbp_seg/dataset.json", 70, validation=9)
    pairs, fine_tunings = {}, {}
    for name in ("one", "three"):
        study = Study(ROOT / f"studies/openkbp_{name}_domain{'s' * (name == 'three')}.yaml", tmp_path / "runs")
        run = study.fine_tuning(study.methods[1], 0.05, 0, Rates(0.3))
        config = config_of(run.pretraining)
        scans = load_datalist(config["data_list_file_path"])
        training, _ = split_volumes(scans, config["validation_fraction"], 0)
        pairs[name] = len(training) * config["patches_per_volume"] * config["max_epochs"]
        fine_tunings[name] = fingerprint(study.fine_tuning("random", 0.05, 0))
    assert pairs == {"one": 4710, "three": 4728}
    assert fine_tunings["one"] == fine_tunings["three"]


LAYOUTS = {
    "LiTS": [f"{kind}-{n}.nii" for kind in ("volume", "segmentation") for n in (0, 10, 130)],
    "LUNA16": ["subset0/1.3.6.mhd", "subset9/1.3.7.mhd", "seg-lungs-LUNA16/1.3.6.mhd"],
    "BraTS": [f"HGG/{case}/{case}_{kind}.nii.gz" for case in "ab" for kind in ("flair", "t1", "t1ce", "t2", "seg")],
}


@pytest.mark.parametrize("data", LAYOUTS)
def test_lists_of_other_data_sets(data, tmp_path):
    touch(tmp_path, *LAYOUTS[data])
    readme = re.findall("^python -c .*$", (ROOT / "studies/README.md").read_text(), flags=re.MULTILINE)
    commands = [*commands_in(SEGMENTATION_CONFIGS / "tasks/msd_liver.yaml", "python"), *readme]
    (command,) = (one for one in commands if f"{data.lower().removesuffix('16')}.json" in one)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    (path,) = tmp_path.glob("*.json")
    if data == "LUNA16":
        names = [item["image"] for item in load_datalist(path)]
        assert names == [str(tmp_path / name) for name in LAYOUTS[data][:2]]
        return
    cases = labelled_items(path)
    assert len(cases) == len([name for name in LAYOUTS[data] if "seg" in name])
    for case in cases:
        assert case["label"] != case["image"]
        assert case["label"].replace("segmentation", "volume").replace("_seg", "_flair") == case["image"]
        assert Path(case["label"]).exists()
    if data == "BraTS":
        assert listed_structures(json.loads(path.read_text()), path) == {"tumour": [1, 2, 4]}
        assert cases[0]["channel_names"] == ["flair", "t1", "t1ce", "t2"]
        assert [Path(file).name for file in cases[0]["further_channels"]] == [
            "a_t1.nii.gz",
            "a_t1ce.nii.gz",
            "a_t2.nii.gz",
        ]


def write_labelled(folder: Path, name: str) -> Path | None:
    """The labelled scans as they are downloaded; the folder that their list is to be made in, where there is none."""
    numbers = range(CASES[name])
    if name == "bcv":
        pairs = (
            f"{kind}/{kind if kind == 'label' else 'img'}{n:04}.nii.gz" for n in numbers for kind in ("img", "label")
        )
        touch(folder / "RawData/Training", *pairs)
        return folder / "RawData/Training"
    if name == "kits19":
        kinds = ("imaging", "segmentation")
        touch(folder / "kits19/data", *(f"case_{n:05}/{kind}.nii.gz" for n in numbers for kind in kinds))
        return folder / "kits19/data"
    write_list(
        folder / {"msd_liver": "Task03_Liver", "msd_spleen": "Task09_Spleen"}[name] / "dataset.json", CASES[name]
    )
    return None


@pytest.mark.parametrize("name", CASES)
def test_commands_in_the_headers_run(name, tmp_path, monkeypatch, capsys):
    """As typed from the repository, with the data beside it: what makes the lists, and the study."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    write_scans(tmp_path, {task: (2, 1) for task in PAPER_SCANS})
    (tmp_path / "RibFrac/dataset.json").unlink()
    (makes_ribfrac,) = commands_in(ROOT / "studies/paper.yaml", "python")
    subprocess.run(makes_ribfrac, shell=True, cwd=tmp_path / "RibFrac", check=True)
    folder = write_labelled(tmp_path, name)
    if folder is not None:
        (makes_list,) = commands_in(SEGMENTATION_CONFIGS / f"tasks/{name}.yaml", "python")
        subprocess.run(makes_list, shell=True, cwd=folder, check=True)
    (command,) = commands_in(ROOT / f"studies/paper_{name}.yaml", "pgl")
    tiny = ["--pretraining#scans", "[]", "--seeds", "[0]", "--label_fractions", "[1.0]", "--dry_run"]
    monkeypatch.setattr("sys.argv", [*shlex.split(command), *tiny])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    # Random weights and a variant of Models Genesis are not pre-trained by themselves.
    assert "0 of 20 runs finished" in capsys.readouterr().out
