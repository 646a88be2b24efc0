from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from made_studies import copy_package, make_study, other_scans, write_study
from programs import ROOT

from pgl_ext.tools.study.fingerprint import _sizes_digest, checked_fingerprints, differences, fingerprint
from pgl_ext.tools.study.plan import Study

BY_PGL_AND_BYOL = ("fine_tuning/PGL/3_cases", "pretraining/PGL", "fine_tuning/BYOL/3_cases", "pretraining/BYOL")


def prints_of(study) -> dict[str, dict]:
    return {run.name: fingerprint(run) for run in study.runs({})}


def changes(before, after) -> dict[str, list[str]]:
    """What differs, of the runs of which something does."""
    found = {name: differences(before[name], after[name]) for name in before}
    return {name: texts for name, texts in found.items() if texts}


# --- code -----------------------------------------------------------------------------------------------------------


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_code_is_that_of_what_the_configs_name_and_of_what_it_imports(tmp_path):
    prints = prints_of(make_study(tmp_path, labelled_cases=[3], seeds=[0]))
    pretraining, fine_tuning, random = (
        set(prints[f"{name}/seed_0"]["code"])
        for name in ("pretraining/PGL", "fine_tuning/PGL/3_cases", "fine_tuning/random/3_cases")
    )
    assert {"pgl_ext.methods.pgl", "pgl_ext.methods.base", "pgl_ext.losses", "pgl_ext.geometry"} <= pretraining
    assert "pgl_ext.methods.byol" not in pretraining
    assert {"pgl_ext.task", "pgl_ext.segmentation.losses", "pgl_ext.evaluation.metrics"} <= random
    assert not any(name.startswith("pgl_ext.methods") for name in random)
    # What an encoder was made by counts where training starts from it.
    assert fine_tuning == pretraining | random
    assert not any(name.startswith("pgl_ext.tools") for name in fine_tuning)


@pytest.mark.parametrize(
    ("file", "outdated"),
    [
        ("methods/byol.py", ["fine_tuning/BYOL/3_cases/seed_0", "pretraining/BYOL/seed_0"]),
        ("methods/pgl.py", ["fine_tuning/PGL/3_cases/seed_0", "pretraining/PGL/seed_0"]),
        ("methods/online_target.py", [f"{kind}/seed_0" for kind in BY_PGL_AND_BYOL]),
        ("methods/hssl.py", []),
        ("methods/__init__.py", []),
        ("tools/study/results.py", []),
        ("tools/report.py", []),
        ("figures/curves.py", []),
        ("figures/overlays.py", []),
        ("evaluation/figures.py", []),
    ],
)
def test_changed_code_outdates_the_runs_that_use_it(tmp_path, monkeypatch, file, outdated):
    package = copy_package(tmp_path, monkeypatch)
    methods = {"random": {"encoder": None}, "PGL": {}, "BYOL": {"configs": ["methods/byol.yaml"]}}
    study = make_study(tmp_path, methods=methods, labelled_cases=[3], seeds=[0])
    before = prints_of(study)
    append(package / file, "# A remark.\n")
    assert changes(before, prints_of(study)) == {}
    append(package / file, "ADDED = True\n")
    module = f"pgl_ext.{file.removesuffix('.py').replace('/', '.')}"
    assert changes(before, prints_of(study)) == {name: [f"code of {module}"] for name in outdated}


def test_code_that_all_use_outdates_all(tmp_path, monkeypatch):
    package = copy_package(tmp_path, monkeypatch)
    study = make_study(tmp_path)
    before = prints_of(study)
    append(package / "engines.py", "ADDED = True\n")
    assert changes(before, prints_of(study)) == {run.name: ["code of pgl_ext.engines"] for run in study.runs({})}


def test_code_that_a_method_s_overlay_names_counts(tmp_path, monkeypatch):
    """Also within an expression."""
    package = copy_package(tmp_path, monkeypatch)
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("healthy_std: '$pgl_ext.methods.HSSL.__name__ and 1.0'\n")
    study = make_study(tmp_path, methods={"random": {"encoder": None}, "mine": {"configs": [str(overlay)]}})
    before = prints_of(study)
    append(package / "methods" / "hssl.py", "ADDED = True\n")
    assert set(changes(before, prints_of(study))) == {run.name for run in study.runs({}) if run.method == "mine"}


def test_versions_that_count(tmp_path):
    study = make_study(tmp_path, labelled_cases=[3], seeds=[0])
    (versions,) = {tuple(entry["versions"]) for entry in prints_of(study).values()}
    packages = {"torch", "monai", "pytorch-ignite", "pytorch-optimizer", "numpy", "scipy"}
    assert set(versions) == {"python", "device", *packages}


