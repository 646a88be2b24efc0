"""Which files of a folder are the channels of one scan."""

import json

import pytest
from made_files import touch

from pgl_ext.data.find import find_cases, find_scans, find_volumes
from pgl_ext.transforms.formats import image_files

NAMES = ["T1", "T2"]


def names_of(items: list[dict]) -> list[list[str]]:
    return [[file.rpartition("/")[2] for file in image_files(item)] for item in items]


@pytest.mark.parametrize("where", ["", "imagesTr"])
def test_numbered_files_are_one_scan_where_a_dataset_json_says_so(tmp_path, where):
    touch(tmp_path, *(f"imagesTr/{case}_000{channel}.nii.gz" for case in "ab" for channel in (0, 1)))
    assert len(find_volumes(tmp_path)) == 4
    assert names_of(find_volumes(tmp_path, NAMES)) == [[f"{c}_0000.nii.gz", f"{c}_0001.nii.gz"] for c in "ab"]
    (tmp_path / where / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT", "1": "PET"}}))
    items = find_volumes(tmp_path, NAMES)
    assert names_of(items) == [[f"{c}_0000.nii.gz", f"{c}_0001.nii.gz"] for c in "ab"]
    assert [item["channel_names"] for item in items] == [["CT", "PET"]] * 2
    assert [item["name"] for item in find_scans(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("files", "scans"),
    [
        (["a_0000.nii"], [["a_0000.nii", "a_0001.nii"]]),  # reading it says that the second is missing
        (["a_0000.nii", "a_0002.nii"], [["a_0000.nii", "a_0001.nii", "a_0002.nii"]]),
        (["a_0012.nii", "a_0013.nii"], [["a_0012.nii"], ["a_0013.nii"]]),  # numbers of cases
        (["a.nii", "b_0000.nii", "b_0001.nii"], [["a.nii"], ["b_0000.nii", "b_0001.nii"]]),
    ],
)
def test_what_is_missing_and_what_is_numbered_otherwise(tmp_path, files, scans):
    touch(tmp_path, *files)
    assert names_of(find_volumes(tmp_path, NAMES)) == scans


def test_a_damaged_list_beside_scans_says_nothing(tmp_path):
    touch(tmp_path, "a_0000.nii", "a_0001.nii", "dataset.json")
    assert len(find_volumes(tmp_path)) == 2


def test_cases(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii", "imagesTr/a_0001.nii", "labelsTr/a.nii")
    (case,) = find_cases(tmp_path, NAMES)
    assert names_of([case]) == [["a_0000.nii", "a_0001.nii"]]
    assert case["label"] == str(tmp_path / "labelsTr/a.nii")


@pytest.mark.parametrize("file", ["a_0000.nii", "a_0001.nii"])
def test_one_file_stands_for_its_scan(tmp_path, file):
    touch(tmp_path, "a_0000.nii", "a_0001.nii")
    (item,) = find_scans(tmp_path / file, channel_names=NAMES)
    assert names_of([item]) == [["a_0000.nii", "a_0001.nii"]]
    assert names_of(find_scans(tmp_path / file)) == [[file]]
