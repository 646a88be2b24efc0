"""Scans are known again by their contents, wherever they lie and whatever they are called."""

import json
import shutil
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from pgl_ext.data.prepare import evaluation_cases
from pgl_ext.data.seen import patients_text, scan_digests, seen_scans, seen_text
from pgl_ext.data.split import split_cases


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


def test_patients_on_both_sides_of_a_split(tmp_path):
    for number, patient in enumerate(["A", "A", "B", ""]):
        write_slices(tmp_path / str(number), patient)
    a, other_of_a, b, nobody = ({"image": str(tmp_path / str(number))} for number in range(4))
    listed, same = {"image": "x.nii", "patient": "A"}, {"image": "y.nii", "patient": 7}
    assert patients_text({"training": [a, other_of_a, nobody], "test": [b, nobody, same]}) == ""
    for training, test in (([a, b], [other_of_a]), ([a, b], [listed])):
        text = patients_text({"training": training, "test": test})
        assert text.startswith("1 patients have scans in several parts")
        assert a["image"] in text
        assert test[0]["image"] in text
    assert "2 patients" in patients_text({"training": [listed, same], "validation": [b, same], "test": [a]})


def test_a_series_is_of_its_own_patient(tmp_path):
    uids = [write_slices(tmp_path / "all", patient) for patient in ("A", "B")]
    first, second = ({"image": str(tmp_path / "all"), "series_uid": uid} for uid in uids)
    assert patients_text({"training": [first], "test": [second]}) == ""
    assert patients_text({"training": [first], "test": [second, {"image": "x.nii", "patient": "A"}]})


def test_folds_keep_patients_of_dicom_series_together(tmp_path):
    for number, patient in enumerate("ABCABCA"):
        write_slices(tmp_path / str(number), patient)
    cases = [{"image": str(tmp_path / str(number))} for number in range(7)]
    tested = [split_cases(cases, test_fold=(fold, 3))["test"] for fold in range(3)]
    numbers = sorted(sorted(int(Path(case["image"]).name) for case in test) for test in tested)
    assert numbers == [[0, 3, 6], [1, 4], [2, 5]]


def write_slices(folder, patient):
    """A series of two slices; its UID."""
    folder.mkdir(exist_ok=True)
    uid = generate_uid()
    for number in range(2):
        header = FileMetaDataset()
        header.TransferSyntaxUID, header.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        header.MediaStorageSOPInstanceUID = generate_uid()
        data = Dataset()
        data.file_meta, data.SeriesInstanceUID, data.PatientID, data.Rows = header, uid, patient, 4
        data.save_as(folder / f"{uid}.{number}.dcm", enforce_file_format=True)
    return uid


def test_an_evaluation_says_whose_scans_it_was_trained_on(scans, tmp_path, caplog):
    entries = [{**scan, "label": scan["image"], "patient": "A"} for scan in scans[:2]]
    (tmp_path / "split.json").write_text(json.dumps({"training": entries[:1]}))
    (tmp_path / "list.json").write_text(json.dumps({"test": entries[1:]}))
    evaluation_cases(tmp_path / "list.json", split_path=tmp_path / "split.json")
    assert "1 patients have scans in several parts of the split" in caplog.text
