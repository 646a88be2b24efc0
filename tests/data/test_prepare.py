import itertools
import json
import logging
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from made_files import touch, write_list
from monai.transforms import Compose, ConcatItemsd, Lambdad

from pgl_ext import distributed
from pgl_ext.data.cache import VolumeCache
from pgl_ext.data.datalist import labelled_items
from pgl_ext.data.dataset import VolumeDataset
from pgl_ext.data.find import find_cases
from pgl_ext.data.prepare import (
    cases_of_models,
    check_items,
    evaluation_cases,
    prepare_cases,
    prepare_volumes,
    resolve_bad,
)
from pgl_ext.data.split import split_cases
from pgl_ext.errors import transform_error
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms import LoadVolumed, RandOverlappingViewsd, loading
from pgl_ext.transforms.checks import BadVolumesError
from pgl_ext.transforms.volumes import Preprocessing

TASK = SegmentationTask({"liver": [1], "spleen": [2]})


SHAPE = (12, 10, 8)


def save(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten cases in imagesTr and labelsTr."""
    rng = np.random.default_rng(0)
    for number in range(10):
        save(tmp_path / f"data/imagesTr/c{number}.nii", rng.normal(size=SHAPE).astype(np.float32))
        save(tmp_path / f"data/labelsTr/c{number}.nii", rng.integers(0, 3, SHAPE, dtype=np.uint8))
    return tmp_path / "data"


def load_both() -> Preprocessing:
    keys = ["image", "label"]
    return Preprocessing([LoadVolumed(keys), ConcatItemsd(keys, "image", dim=0)], {})


@pytest.fixture
def case_cache(tmp_path) -> VolumeCache:
    return VolumeCache(tmp_path / "cache", load_both())


class TestPrepareCases:
    def test_only_cases_in_use_are_cached(self, folder, case_cache):
        parts = prepare_cases(case_cache, TASK, str(folder), test_cases=3, labelled_cases=4)
        assert {name: len(part) for name, part in parts.items()} == {"training": 3, "validation": 1}
        assert len(list(case_cache.cache_dir.iterdir())) == 4
        volume = case_cache.open(parts["training"][0])
        label = nibabel.load(parts["training"][0]["label"]).get_fdata()
        assert volume.shape == (2, *SHAPE)
        np.testing.assert_array_equal(volume[1], label)

    def test_the_split_is_a_data_list(self, folder, case_cache, tmp_path):
        path = tmp_path / "out" / "split.json"
        settings = {"test_cases": 3, "labelled_cases": 5, "seed": 7}
        parts = prepare_cases(case_cache, TASK, str(folder), split_path=str(path), **settings)
        for key in ("training", "validation"):
            assert labelled_items(path, key=key) == parts[key]
        assert len(labelled_items(path, key="test")) == 3
        assert len(labelled_items(path, key="unused")) == 2
        content = json.loads(path.read_text())
        assert {**settings, "label_fraction": 1.0, "validation_fraction": 0.2}.items() <= content.items()
        assert [p.name for p in path.parent.iterdir()] == ["split.json"]

    def test_an_existing_split_is_used_and_never_overwritten(self, folder, case_cache, tmp_path):
        path = tmp_path / "split.json"
        prepare_cases(case_cache, TASK, str(folder), split_path=str(path), test_cases=3)
        content = json.loads(path.read_text())
        content["training"][0], content["test"][0] = content["test"][0], content["training"][0]
        path.write_text(json.dumps(content))
        before = path.read_bytes()
        parts = prepare_cases(case_cache, TASK, str(folder), split_path=str(path), test_cases=3)
        assert parts["training"] == content["training"]
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seed": 1}, "seed was 0 and is 1"),
            ({"test_cases": 2, "label_fraction": 0.5}, r"label_fraction was 1.0 and is 0.5; test_cases was 3 and is 2"),
            ({"labelled_cases": 3}, "labelled_cases was None and is 3"),
            ({"validation_fraction": 0.4}, "validation_fraction was 0.2 and is 0.4"),
        ],
    )
    def test_a_split_with_other_settings_is_refused(self, folder, case_cache, tmp_path, change, message):
        path = tmp_path / "split.json"
        prepare_cases(case_cache, TASK, str(folder), split_path=str(path), test_cases=3)
        before = path.read_bytes()
        with pytest.raises(ValueError, match=message) as error:
            prepare_cases(case_cache, TASK, str(folder), split_path=str(path), **{"test_cases": 3, **change})
        assert all(word in str(error.value) for word in (str(path), "--output_dir", "remove the file"))
        assert path.read_bytes() == before

    def test_a_split_of_other_cases_is_refused(self, folder, case_cache, tmp_path):
        path = tmp_path / "split.json"
        prepare_cases(case_cache, TASK, str(folder), split_path=str(path))
        for kind in ("imagesTr", "labelsTr"):
            (folder / kind / "c3.nii").rename(folder / kind / "new.nii")
        with pytest.raises(ValueError, match=r"1 cases are there no more.*c3\.nii; 1 cases are new.*new\.nii"):
            prepare_cases(case_cache, TASK, str(folder), split_path=str(path))

    @pytest.mark.parametrize("content", ["", "[]", '{"training": []}', '{"training": [1]}'])
    def test_a_file_that_is_no_split_is_refused(self, folder, case_cache, tmp_path, content):
        path = tmp_path / "split.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"split\.json is not a split"):
            prepare_cases(case_cache, TASK, str(folder), split_path=str(path))
        assert path.read_text() == content

    def test_all_bad_cases_are_named_at_once_and_nothing_is_written(self, folder, case_cache, tmp_path):
        (folder / "imagesTr/c1.nii").write_bytes(b"x")
        (folder / "labelsTr/c2.nii").write_bytes(b"x")
        path = tmp_path / "split.json"
        entries = [{"image": f"imagesTr/c{n}.nii", "label": f"labelsTr/c{n}.nii"} for n in range(5)]
        entries[4]["label"] = "labelsTr/missing.nii"
        data_list = write_list(folder / "list.json", entries)
        with pytest.raises(BadVolumesError, match="3 of 5") as error:
            prepare_cases(case_cache, TASK, data_list_file_path=str(data_list), split_path=str(path))
        for name in ("imagesTr/c1.nii", "labelsTr/c2.nii", "labelsTr/missing.nii does not exist"):
            assert name in str(error.value)
        assert not path.exists()

    def test_bad_cases_can_be_left_out(self, folder, case_cache, tmp_path):
        (folder / "labelsTr/c2.nii").write_bytes(b"x")
        paths = {"split_path": str(tmp_path / "split.json"), "report_path": str(tmp_path / "skipped.txt")}
        for _ in range(2):  # the second time as in a resumed run
            parts = prepare_cases(case_cache, TASK, str(folder), skip_bad_files=True, **paths)
            assert sum(map(len, parts.values())) == 9
            assert "labelsTr/c2.nii" in (tmp_path / "skipped.txt").read_text()

    def test_no_good_case_left_to_validate_on(self, folder, case_cache):
        held_out = split_cases(find_cases(folder))["validation"]
        for case in held_out:
            Path(case["label"]).write_bytes(b"x")
        with pytest.raises(ValueError, match="none of the 2 cases for validation"):
            prepare_cases(case_cache, TASK, str(folder), skip_bad_files=True)

    def test_the_folder_s_dataset_json_is_taken(self, folder, case_cache, caplog):
        entries = [{"image": f"imagesTr/c{n}.nii", "label": f"labelsTr/c{n}.nii"} for n in range(4)]
        write_list(folder / "dataset.json", entries)
        with caplog.at_level(logging.INFO):
            parts = prepare_cases(case_cache, TASK, str(folder))
        assert sum(map(len, parts.values())) == 4
        assert "dataset.json" in caplog.text

    def test_a_dataset_json_without_lists_is_not(self, folder, case_cache):
        (folder / "dataset.json").write_text('{"labels": {"background": 0}, "numTraining": 10, "file_ending": ".nii"}')
        assert sum(map(len, prepare_cases(case_cache, TASK, str(folder)).values())) == 10

    def test_repeated_images_are_refused(self, folder, case_cache):
        entries = [{"image": "imagesTr/c0.nii", "label": f"labelsTr/c{n}.nii"} for n in range(3)]
        with pytest.raises(ValueError, match=r"1 scans .*more than once.*c0\.nii"):
            prepare_cases(case_cache, TASK, data_list_file_path=str(write_list(folder / "l.json", entries)))

    def test_several_data_lists(self, folder, case_cache):
        lists = []
        for name, numbers in (("first", range(4)), ("second", range(4, 7))):
            entries = [{"image": f"imagesTr/c{n}.nii", "label": f"labelsTr/c{n}.nii"} for n in numbers]
            lists.append(str(write_list(folder / f"{name}.json", entries)))
        parts = prepare_cases(case_cache, TASK, data_list_file_path=lists)
        images = [case["image"] for part in parts.values() for case in part]
        assert sorted(images) == [str(folder / f"imagesTr/c{n}.nii") for n in range(7)]
        for case in itertools.chain(*parts.values()):
            assert case["label"] == case["image"].replace("imagesTr", "labelsTr")

    def test_names_of_annotated_organs_must_be_the_task_s(self, folder, case_cache, caplog):
        def prepare(organs: list[list[str]], multi_label: bool = True) -> dict:
            task = SegmentationTask(TASK.organs, multi_label=multi_label)
            entries = [
                {"image": f"imagesTr/c{n}.nii", "label": f"labelsTr/c{n}.nii", "organs": names}
                for n, names in enumerate(organs)
            ]
            path = write_list(folder / "l.json", entries)
            return prepare_cases(case_cache, task, data_list_file_path=str(path), annotated_key="organs")

        parts = prepare([["liver", "kidney"], ["liver", "spleen"]] * 3)
        assert {tuple(case["annotated"]) for case in parts["training"]} == {("liver", "kidney"), ("liver", "spleen")}
        assert not caplog.records
        with pytest.raises(ValueError, match=r"\['spleen'\] are annotated in no case.*'Spleen', 'liver'"):
            prepare([["liver", "Spleen"]] * 4)
        with pytest.raises(ValueError, match=r"training cases, such as .* \(spleen there\).*set multi_label to true"):
            prepare([["liver", "kidney"], ["liver", "spleen"]] * 3, multi_label=False)
        held_out = next(os.path.basename(case["image"]) for case in parts["validation"])
        prepare([["liver", "spleen"] if f"c{n}.nii" == held_out else ["liver"] for n in range(6)])
        assert "['spleen'] are annotated in no training case" in caplog.text

    def test_folders_cannot_say_what_is_annotated(self, folder, case_cache):
        with pytest.raises(ValueError, match="--data_list_file_path"):
            prepare_cases(case_cache, TASK, str(folder), annotated_key="organs")

    def test_no_data_given(self, case_cache):
        with pytest.raises(ValueError, match=r"--dataset_dir .*--data_list_file_path"):
            prepare_cases(case_cache, TASK)

    def test_each_process_prepares_its_share_and_the_first_one_writes(self, folder, tmp_path, monkeypatch):
        """Two processes in turn: the exchange between them is played by the test."""
        (folder / "labelsTr/c2.nii").write_bytes(b"x")
        (folder / "labelsTr/c7.nii").write_bytes(b"x")
        caches = [VolumeCache(tmp_path / f"cache{rank}", load_both()) for rank in range(2)]
        cases = find_cases(folder)
        split = split_cases(cases)
        in_use = split["training"] + split["validation"]
        bad = [caches[rank].prepare(in_use[rank::2]) for rank in range(2)]

        def gather(gathered: list, mine: dict, group: object) -> None:
            gathered[:] = bad

        monkeypatch.setattr(distributed.dist, "new_group", lambda **_: object())
        monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda _: None)
        monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
        results = []
        for rank in (1, 0):
            path = tmp_path / f"split{rank}.json"
            monkeypatch.setattr(distributed.dist, "get_rank", lambda rank=rank: rank)
            results.append(prepare_cases(caches[rank], TASK, str(folder), skip_bad_files=True, split_path=str(path)))
            assert path.exists() == (rank == 0)
            files = len(list(caches[rank].cache_dir.iterdir()))
            assert files == len(in_use[rank::2]) - len(bad[rank])
        assert results[0] == results[1]
        assert sum(map(len, results[0].values())) == 8


class TestPrepareVolumes:
    def test_from_a_folder(self, volumes, cache):
        parts = prepare_volumes(cache, str(Path(volumes[0]["image"]).parent), validation_fraction=0.4)
        assert set(parts) == {"training", "validation"}
        assert [len(parts["training"]), len(parts["validation"])] == [3, 2]
        assert sorted(i["image"] for part in parts.values() for i in part) == [i["image"] for i in volumes]
        assert len(list(cache.cache_dir.glob("*.b2nd"))) == 5

    def test_from_a_data_list(self, volumes, cache, tmp_path):
        data_list = tmp_path / "list.json"
        names = [Path(item["image"]).name for item in volumes[:3]]
        data_list.write_text(json.dumps({"pretraining": [{"image": f"volumes/{name}"} for name in names]}))
        parts = prepare_volumes(cache, str(tmp_path), str(data_list), data_list_key="pretraining")
        assert len(parts["training"]) == 2
        assert len(parts["validation"]) == 1

    def test_all_scans_of_a_task_of_the_decathlon(self, volumes, cache, tmp_path):
        """With those without labels, and as the paper trains, without validation."""
        names = [f"volumes/{Path(item['image']).name}" for item in volumes]
        data_list = tmp_path / "dataset.json"
        data_list.write_text(json.dumps({"training": [{"image": name} for name in names[:3]], "test": names[3:]}))
        parts = prepare_volumes(cache, None, str(data_list), ["training", "test"], validation_fraction=0)
        assert [item["image"] for item in parts["training"]] == [item["image"] for item in volumes]
        assert parts["validation"] == []

    def test_from_several_data_lists(self, volumes, cache, tmp_path):
        lists = []
        for name, items in (("liver", volumes[:2]), ("neck", volumes[2:])):
            lists.append(tmp_path / f"{name}.json")
            lists[-1].write_text(json.dumps({"name": name, "training": [item["image"] for item in items]}))
        parts = prepare_volumes(cache, None, [str(path) for path in lists], source_fields=["task"])
        tasks = {item["image"]: item["task"] for part in parts.values() for item in part}
        assert tasks == {item["image"]: "liver" if index < 2 else "neck" for index, item in enumerate(volumes)}

    def test_scans_of_unknown_source_are_named_before_any_is_prepared(self, volumes, cache):
        with pytest.raises(ValueError, match="5 of 5 scans have no 'group'"):
            prepare_volumes(cache, str(Path(volumes[0]["image"]).parent), source_fields=["group"])
        assert not list(cache.cache_dir.glob("*.b2nd"))

    def test_the_seed_chooses_what_is_held_out(self, volumes, cache):
        folder = str(Path(volumes[0]["image"]).parent)
        held_out = [prepare_volumes(cache, folder, seed=seed)["validation"] for seed in [*range(6), 0]]
        assert held_out[0] == held_out[-1]
        assert len({part[0]["image"] for part in held_out}) > 1

    def test_all_bad_files_are_named_at_once(self, volumes, cache):
        self.spoil(volumes)
        with pytest.raises(BadVolumesError) as error:
            prepare_volumes(cache, str(Path(volumes[0]["image"]).parent))
        assert "2 of 5" in str(error.value)
        assert all(volumes[i]["image"] in str(error.value) for i in (1, 3))
        assert "skip_bad_files" in str(error.value)

    def test_bad_files_can_be_left_out(self, volumes, cache, tmp_path):
        self.spoil(volumes)
        report = tmp_path / "output" / "skipped_files.txt"
        folder = str(Path(volumes[0]["image"]).parent)
        parts = prepare_volumes(cache, folder, skip_bad_files=True, report_path=str(report))
        assert sorted(i["image"] for part in parts.values() for i in part) == [volumes[i]["image"] for i in (0, 2, 4)]
        assert [line.split("\t")[0] for line in report.read_text().splitlines()] == [
            volumes[i]["image"] for i in (1, 3)
        ]
        # The dataset that follows reads what is left.
        dataset = VolumeDataset(parts["training"], cache, RandOverlappingViewsd("image", (16, 16, 8)))
        assert [dataset[0, index]["read_errors"] for index in range(len(dataset))] == [0, 0]

    @staticmethod
    def spoil(volumes) -> None:
        Path(volumes[1]["image"]).write_bytes(b"no volume")
        content = Path(volumes[3]["image"]).read_bytes()
        Path(volumes[3]["image"]).write_bytes(content[:5000])


class TestResolveBad:
    def test_no_good_volume_left(self, tmp_path):
        with pytest.raises(BadVolumesError, match="1 of 1"):
            resolve_bad({"a": "reason"}, [{"image": "a"}], skip_bad_files=True, report_path=tmp_path / "report.txt")

    def test_no_bad_volume_no_report(self, tmp_path):
        items = [{"image": "a"}]
        assert resolve_bad({}, items, skip_bad_files=True, report_path=tmp_path / "report.txt") == items
        assert not (tmp_path / "report.txt").exists()


class TestEvaluationCases:
    def test_have_names_of_their_own(self, tmp_path):
        touch(tmp_path, "x/scan.nii", "y/scan.nii")
        entries = [{"image": f"{name}/scan.nii", "label": f"{name}/label.nii", "organs": ["liver"]} for name in "xy"]
        path = write_list(tmp_path / "list.json", entries, "test")
        cases = evaluation_cases(path, data_list_key="test", annotated_key="organs")
        assert [case["name"] for case in cases] == ["x_scan", "y_scan"]
        assert cases[1] == {
            "name": "y_scan",
            "image": str(tmp_path / "y/scan.nii"),
            "label": str(tmp_path / "y/label.nii"),
            "annotated": ["liver"],
        }

    def test_without_a_list_they_are_those_that_training_held_out(self, tmp_path):
        touch(tmp_path, "a.nii", "b.nii")
        parts = {name: [{"image": f"{name}.nii", "label": "l.nii"}] for name in ("a", "b")}
        split = {"training": parts["a"], "validation": parts["a"], "test": parts["b"]}
        (tmp_path / "split.json").write_text(json.dumps(split))
        (case,) = evaluation_cases(None, data_list_key="validation", split_path=tmp_path / "split.json")
        assert case["image"] == str(tmp_path / "b.nii")

    @pytest.mark.parametrize("split", [None, {"test": [], "validation": [{"image": "a.nii", "label": "l.nii"}]}])
    def test_validation_cases_are_never_taken_for_test_cases(self, tmp_path, split):
        if split:
            (tmp_path / "split.json").write_text(json.dumps(split))
        with pytest.raises(ValueError, match="--data_list_file_path"):
            evaluation_cases(None, split_path=tmp_path / "split.json")


class TestCasesOfModels:
    @pytest.fixture
    def models(self, tmp_path) -> list[Path]:
        """Three trainings on scans of one name: two that held out x, and one that held out y and z."""
        touch(tmp_path, *(f"{name}/scan.nii" for name in "xyz"))
        entries = {name: {"image": f"../{name}/scan.nii", "label": f"../{name}/label.nii"} for name in "xyz"}
        for number, held_out in enumerate(("x", "x", "yz")):
            split = {"test": [entries[name] for name in held_out], "training": list(entries.values())}
            (tmp_path / str(number)).mkdir()
            (tmp_path / str(number) / "split.json").write_text(json.dumps(split))
        return [tmp_path / str(number) / "models" / "model.pt" for number in range(3)]

    def test_each_is_scored_by_those_that_held_it_out(self, models, tmp_path):
        cases = cases_of_models(models)
        assert [(case["name"], case["models"]) for case in cases] == [
            ("x_scan", [0, 1]),
            ("y_scan", [2]),
            ("z_scan", [2]),
        ]
        assert [case["image"] for case in cases] == [str(tmp_path / name / "scan.nii") for name in "xyz"]

    def test_those_of_a_list_are_scored_by_all(self, models, tmp_path):
        entries = [{"image": "x/scan.nii", "label": "x/label.nii"}]
        (case,) = cases_of_models(models, write_list(tmp_path / "list.json", entries, "test"))
        assert case["models"] == [0, 1, 2]

    def test_patients_that_were_trained_on_are_named(self, models, tmp_path, caplog):
        for number, patient in enumerate("AAB"):
            path = tmp_path / str(number) / "split.json"
            split = json.loads(path.read_text())
            path.write_text(json.dumps({**split, "training": [{"image": "1.nii", "patient": patient}]}))
        entries = [{"image": "x/scan.nii", "label": "x/label.nii", "patient": "B"}]
        cases_of_models(models, write_list(tmp_path / "list.json", entries, "test"))
        assert caplog.text.count("1 patients have scans in several parts of the split: 1.nii (training)") == 1

    def test_one_that_held_none_out(self, models, tmp_path):
        with pytest.raises(ValueError, match="--data_list_file_path"):
            cases_of_models([*models, tmp_path / "other" / "models" / "model.pt"])


class TestCheckItems:
    @pytest.mark.parametrize("chosen", [[], [1], [0, 1, 2, 3]])
    def test_all_bad_ones_with_their_reasons(self, volumes, chosen):
        content = Path(volumes[0]["image"]).read_bytes()
        Path(volumes[0]["image"]).unlink()
        Path(volumes[1]["image"]).write_bytes(content[:5000])
        save(Path(volumes[2]["image"]), np.full(SHAPE, 7, np.float32))
        Path(volumes[3]["image"]).write_bytes(b"no volume")
        reasons = ["does not exist", "Cannot read", "constant", "Cannot read"]
        bad = check_items([*(volumes[index] for index in chosen), volumes[4]], loading("image"))
        assert list(bad) == [volumes[index]["image"] for index in chosen]
        for index in chosen:
            assert reasons[index] in bad[volumes[index]["image"]]
            assert volumes[index]["image"] in bad[volumes[index]["image"]]

    def test_bad_label_maps(self, folder):
        case = find_cases(folder)[0]
        bad = check_items([case], loading(["image", "label"], SegmentationTask({"liver": [1]})))
        assert "has label values that are not the task's: 2" in bad[case["image"]]

    @pytest.mark.parametrize("error", [TypeError, ValueError, OSError, MemoryError, ImportError])
    @pytest.mark.parametrize("composed", [False, True])
    def test_any_other_error_stops(self, volumes, error, composed):
        def fail(image: object) -> None:
            raise error("of a transform")

        steps = [LoadVolumed("image"), Lambdad("image", fail)]
        transform = Compose(steps) if composed else lambda item: steps[1](steps[0](item))
        with pytest.raises((error, RuntimeError)) as caught:
            check_items(volumes, transform)
        assert isinstance(transform_error(caught.value), error)
        assert str(transform_error(caught.value)) == "of a transform"
