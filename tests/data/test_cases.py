import itertools
import json
import logging
import os
import random
from pathlib import Path

import nibabel
import numpy as np
import pytest
from monai.transforms import Compose, ConcatItemsd

from pgl_ext.data import cache as cache_module
from pgl_ext.data.cache import VolumeCache
from pgl_ext.data.datalist import item_name, labelled_items
from pgl_ext.data.find import find_cases
from pgl_ext.data.prepare import prepare_cases
from pgl_ext.data.split import split_cases
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms import LoadVolumed
from pgl_ext.transforms.checks import BadVolumesError

TASK = SegmentationTask({"liver": [1], "spleen": [2]})


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def write_list(path: Path, entries: list, key: str = "training") -> Path:
    path.write_text(json.dumps({"name": "x", key: entries}))
    return path


class TestLabelledItems:
    def test_paths_start_from_the_list_or_the_folder(self, tmp_path):
        touch(tmp_path, "lists/images/a.nii", "data/images/a.nii")
        entries = [{"image": "./images/a.nii", "label": "labels/a.nii", "task": "x"}]
        path = write_list(tmp_path / "lists" / "l.json", entries)
        for folder, dataset_dir in (("lists", None), ("data", tmp_path / "data")):
            root = tmp_path / folder
            expected = {"image": str(root / "images/a.nii"), "label": str(root / "labels/a.nii")}
            assert labelled_items(path, dataset_dir) == [expected]

    def test_series_uid_and_key(self, tmp_path):
        touch(tmp_path, "a/0.dcm")
        entry = {"image": str(tmp_path / "a"), "label": "/labels/a.nii", "series_uid": "1.2"}
        assert labelled_items(write_list(tmp_path / "l.json", [entry], "test"), key="test") == [entry]

    def test_annotated_organs(self, tmp_path):
        touch(tmp_path, "a.nii", "b.nii")
        entries = [
            {"image": "a.nii", "label": "la.nii", "contoured": ["liver"]},
            {"image": "b.nii", "label": "lb.nii", "annotated": []},
        ]
        path = write_list(tmp_path / "l.json", entries)
        assert [case["annotated"] for case in labelled_items(path, annotated_key="contoured")] == [["liver"], []]
        assert all("annotated" not in case for case in labelled_items(path))

    def test_several_lists(self, tmp_path):
        touch(tmp_path, "x/a.nii", "y/a.nii")
        lists = [write_list(tmp_path / name / "l.json", [{"image": "a.nii", "label": "la.nii"}]) for name in ("x", "y")]
        expected = [
            {"image": str(tmp_path / name / "a.nii"), "label": str(tmp_path / name / "la.nii")} for name in ("x", "y")
        ]
        assert labelled_items([str(path) for path in lists]) == expected
        assert labelled_items(lists[:1]) == labelled_items(lists[0]) == expected[:1]
        with pytest.raises(ValueError, match="more than once"):
            labelled_items([*lists, lists[1]])

    def test_all_bad_entries_are_named_at_once(self, tmp_path):
        touch(tmp_path, "a.nii")
        entries = [
            "a.nii",
            {"image": "b.nii"},
            {"image": "c.nii", "label": ["x.nii"], "organs": []},
            {"image": "d.nii", "label": "ld.nii", "organs": "liver"},
            {"image": "e.nii", "label": "le.nii", "organs": ["liver"]},
        ]
        path = write_list(tmp_path / "l.json", entries)
        with pytest.raises(ValueError, match="3 entries") as error:
            labelled_items(path)
        assert all(name in str(error.value) for name in ("a.nii", "b.nii", "c.nii", str(path), "'label'"))
        assert "d.nii" not in str(error.value)
        with pytest.raises(ValueError, match=r"d\.nii has no list of organ names under 'organs': 'liver'"):
            labelled_items(path, annotated_key="organs")


