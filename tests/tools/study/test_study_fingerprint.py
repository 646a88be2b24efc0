from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from made_studies import make_study, write_study
from programs import ROOT

import pgl_ext
from pgl_ext.tools.study.fingerprint import _sizes_digest, check_cells, code_digests, differences, fingerprint
from pgl_ext.tools.study.plan import read_study

MODULE = '''
"""About the module."""

def area(side):
    """Of a square."""
    return side * side
'''


@pytest.fixture
def package(tmp_path) -> Path:
    for name in ("losses.py", "methods/pgl.py", "figures/curves.py", "study/plan.py", "report.py", "__main__.py"):
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_text(MODULE)
    return tmp_path / "package"


def prints_of(study) -> dict[str, dict]:
    return {cell.name: fingerprint(cell, {}) for cell in study.cells({})}


def changes(before, after) -> dict[str, list[str]]:
    """What differs, of the cells of which something does."""
    found = {name: differences(before[name], after[name]) for name in before}
    return {name: texts for name, texts in found.items() if texts}


# --- code -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("side * side", "side * side  # not a cube", True),
        ('"""Of a square."""', '"""The area of a square."""', True),
        ('"""About the module."""', "", True),
        ("return side * side", "return (\n        side * side\n    )", True),
        ("side * side", "side * side * 1.0", False),
        ("def area(side)", "def area(side=1)", False),
        ("side", "edge", False),
    ],
)
def test_code_counts_and_words_do_not(package, old, new, same):
    before = code_digests(package)
    (package / "losses.py").write_text(MODULE.replace(old, new))
    after = code_digests(package)
    assert (after == before) is same
    assert after["methods/pgl.py"] == before["methods/pgl.py"]


def test_what_only_draws_or_reports_does_not_count(package):
    assert set(code_digests(package)) == {"losses.py", "methods/pgl.py"}


def test_of_this_package():
    digests = code_digests()
    assert {"losses.py", "metrics.py", "methods/pgl.py", "data/cases.py", "evaluation.py"} <= set(digests)
    folder = Path(pgl_ext.__file__).parent
    others = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")} - set(digests)
    assert {name.split("/")[0] for name in others} == {
        *("figures", "probes", "study", "__main__.py", "compare.py", "dicom_seg.py", "errors.py", "feature_maps.py"),
        *("packaging.py", "point_similarity.py", "report.py", "segment.py", "summary.py", "task_config.py"),
        "tracking.py",
    }


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
    path, config = write_study(tmp_path), tmp_path / "bundles" / "pgl_pretrain" / "configs" / "small.yaml"
    prints = [prints_of(read_study(path, tmp_path / "runs", tmp_path / "bundles"))]
    for old, new in (("# Many pairs", "# More pairs"), ("base_momentum: 0.98", "base_momentum: 0.97")):
        config.write_text(config.read_text().replace(old, new))
        prints.append(prints_of(read_study(path, tmp_path / "runs", tmp_path / "bundles")))
    assert prints[0] == prints[1]
    expected = ["training base_momentum: 0.98 -> 0.97"]
    assert changes(prints[1], prints[2])["pretraining/PGL/seed_0"] == expected


def test_a_scan_that_comes_into_a_folder_counts_and_where_the_folder_lies_does_not(tmp_path):
    def prints(folder: Path) -> dict:
        settings = {"configs": ["train.json"], "settings": {"dataset_dir": str(folder)}}
        return prints_of(read_study(write_study(tmp_path, pretraining=settings), tmp_path / "runs"))

    folder = tmp_path / "scans"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.nii").write_bytes(b"1")
    before = prints(folder)
    assert before == prints(folder.rename(tmp_path / "moved"))
    (tmp_path / "moved" / "b.nii").write_bytes(b"1")
    found = changes(before, prints(tmp_path / "moved"))
    assert found["pretraining/PGL/seed_0"] == ["the data for training"]


def test_places_do_not_count_and_contents_do(tmp_path):
    path, data = write_study(tmp_path, test={"cases": 4}), tmp_path / "data" / "dataset.json"
    before = prints_of(read_study(path, tmp_path / "runs"))
    assert before == prints_of(read_study(path, tmp_path / "other" / "runs"))
    data.write_text(json.dumps(json.loads(data.read_text()) | {"name": "the same scans"}))
    # Which cases are labelled and tested is written to a list of its own, which is as it was.
    assert changes(before, prints_of(read_study(path, tmp_path / "runs"))) == {
        f"pretraining/PGL/seed_{seed}": ["the data for training"] for seed in (0, 1)
    } | {
        f"fine_tuning/PGL/{cases}_cases/seed_{seed}": ["the encoder that it starts from"]
        for seed in (0, 1)
        for cases in (3, 5)
    }


def test_data_may_lie_elsewhere(tmp_path):
    here, there = (prints_of(make_study(tmp_path / place, test={"cases": 4})) for place in ("here", "there"))
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
    before = prints_of(read_study(path, tmp_path / "runs"))
    (tmp_path / "data" / file).write_bytes(b"corrected")
    _sizes_digest.cache_clear()  # as in another process
    found = changes(before, prints_of(read_study(path, tmp_path / "runs")))
    cells = ("pretraining/PGL/seed_0", "fine_tuning/random/3_cases/seed_0")
    assert {name: found[name] for name in cells if name in found} == {
        name: [f"the data for {command}" for command in commands] for name, commands in expected.items()
    }


def test_another_encoder_file_counts(tmp_path):
    (tmp_path / "encoder.pt").write_bytes(b"weights")
    study = make_study(tmp_path, methods={"random": {"encoder": str(tmp_path / "encoder.pt")}})
    before = prints_of(study)
    (tmp_path / "encoder.pt").write_bytes(b"others")
    assert set(map(tuple, changes(before, prints_of(study)).values())) == {("the encoder that it starts from",)}


# --- the check ------------------------------------------------------------------------------------------------------


def test_cells_of_another_version_are_listed(tmp_path):
    study = make_study(tmp_path, labelled_cases=[3], seeds=[0])
    cells = study.cells({})
    prints = {cell.name: fingerprint(cell, {"losses.py": "new"}) for cell in cells}
    check_cells(cells, prints)  # none was started
    for cell in cells[:2]:
        cell.folder.mkdir(parents=True)
        cell.start({**prints[cell.name], "code": {"losses.py": "old"}}, 1)
    with pytest.raises(ValueError, match="these cells were started with other code or settings") as caught:
        check_cells(cells, prints)
    message = str(caught.value)
    assert "  fine_tuning/random/3_cases/seed_0\n  pretraining/PGL/seed_0\n    code of losses.py" in message
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
        ({"losses.py": "a", "methods/new.py": "b"}, []),
        ({"losses.py": "b", "methods/new.py": "b"}, ["code of losses.py"]),
        ({}, ["code of losses.py"]),
    ],
)
def test_a_new_module_alone_changes_nothing(now, expected):
    same = {"versions": {}, "settings": {}, "data": {}, "encoder": None}
    assert differences({**same, "code": {"losses.py": "a"}}, {**same, "code": now}) == expected
