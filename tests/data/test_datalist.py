import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from made_files import touch, write_list

from pgl_ext.data.datalist import labelled_items, listed_path, load_datalist, source_names, unique_names
from pgl_ext.data.find import find_scans
from pgl_ext.transforms.formats import image_files


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


def test_several_keys(tmp_path):
    """As in the Decathlon's tasks, whose scans without labels are plain strings."""
    touch(tmp_path, "imagesTr/a.nii.gz", "imagesTs/b.nii.gz")
    content = {
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        "test": ["./imagesTs/b.nii.gz"],
    }
    items = [{"image": str(tmp_path / "imagesTr/a.nii.gz")}, {"image": str(tmp_path / "imagesTs/b.nii.gz")}]
    assert load_datalist(data_list(tmp_path, content), key=("training", "test")) == items
    assert load_datalist(data_list(tmp_path, {**content, "test": []}), key=["training", "test"]) == items[:1]
    for wrong in ({"training": content["training"]}, {"training": [], "test": []}):
        with pytest.raises(ValueError, match="no entries under the key 'training' and 'test'; keys with entries"):
            load_datalist(data_list(tmp_path, wrong), key=["training", "test"])
    with pytest.raises(ValueError, match=r"more than once: .*/b\.nii\.gz"):
        load_datalist(data_list(tmp_path, {**content, "training": content["test"]}), key=["training", "test"])
    assert len(load_datalist(data_list(tmp_path, content), key=["test", "training"])) == 2


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


@pytest.mark.skipif(os.name == "nt", reason="is how paths are there")
class TestPathsWrittenOnWindows:
    def test_backslashes_separate_folders(self, tmp_path):
        touch(tmp_path, "images/a.nii", "labels/a.nii", "images/b\\c.nii")
        entries = [{"image": ".\\images\\a.nii", "label": "labels\\a.nii"}, "images/b\\c.nii"]
        items = load_datalist(data_list(tmp_path, {"training": entries}), keep=["label"])
        assert items[0] == {"image": str(tmp_path / "images/a.nii"), "label": str(tmp_path / "labels/a.nii")}
        assert items[1] == {"image": str(tmp_path / "images/b\\c.nii")}

    @pytest.mark.parametrize("path", ["C:\\data\\a.nii", "d:/data/a.nii", "\\\\server\\share\\a.nii"])
    def test_drives_and_shares_are_not_here(self, tmp_path, path):
        touch(tmp_path, "b.nii")
        with pytest.raises(ValueError, match=r"dataset\.json names .*a path of Windows: give paths that start"):
            load_datalist(data_list(tmp_path, {"training": ["b.nii", path]}))


class TestListsOfNNUNet:
    def test_version_1_leaves_out_the_channel(self, tmp_path):
        touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/b.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/a.nii.gz")
        entries = [{"image": f"./imagesTr/{name}.nii.gz", "label": "./labelsTr/a.nii.gz"} for name in "ab"]
        cases = labelled_items(data_list(tmp_path, {"training": entries}))
        assert [os.path.basename(case["image"]) for case in cases] == ["a_0000.nii.gz", "b.nii.gz"]
        assert cases[0]["label"] == str(tmp_path / "labelsTr/a.nii.gz")

    def test_version_2_may_list_its_cases(self, tmp_path):
        touch(tmp_path, "a_0000.nii.gz", "labels/a.nii.gz")
        content = {
            "labels": {"background": 0},
            "dataset": {"a": {"images": ["a_0000.nii.gz"], "label": "labels/a.nii.gz"}},
        }
        (case,) = labelled_items(data_list(tmp_path, content))
        assert case == {"image": str(tmp_path / "a_0000.nii.gz"), "label": str(tmp_path / "labels/a.nii.gz")}