def test_whether_a_decoder_is_handed_over_counts(tmp_path):
    method = {"configs": ["methods/models_genesis.yaml"]}
    prints = [
        prints_of(make_study(tmp_path, methods={"random": {"encoder": None}, "MG": {**method, "decoder": decoder}}))
        for decoder in (False, True)
    ]
    assert changes(*prints) == {
        f"fine_tuning/MG/{cases}_cases/seed_{seed}": ["training with decoder: False -> True"]
        for cases in (3, 5)
        for seed in (0, 1)
    }


# --- settings -------------------------------------------------------------------------------------------------------


def test_more_methods_seeds_and_labels_leave_the_others_as_they_are(tmp_path):
    before = prints_of(make_study(tmp_path))
    more = {
        "methods#PGL w/o F": {"configs": ["methods/pgl_without_flip.yaml"]},
        "seeds": [0, 1, 2],
        "labelled_cases": [3, 5, 8],
        "ablations": ["PGL"],
    }
    after = prints_of(make_study(tmp_path, more))
    assert len(after) > len(before)
    assert changes(before, after) == {}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("pretraining#settings#max_epochs", 3, {"pretraining": "training max_epochs: 10 -> 3"}),
        ("pretraining#settings#encoder#layers", [1, 1, 2, 1], {"pretraining": "training encoder#layers#2: 1 -> 2"}),
        ("methods#PGL#settings", {"flip_prob": 0.1}, {"pretraining": "training flip_prob: 0.5 -> 0.1"}),
        ("fine_tuning#settings#lr", 0.1, {"fine_tuning": "training lr: 0.2 -> 0.1"}),
        ("fine_tuning#patches_per_epoch", 96, {"fine_tuning": "training patches_per_case: 24 -> 48"}),
        ("test#settings#overlap", 0.25, {"fine_tuning": "evaluating overlap: 0.5 -> 0.25"}),
        ("pretraining#settings#num_workers", 3, {}),
        ("fine_tuning#settings#checkpoint_interval", 1, {}),
    ],
)
def test_settings_that_change_a_result_are_named(tmp_path, name, value, expected):
    before = prints_of(make_study(tmp_path, labelled_cases=[3], seeds=[0]))
    after = prints_of(make_study(tmp_path, {name: value}, labelled_cases=[3], seeds=[0]))
    wanted = {}
    if "pretraining" in expected:
        wanted["pretraining/PGL/seed_0"] = [expected["pretraining"]]
        wanted["fine_tuning/PGL/3_cases/seed_0"] = ["the encoder that it starts from"]
    if "fine_tuning" in expected:
        wanted = {f"fine_tuning/{method}/3_cases/seed_0": [expected["fine_tuning"]] for method in ("random", "PGL")}
    assert changes(before, after) == wanted


def test_comments_of_a_config_do_not_count_and_values_do(tmp_path):
    shutil.copytree(ROOT / "bundles", tmp_path / "bundles")
    path, configs = write_study(tmp_path), tmp_path / "bundles" / "pgl_pretrain" / "configs"
    prints = [prints_of(Study(path, tmp_path / "runs", tmp_path / "bundles"))]
    for file, old, new in (
        ("small.yaml", "# Many pairs", "# More pairs"),
        ("train.json", '"_desc_data": "', '"_desc_data": "pgl_ext.losses: '),
        ("small.yaml", "base_momentum: 0.98", "base_momentum: 0.97"),
    ):
        config = configs / file
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
        prints.append(prints_of(Study(path, tmp_path / "runs", tmp_path / "bundles")))
    assert prints[0] == prints[1] == prints[2]
    expected = ["training base_momentum: 0.98 -> 0.97"]
    assert changes(prints[2], prints[3])["pretraining/PGL/seed_0"] == expected


def test_a_scan_that_comes_into_a_folder_counts_and_where_the_folder_lies_does_not(tmp_path):
    def prints(folder: Path) -> dict:
        settings = {"configs": ["train.json"], "settings": {"dataset_dir": str(folder)}}
        return prints_of(Study(write_study(tmp_path, pretraining=settings), tmp_path / "runs"))

    folder = tmp_path / "scans"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.nii").write_bytes(b"1")
    before = prints(folder)
    assert before == prints(folder.rename(tmp_path / "moved"))
    (tmp_path / "moved" / "b.nii").write_bytes(b"1")
    found = changes(before, prints(tmp_path / "moved"))
    assert found["pretraining/PGL/seed_0"] == ["the data for training"]