class TestFindCases:
    @pytest.mark.parametrize("suffix", ["Tr", ""])
    def test_pairs_of_the_same_name(self, tmp_path, suffix):
        names = ["b.nii.gz", "site/a.nii.gz", "c.v1.nii"]
        touch(tmp_path, *(f"{kind}{suffix}/{name}" for kind in ("images", "labels") for name in names))
        touch(tmp_path, f"labels{suffix}/.hidden.nii", f"labels{suffix}/notes.txt", "imagesTs/x.nii", "dataset.json")
        expected = [[str(tmp_path / f"{kind}{suffix}" / name) for kind in ("images", "labels")] for name in names]
        assert [[case["image"], case["label"]] for case in find_cases(tmp_path)] == sorted(expected)

    def test_folders_that_are_linked(self, tmp_path):
        for folder in ("images", "labels"):
            touch(tmp_path / "elsewhere", f"{folder}/a.nii")
            (tmp_path / "data" / folder).mkdir(parents=True)
            (tmp_path / "data" / folder / "site").symlink_to(tmp_path / "elsewhere" / folder)
        # Not a label map: editors leave such copies.
        touch(tmp_path / "data", "labels/.ipynb_checkpoints/b.nii")
        (case,) = find_cases(tmp_path / "data")
        assert case == {
            folder[:-1]: str(tmp_path / "data" / folder / "site" / "a.nii") for folder in ("images", "labels")
        }

    def test_nnunet_names_other_file_types_and_dots(self, tmp_path):
        touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTr/b_0000.nii", "labelsTr/b_0000.mha")
        touch(tmp_path, "imagesTr/c.nrrd", "labelsTr/c.seg.nrrd")
        labels = [os.path.basename(case["label"]) for case in find_cases(tmp_path)]
        assert labels == ["a.nii.gz", "b_0000.mha", "c.seg.nrrd"]

    def test_a_folder_with_a_dicom_series(self, tmp_path, monkeypatch):
        touch(tmp_path, "images/pat.1/0.dcm", "labels/pat.1.nii.gz")
        item = {"image": str(tmp_path / "images/pat.1"), "series_uid": "1.2"}
        monkeypatch.setattr("pgl_ext.data.cases.find_volumes", lambda folder: [item])
        assert find_cases(tmp_path) == [{**item, "label": str(tmp_path / "labels/pat.1.nii.gz")}]

    def test_all_left_over_files_are_named_at_once(self, tmp_path):
        touch(tmp_path, "images/a.nii", "images/b.nii", "labels/b.nii", "labels/c.nii", "labels/b.nii.gz")
        touch(tmp_path, "images/d.nii", "images/d_0000.nii", "labels/d.nii", "images/e_0001.nii")
        with pytest.raises(ValueError, match="5 files") as error:
            find_cases(tmp_path)
        for line in (
            "images/a.nii has no label map",
            "images/e_0001.nii has no label map",
            "labels/c.nii has no image",
            "labels/b.nii.gz has the name of",
            "labels/d.nii belongs to both",
        ):
            assert line in str(error.value)

    def test_no_such_folders(self, tmp_path):
        touch(tmp_path, "imagesTr/a.nii")
        with pytest.raises(ValueError, match="neither imagesTr and labelsTr nor images and labels"):
            find_cases(tmp_path)


def cases(count: int) -> list[dict]:
    return [{"image": f"/d/{n:03}.nii", "label": f"/l/{n:03}.nii"} for n in range(count)]


def names(part: list[dict]) -> set[str]:
    return {item_name(case) for case in part}


def sizes(split: dict[str, list[dict]]) -> list[int]:
    return [len(split[part]) for part in ("training", "validation", "test", "unused")]