class TestSeveralChannels:
    FILES = ("a_0000.nii", "a_0001.nii")

    @pytest.mark.parametrize(
        ("content", "names"),
        [
            ({"training": ["a.nii"]}, None),
            ({"training": ["a.nii"], "modality": {"0": "T1", "1": "T2"}}, ["T1", "T2"]),
            ({"training": ["a_0000.nii"], "channel_names": {"1": "T2", "0": "T1"}}, ["T1", "T2"]),
            ({"training": [{"image": ["a_0000.nii", "a_0001.nii"]}]}, None),
            ({"training": [{"image": list(FILES), "channel_names": ["A", "B"]}]}, ["A", "B"]),
            ({"dataset": {"a": {"images": list(FILES), "label": "a.nii"}}, "modality": ["CT", "PET"]}, ["CT", "PET"]),
        ],
    )
    def test_files_and_names(self, tmp_path, content, names):
        touch(tmp_path, *self.FILES)
        (item,) = load_datalist(data_list(tmp_path, content))
        assert image_files(item) == [str(tmp_path / name) for name in self.FILES]
        assert item.get("channel_names") == names
        # What a split writes is read again.
        assert load_datalist(data_list(tmp_path, {"training": [item]})) == [item]
        assert unique_names([item]) == ["a"]

    def test_a_file_of_four_dimensions_has_names(self, tmp_path):
        touch(tmp_path, "a.nii")
        content = {"training": ["a.nii"], "modality": {"0": "FLAIR", "1": "T1w"}}
        assert load_datalist(data_list(tmp_path, content)) == [
            {"image": str(tmp_path / "a.nii"), "channel_names": ["FLAIR", "T1w"]}
        ]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                {"training": [{"image": list(FILES)}], "modality": ["A", "B", "C"]},
                r"2 files, .*a_0001.*\['A', 'B', 'C'\]",
            ),
            ({"training": ["a.nii"], "channel_names": {"1": "T1", "2": "T2"}}, "by its number from 0"),
        ],
    )
    def test_names_that_do_not_fit(self, tmp_path, content, message):
        touch(tmp_path, *self.FILES)
        with pytest.raises(ValueError, match=message):
            load_datalist(data_list(tmp_path, content))


def test_the_axes_of_files_that_name_none_are_given_once_or_for_each(tmp_path):
    touch(tmp_path, "a.nii", "b.nii")
    entries = [{"image": "a.nii", "label": "l.nii"}, {"image": "b.nii", "label": "l.nii", "orientation": "RAS"}]
    path = data_list(tmp_path, {"orientation": "LAS", "training": entries})
    assert [item["orientation"] for item in load_datalist(path)] == ["LAS", "RAS"]
    assert [case["orientation"] for case in labelled_items(path)] == ["LAS", "RAS"]


def test_what_is_listed_is_used_whatever_it_is_called(tmp_path):
    names = ["ct_seg.nii.gz", ".hidden.nii", "labels/a.nii", "x.seg.nrrd", "x_probabilities.nii.gz"]
    touch(tmp_path, *names)
    path = data_list(tmp_path, {"test": names})
    for items in (load_datalist(path, key="test"), find_scans(None, path, "test", passed_over=["_seg.nii.gz"])):
        assert [item["image"] for item in items] == [str(tmp_path / name) for name in names]


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
        ({"training": [{"image": ["a.nii", 3]}]}, "Entry 0 .*'image'"),
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


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a/scan.nii", "a/scan.nii.gz", "a/scan_1.nii.gz"], ["scan_0", "scan_2", "scan_1"]),
        (["a/scan_0.nii", "a/scan_1.nii", "a/scan.nii", "a/scan.mha"], ["scan_0", "scan_1", "scan_2", "scan_3"]),
        (["a/ct.nii", "b/ct.nii", "a_ct.nii"], ["a_ct_0", "b_ct", "a_ct_2"]),
        (["a/ct.nii", "a/ct.nii.gz", "a_ct.nii", "a_ct_1.nii", "b/ct.nii"], None),
        (["x.nii", "x.nii.gz", "x.mha", "x_1.nii", "x_1.nii.gz", "x_1_3.nii", "x_2.nii"], None),
        (["b/1.nii", "a/1.nii"], ["b_1", "a_1"]),
        (["b/1.nii", "a/2.nii"], ["1", "2"]),
    ],
)
def test_names_are_unique_whatever_scans_are_called(paths, expected):
    names = unique_names([{"image": f"/data/{path}"} for path in paths])
    assert len(set(names)) == len(paths)
    assert expected in (None, names)


@pytest.mark.parametrize("uid", ["/../../../evil", "..", "a/b", "..\\up", "C:x", "\0", 7])
def test_names_of_outputs_lead_nowhere_else(uid):
    """Whatever a data list gives as the series of a scan."""
    names = unique_names([{"image": "/d/a/x.nii", "series_uid": uid}, {"image": "/d/b/x.nii"}])
    assert names[1] == "b_x"
    assert names[0].startswith("a_x_")
    for path in (PurePosixPath(names[0]), PureWindowsPath(names[0])):
        assert path.parts == (names[0],)
    assert not set(names[0]) & set("/\\:\0")
