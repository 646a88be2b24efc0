import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest

from pgl_ext.data.datalist import item_name, listed_path, load_datalist, source_names, split_datalist
from pgl_ext.data.find import find_volumes


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def found(root: Path) -> list[str]:
    items = find_volumes(root)
    assert all(set(item) <= {"image", "series_uid"} and os.path.isabs(item["image"]) for item in items)
    return [os.path.relpath(item["image"], root) for item in items]


def write_dicom(path: Path, uid: str, **fields) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    file = pydicom.Dataset()
    file.SOPClassUID, file.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    file.SeriesInstanceUID, file.Modality, file.Rows, file.Columns = uid, "CT", 2, 2
    for name, value in fields.items():
        if value is None:
            delattr(file, name)
        else:
            setattr(file, name, value)
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, file, enforce_file_format=True)


def test_finds_volumes_of_every_file_type_below_the_folder(tmp_path):
    volumes = ["a.nii", "b/c.nii.gz", "b/d/e.nrrd", "f.nhdr", "g.mha", "h.mhd", "i.NII.GZ"]
    touch(tmp_path, *volumes, "f.raw", "h.raw", "x.png", "notes.txt", "dataset.json", ".hidden.nii", "b/._c.nii.gz")
    touch(tmp_path, ".trash/j.nii", "case/Segmentation.seg.nrrd")
    assert found(tmp_path) == sorted(volumes)


@pytest.mark.parametrize("suffix", ["", "Tr", "Ts"])
def test_label_folders_are_left_out_next_to_images(tmp_path, suffix, caplog):
    touch(tmp_path, f"images{suffix}/a.nii.gz", f"labels{suffix}/a.nii.gz", f"labels{suffix}/more/b.nii.gz")
    with caplog.at_level(logging.INFO):
        assert found(tmp_path) == [f"images{suffix}/a.nii.gz"]
    assert "left out 2 label files" in caplog.text


def test_label_folder_without_images_is_searched(tmp_path):
    touch(tmp_path, "labels/a.nii.gz")
    assert found(tmp_path) == ["labels/a.nii.gz"]


def test_linked_folders_are_followed_without_looping(tmp_path):
    touch(tmp_path, "elsewhere/a.nii", "data/b.nii")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert found(tmp_path / "data") == ["b.nii", "link/a.nii"]


def test_dicom_series_in_one_folder(tmp_path):
    for index in range(3):
        write_dicom(tmp_path / f"case/a{index}.dcm", "1.2.3")
        write_dicom(tmp_path / f"case/b{index}.IMA", "1.2.4")
        write_dicom(tmp_path / f"case/1.2.5.{index}", "1.2.5")  # named by UID: the last part is no suffix
        write_dicom(tmp_path / f"case/noise{index}", "1.2.6")
    touch(tmp_path, "case/README", "case/LICENSE.txt", "volume.nii")
    case = str(tmp_path / "case")
    expected = [{"image": case, "series_uid": f"1.2.{n}"} for n in (3, 4, 5, 6)]
    assert find_volumes(tmp_path) == [*expected, {"image": str(tmp_path / "volume.nii")}]


