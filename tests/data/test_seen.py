"""Scans are known again by their contents, wherever they lie and whatever they are called."""

import json
import shutil

import pytest

from pgl_ext.data.prepare import evaluation_cases
from pgl_ext.data.seen import scan_digests, seen_scans, seen_text


@pytest.fixture
def scans(tmp_path):
    """Three files, of which two differ in one byte at an end, and a folder of slices."""
    contents = {"a.nii": b"x" * 300_000, "b.nii": b"x" * 299_999 + b"y", "c.nii": b"y" + b"x" * 299_999}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "series").mkdir()
    for number in range(2):
        (tmp_path / "series" / f"{number}.dcm").write_bytes(bytes([number]) * 10)
    return [{"image": str(tmp_path / name)} for name in (*contents, "series")]


def test_each_scan_has_its_own(scans):
    digests = scan_digests(scans)
    assert len(set(digests)) == len(scans)
    assert digests == sorted(digests)
    assert all(len(digest) == 16 for digest in digests)


def test_copies_have_the_same_under_other_names(scans, tmp_path):
    shutil.copy(scans[0]["image"], tmp_path / "copy.nii")
    shutil.copytree(scans[3]["image"], tmp_path / "elsewhere")
    copies = [{"image": tmp_path / "copy.nii"}, {"image": tmp_path / "elsewhere"}]
    assert scan_digests(copies) == scan_digests([scans[0], scans[3]])


def test_those_of_the_weights_count_too(scans, tmp_path):
    (tmp_path / "encoder.json").write_text(json.dumps({"data": {"scans": scan_digests(scans[:1])}}))
    assert seen_scans(tmp_path / "encoder.pt") == set(scan_digests(scans[:1]))
    assert scan_digests(scans[1:2], tmp_path / "encoder.pt") == scan_digests(scans[:2])


@pytest.mark.parametrize("content", [None, {}, {"data": {}}, {"data": {"training_volumes": 3}}])
def test_weights_that_do_not_say(tmp_path, content):
    if content is not None:
        (tmp_path / "encoder.json").write_text(json.dumps(content))
    assert seen_scans(tmp_path / "encoder.pt") == set()
    assert seen_scans(None) == set()


def test_what_is_said_of_test_scans(scans):
    assert seen_text(scans, ()) == ""
    assert seen_text(scans[:2], scan_digests(scans[2:])) == ""
    assert "1 of the 2 test scans" in seen_text(scans[:2], scan_digests(scans[1:]))


def test_an_evaluation_says_it(scans, tmp_path, caplog):
    entries = [{**scan, "label": scan["image"]} for scan in scans[:2]]
    (tmp_path / "list.json").write_text(json.dumps({"test": entries}))
    evaluation_cases(tmp_path / "list.json", seen=scan_digests(scans[:1]))
    assert "1 of the 2 test scans" in caplog.text