def test_places_do_not_count_and_contents_do(tmp_path):
    pretraining = other_scans(tmp_path)
    path = write_study(tmp_path, test={"cases": 4}, pretraining=pretraining)
    before = prints_of(Study(path, tmp_path / "runs"))
    assert before == prints_of(Study(path, tmp_path / "other" / "runs"))
    for list_ in (tmp_path / "data" / "dataset.json", Path(pretraining["settings"]["data_list_file_path"])):
        list_.write_text(json.dumps(json.loads(list_.read_text()) | {"name": "the same scans"}))
    # Which cases are labelled and tested is written to a list of its own, which is as it was.
    assert changes(before, prints_of(Study(path, tmp_path / "runs"))) == {
        f"pretraining/PGL/seed_{seed}": ["the data for training"] for seed in (0, 1)
    } | {
        f"fine_tuning/PGL/{cases}_cases/seed_{seed}": ["the encoder that it starts from"]
        for seed in (0, 1)
        for cases in (3, 5)
    }


def test_data_may_lie_elsewhere(tmp_path):
    here, there = (
        prints_of(make_study(folder, test={"cases": 4}, pretraining=other_scans(folder)))
        for folder in (tmp_path / "here", tmp_path / "there")
    )
    assert here == there


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (
            "images/case_3.nii.gz",
            {"pretraining/PGL/seed_0": ["training"], "fine_tuning/random/3_cases/seed_0": ["training"]},
        ),
        ("labels/case_3.nii.gz", {"fine_tuning/random/3_cases/seed_0": ["training"]}),
        ("labels/case_11.nii.gz", {"fine_tuning/random/3_cases/seed_0": ["evaluating"]}),
        ("images/case_20.nii.gz", {}),
    ],
)
def test_scans_and_label_maps_that_are_replaced_count(tmp_path, file, expected):
    """The study's lists have cases 0 to 9 for training, 10 to 13 for testing."""
    path = write_study(tmp_path)
    before = prints_of(Study(path, tmp_path / "runs"))
    (tmp_path / "data" / file).write_bytes(b"corrected")
    _sizes_digest.cache_clear()  # as in another process
    found = changes(before, prints_of(Study(path, tmp_path / "runs")))
    runs = ("pretraining/PGL/seed_0", "fine_tuning/random/3_cases/seed_0")
    assert {name: found[name] for name in runs if name in found} == {
        name: [f"the data for {command}" for command in commands] for name, commands in expected.items()
    }


def test_another_encoder_file_counts(tmp_path):
    (tmp_path / "encoder.pt").write_bytes(b"weights")
    study = make_study(tmp_path, methods={"random": {"encoder": str(tmp_path / "encoder.pt")}})
    before = prints_of(study)
    (tmp_path / "encoder.pt").write_bytes(b"others")
    assert set(map(tuple, changes(before, prints_of(study)).values())) == {("the encoder that it starts from",)}


# --- the check ------------------------------------------------------------------------------------------------------


def test_runs_of_another_version_are_listed(tmp_path, monkeypatch):
    code = {"pgl_ext.losses": "old"}
    monkeypatch.setattr("pgl_ext.tools.study.fingerprint.code_digests", lambda _: dict(code))
    study = make_study(tmp_path, labelled_cases=[3], seeds=[0])
    runs = study.runs({})
    prints = checked_fingerprints(runs)  # none was started
    for run in runs[:2]:
        run.folder.mkdir(parents=True)
        run.start(prints[run.name], 1)
    assert checked_fingerprints(runs) == prints
    code["pgl_ext.losses"] = "new"
    with pytest.raises(ValueError, match="these runs were started with other code or settings") as caught:
        checked_fingerprints(runs)
    message = str(caught.value)
    assert "  fine_tuning/random/3_cases/seed_0\n  pretraining/PGL/seed_0\n    code of pgl_ext.losses\n" in message
    assert "another --out" in message
    assert "fine_tuning/PGL" not in message


def test_versions_are_named():
    same = {"code": {}, "settings": {}, "data": {}, "encoder": None}
    before, now = ({**same, "versions": {"torch": version, "device": "CPU"}} for version in ("2.12.0", "2.13.0"))
    assert differences(before, now) == ["torch: '2.12.0' -> '2.13.0'"]
    assert differences(before, before) == []


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"pgl_ext.losses": "a", "pgl_ext.methods.new": "b"}, []),
        ({"pgl_ext.losses": "b", "pgl_ext.methods.new": "b"}, ["code of pgl_ext.losses"]),
        ({}, ["code of pgl_ext.losses"]),
    ],
)
def test_a_new_module_alone_changes_nothing(now, expected):
    same = {"versions": {}, "settings": {}, "data": {}, "encoder": None}
    assert differences({**same, "code": {"pgl_ext.losses": "a"}}, {**same, "code": now}) == expected