@pytest.mark.parametrize(
    "fields", [{"Modality": "SEG"}, {"Modality": "RTDOSE"}, {"Rows": None}, {"SeriesInstanceUID": None}]
)
def test_dicom_objects_that_are_no_scans_are_left_out(tmp_path, fields):
    write_dicom(tmp_path / "x0.dcm", "1.2.3", **fields)
    write_dicom(tmp_path / "x1.dcm", "1.2.3", **fields)
    write_dicom(tmp_path / "multi_frame.dcm", "1.2.4", NumberOfFrames=20)
    write_dicom(tmp_path / "single_slice.dcm", "1.2.5")
    touch(tmp_path, "garbage.dcm")
    assert find_volumes(tmp_path) == [{"image": str(tmp_path), "series_uid": "1.2.4"}]


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "does not exist"), ("file.nii", "is a file"), ("empty", "holds no volumes")]
)
def test_unusable_folder(tmp_path, name, message):
    touch(tmp_path, "file.nii", "empty/picture.png")
    with pytest.raises(ValueError, match=message) as error:
        find_volumes(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert ".nii.gz" in str(error.value)


def data_list(folder: Path, content: object) -> Path:
    path = folder / "dataset.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_load_datalist_resolves_paths_and_drops_labels(tmp_path):
    touch(tmp_path, "images/a.nii.gz")
    entries = [
        {"image": "images/a.nii.gz", "label": "labels/a.nii.gz", "task": "liver", "group": 3, "organs": ["x"]},
        "./images/b.nii.gz",
        {"image": "/elsewhere/c.mha"},
        {"image": "dicom/1.2.3", "series_uid": "1.2.3"},
    ]
    assert load_datalist(data_list(tmp_path, {"training": entries})) == [
        {"image": str(tmp_path / "images/a.nii.gz"), "task": "liver", "group": 3},
        {"image": str(tmp_path / "images/b.nii.gz")},
        {"image": "/elsewhere/c.mha"},
        {"image": str(tmp_path / "dicom/1.2.3"), "series_uid": "1.2.3"},
    ]


def test_load_datalist_with_dataset_dir_and_key(tmp_path):
    touch(tmp_path, "data/a.nii")
    path = data_list(tmp_path, {"training": [], "test": ["a.nii"]})
    assert load_datalist(path, tmp_path / "data", key="test") == [{"image": str(tmp_path / "data/a.nii")}]


def test_load_datalist_keeps_fields_as_they_are_but_for_paths(tmp_path):
    touch(tmp_path, "l/a.nii")
    entries = [
        {"image": "a.nii", "label": "../b.nii", "organs": ["x"], "other": 1},
        {"image": "c.nii", "group": 2},
        {"image": "d.nii", "label": ["e.nii"], "organs": "x"},
    ]
    path = data_list(tmp_path / "l", {"training": entries})
    assert load_datalist(path, keep=["label", "organs"]) == [
        {"image": str(tmp_path / "l/a.nii"), "label": str(tmp_path / "b.nii"), "organs": ["x"]},
        {"image": str(tmp_path / "l/c.nii"), "group": 2},
        {"image": str(tmp_path / "l/d.nii"), "label": ["e.nii"], "organs": "x"},
    ]


@pytest.mark.parametrize(
    ("top_level", "expected"),
    [
        ({}, [{}, {"task": "own"}, {"group": "own group"}]),
        (
            {"name": "liver"},
            [
                {"task": "liver", "group": "liver"},
                {"task": "own", "group": "liver"},
                {"task": "liver", "group": "own group"},
            ],
        ),
        (
            {"name": "x", "task": "liver", "group": "CT"},
            [{"task": "liver", "group": "CT"}, {"task": "own", "group": "CT"}, {"task": "liver", "group": "own group"}],
        ),
        ({"group": "CT"}, [{"group": "CT"}, {"group": "CT", "task": "own"}, {"group": "own group"}]),
        (
            {"task": 0, "group": 0},
            [{"task": 0, "group": 0}, {"task": "own", "group": 0}, {"task": 0, "group": "own group"}],
        ),
    ],
)
def test_the_list_says_where_entries_are_from_that_do_not_say_it(tmp_path, top_level, expected):
    touch(tmp_path, "a.nii")
    entries = ["a.nii", {"image": "b.nii", "task": "own"}, {"image": "c.nii", "group": "own group"}]
    items = load_datalist(data_list(tmp_path, {**top_level, "training": entries}))
    images = [str(tmp_path / name) for name in ("a.nii", "b.nii", "c.nii")]
    assert items == [{**fields, "image": image} for fields, image in zip(expected, images, strict=True)]


@pytest.mark.parametrize(
    ("entries", "twice"),
    [
        (["a.nii", "b.nii", "a.nii"], r"1 scans .*/a\.nii\. "),
        (["a.nii", {"image": "./x/../a.nii", "label": "other.nii"}, "b.nii", "b.nii", "b.nii"], r"2 scans .*/a\.nii, "),
        ([{"image": "d", "series_uid": "1"}, {"image": "d", "series_uid": "1"}], r"1 scans .*/d \(series 1\)\. "),
        ([{"image": "d", "series_uid": "1"}, {"image": "d", "series_uid": "2"}], None),
    ],
)
def test_a_scan_is_listed_once(tmp_path, entries, twice):
    """A folder may hold several series."""
    touch(tmp_path, "a.nii", "d/0.dcm")
    path = data_list(tmp_path, {"training": entries})
    if twice is None:
        assert len(load_datalist(path)) == 2
    else:
        with pytest.raises(ValueError, match=f"^{twice}") as error:
            load_datalist(path)
        assert str(path) in str(error.value)


class TestSeveralLists:
    @pytest.fixture
    def lists(self, tmp_path) -> list[Path]:
        for name in ("liver", "neck"):
            touch(tmp_path, f"{name}/images/a.nii", f"{name}/images/b.nii")
        return [
            data_list(tmp_path / name, {"name": name, "training": ["images/b.nii", "images/a.nii"]})
            for name in ("liver", "neck")
        ]

    def test_each_has_its_own_folder_and_task(self, lists, tmp_path):
        assert load_datalist(lists) == [
            {"image": str(tmp_path / name / "images" / file), "task": name, "group": name}
            for name in ("liver", "neck")
            for file in ("b.nii", "a.nii")
        ]
        assert load_datalist([str(lists[1])]) == load_datalist(lists[1])

    def test_of_one_dataset_dir(self, lists, tmp_path):
        touch(tmp_path, "liver/images/c.nii")
        other = data_list(tmp_path, {"training": ["images/c.nii"]})
        items = load_datalist([lists[0], other], tmp_path / "liver")
        assert [Path(item["image"]).name for item in items] == ["b.nii", "a.nii", "c.nii"]
        assert {Path(item["image"]).parent for item in items} == {tmp_path / "liver" / "images"}

    def test_a_scan_in_two_of_them(self, lists, tmp_path):
        again = data_list(tmp_path, {"training": ["liver/images/a.nii", "liver/images/c.nii"]})
        with pytest.raises(ValueError, match=r"1 scans .* more than once: .*liver/images/a\.nii\. .*but one .*liver"):
            load_datalist([lists[0], again])

    def test_a_bad_one_is_named(self, lists):
        with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
            load_datalist([lists[0], "nowhere.json"])


class TestSourceNames:
    def test_each_once_in_order(self):
        items = [{"image": str(i), "task": name} for i, name in enumerate(["neck", "liver", 3, "neck", "liver"])]
        assert source_names(items, "task") == ["3", "liver", "neck"]

    @pytest.mark.parametrize("unknown", [{}, {"group": None}, {"group": ""}])
    def test_all_that_lack_it_are_counted_and_the_remedies_named(self, unknown):
        items = [{"image": "/d/a.nii", "group": "x"}, *({"image": f"/d/{i}.nii", **unknown} for i in range(7))]
        with pytest.raises(ValueError, match=r"7 of 8 scans have no 'group': /d/0\.nii, .* and 2 more") as error:
            source_names(items, "group")
        for remedy in ('{"group": NAME, "training": [...]}', '{"image": PATH, "group": NAME}', "--data_list_file_path"):
            assert remedy in str(error.value)


@pytest.mark.parametrize(
    ("path", "dataset_dir", "expected"),
    [
        ("./x/../a.nii", None, "/lists/a.nii"),
        ("a.nii", "/data", "/data/a.nii"),
        ("/else/a.nii", "/data", "/else/a.nii"),
        ("~/a.nii", "/data", "/home/me/a.nii"),
    ],
)
def test_listed_path(monkeypatch, path, dataset_dir, expected):
    monkeypatch.setenv("HOME", "/home/me")
    assert listed_path(path, "/lists/list.json", dataset_dir) == expected


def test_a_dicom_folder_may_have_a_dot_in_its_name(tmp_path):
    (tmp_path / "patient.one").mkdir()
    path = data_list(tmp_path, {"training": ["patient.one"]})
    assert load_datalist(path) == [{"image": str(tmp_path / "patient.one")}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "not valid JSON"),
        ([1, 2], "holds a list"),
        ({"validation": ["a.nii"], "name": "x", "test": ["a.nii"]}, r"'training'.*\['validation', 'test'\]"),
        ({"training": []}, "no entries under the key 'training'"),
        ({"training": ["a.nii", {"label": "b.nii"}]}, "Entry 1 .*'image'"),
        ({"training": [{"image": ["a.nii", "b.nii"]}]}, "Entry 0 .*'image'"),
        ({"training": [{"image": ""}]}, "Entry 0 .*'image'"),
        ({"training": ["a.nii", "b.png"]}, r"unsupported type: .*b\.png"),
        ({"training": ["x.nii", "y.nii"]}, r"None of the 2 images .*x\.nii: set dataset_dir"),
    ],
)
def test_bad_data_list(tmp_path, content, message):
    touch(tmp_path, "a.nii")
    path = data_list(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        load_datalist(path)
    assert str(path) in str(error.value)


def test_missing_data_list(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        load_datalist(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("count", "fraction", "validation"),
    [(10, 0.2, 2), (10, 0.01, 1), (2, 0.9, 1), (3, 0.99, 2), (10, 0, 0), (0, 0.5, 0)],
)
def test_split_sizes_and_partition(count, fraction, validation):
    items = [{"image": f"/d/{i:02}.nii"} for i in range(count)]
    train, valid = split_datalist(items, fraction, seed=0)
    assert len(valid) == validation
    assert sorted(train + valid, key=item_name) == items


def test_split_depends_on_the_seed_and_not_on_the_order():
    items = [{"image": f"/d/{i}.nii"} for i in range(40)]
    shuffled = random.Random(1).sample(items, len(items))
    assert split_datalist(items, 0.25, seed=3) == split_datalist(shuffled, 0.25, seed=3)
    splits = {tuple(map(item_name, split_datalist(items, 0.25, seed=s)[1])) for s in range(5)}
    assert len(splits) == 5


def test_series_of_one_folder_are_items_of_their_own():
    items = [{"image": "/d/case", "series_uid": f"1.{i}"} for i in range(8)]
    train, valid = split_datalist(np.random.default_rng(0).permutation(items).tolist(), 0.25, seed=0)
    assert (len(train), len(valid)) == (6, 2)
    assert {item_name(i) for i in train}.isdisjoint(item_name(i) for i in valid)


def test_a_single_item_serves_as_both(caplog):
    items = [{"image": "/d/a.nii"}]
    assert split_datalist(items, 0.2, seed=0) == (items, items)
    assert "/d/a.nii" in caplog.text


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_split_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        split_datalist([{"image": "a"}], fraction, seed=0)