class TestSplitCases:
    @pytest.mark.parametrize(
        ("count", "settings", "expected"),
        [
            # The paper's splits: half for testing, a fifth of the training half for validation.
            (131, {"test_cases": 65}, [53, 13, 65, 0]),
            (30, {"test_cases": 15}, [12, 3, 15, 0]),
            (30, {"test_cases": 15, "label_fraction": 0.2}, [2, 1, 15, 12]),
            (30, {"test_cases": 15, "label_fraction": 0.5}, [6, 2, 15, 7]),
            (70, {"labelled_cases": 7, "label_fraction": 0.9}, [6, 1, 0, 63]),
            (70, {"labelled_cases": 1}, [1, 1, 0, 69]),
            (70, {"label_fraction": 0.001}, [1, 1, 0, 68]),
            (2, {"test_cases": 1, "label_fraction": 0.1}, [1, 1, 1, 0]),
            (10, {"validation_fraction": 0.99}, [1, 9, 0, 0]),
            (10, {"validation_fraction": 0.01}, [9, 1, 0, 0]),
            (10, {"validation_fraction": 0}, [10, 0, 0, 0]),
        ],
    )
    def test_sizes(self, count, settings, expected):
        assert sizes(split_cases(cases(count), **settings)) == expected

    @pytest.mark.parametrize("settings", [{}, {"test_cases": 11, "label_fraction": 0.3}])
    def test_each_case_is_in_one_part(self, settings):
        split = split_cases(cases(40), **settings)
        assert sorted(itertools.chain(*split.values()), key=item_name) == cases(40)
        assert all(part == sorted(part, key=item_name) for part in split.values())

    def test_depends_on_the_seed_and_not_on_the_order(self):
        settings = {"test_cases": 9, "label_fraction": 0.5}
        shuffled = random.Random(1).sample(cases(40), 40)
        assert split_cases(shuffled, seed=3, **settings) == split_cases(cases(40), seed=3, **settings)
        assert len({str(split_cases(cases(40), seed=seed, **settings)) for seed in range(5)}) == 5

    @pytest.mark.parametrize("fraction", [0.05, 0.2, 0.35, 0.5, 0.8, 0.97])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_smaller_shares_are_contained_in_larger_ones(self, fraction, seed):
        settings = {"test_cases": 20, "validation_fraction": fraction, "seed": seed}
        splits = [split_cases(cases(83), labelled_cases=count, **settings) for count in range(2, 64)]
        for smaller, larger in itertools.pairwise(splits):
            assert smaller["test"] == larger["test"]
            for part in ("training", "validation"):
                assert names(smaller[part]) <= names(larger[part])
                assert smaller[part]
            count = len(larger["training"]) + len(larger["validation"])
            assert len(larger["validation"]) == min(max(1, round(fraction * count)), count - 1)

    def test_the_first_cases_of_a_list_are_not_preferred(self):
        means = [
            np.mean([int(Path(name).stem) for name in names(split_cases(cases(50), 10, seed=seed)[part])])
            for part in ("training", "validation", "test")
            for seed in range(30)
        ]
        assert abs(np.mean(means) - 24.5) < 1.5

    def test_a_single_case_serves_as_both(self, caplog):
        split = split_cases(cases(1))
        assert split["training"] == split["validation"] == cases(1)
        assert "/d/000.nii" in caplog.text

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"test_cases": 5}, "got 5 of 5 cases"),
            ({"test_cases": -1}, "got -1 of 5"),
            ({"label_fraction": 0}, r"\(0, 1\], got 0"),
            ({"label_fraction": 20}, r"\(0, 1\], got 20"),
            ({"labelled_cases": 4, "test_cases": 2}, "from 1 to 3, the 5 cases less 2 for testing, got 4"),
            ({"labelled_cases": 0}, "got 0"),
            ({"validation_fraction": 1}, r"\[0, 1\)"),
        ],
    )
    def test_impossible_splits(self, settings, message):
        with pytest.raises(ValueError, match=message):
            split_cases(cases(5), **settings)


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


@pytest.fixture
def case_cache(tmp_path) -> VolumeCache:
    keys = ["image", "label"]
    return VolumeCache(tmp_path / "cache", Compose([LoadVolumed(keys), ConcatItemsd(keys, "image", dim=0)]))


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
        keys = ["image", "label"]
        caches = [
            VolumeCache(tmp_path / f"cache{rank}", Compose([LoadVolumed(keys), ConcatItemsd(keys, "image", dim=0)]))
            for rank in range(2)
        ]
        cases = find_cases(folder)
        split = split_cases(cases)
        in_use = split["training"] + split["validation"]
        bad = [caches[rank].prepare(in_use[rank::2]) for rank in range(2)]

        def gather(gathered: list, mine: dict) -> None:
            gathered[:] = bad

        monkeypatch.setattr(cache_module.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(cache_module.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(cache_module.dist, "all_gather_object", gather)
        results = []
        for rank in (1, 0):
            path = tmp_path / f"split{rank}.json"
            monkeypatch.setattr(cache_module.dist, "get_rank", lambda rank=rank: rank)
            results.append(prepare_cases(caches[rank], TASK, str(folder), skip_bad_files=True, split_path=str(path)))
            assert path.exists() == (rank == 0)
            files = len(list(caches[rank].cache_dir.iterdir()))
            assert files == len(in_use[rank::2]) - len(bad[rank])
        assert results[0] == results[1]
        assert sum(map(len, results[0].values())) == 8
