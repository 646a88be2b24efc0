import logging
import os
from pathlib import Path

import pytest
from made_files import touch, write_list

from pgl_ext.data.find import find_cases, find_scans, find_volumes


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
        monkeypatch.setattr("pgl_ext.data.find.find_volumes", lambda *_: [item])
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


class TestFindScans:
    def test_of_a_folder_with_names_of_their_own(self, tmp_path, caplog):
        touch(tmp_path, "a/ct.nii.gz", "b/ct.nii.gz", "b/ct.nrrd", "b/other.nii", "b/ct_features.nii.gz")
        with caplog.at_level(logging.INFO):
            scans = find_scans(tmp_path, passed_over=["_features.nii.gz"])
        assert [scan["name"] for scan in scans] == ["a_ct", "b_ct_1", "b_ct_2", "other"]
        assert scans[3] == {"image": str(tmp_path / "b/other.nii"), "name": "other"}
        assert "Passed over 1 outputs" in caplog.text
        assert len(find_scans(tmp_path)) == 5

    def test_of_a_file(self, tmp_path):
        touch(tmp_path, "a/ct.nii.gz", "b/other.nii")
        assert find_scans(tmp_path / "b/other.nii") == [{"image": str(tmp_path / "b/other.nii"), "name": "other"}]

    def test_of_a_data_list(self, tmp_path):
        touch(tmp_path, "case_1.nii.gz", "case_2.nii.gz")
        path = write_list(tmp_path / "list.json", ["case_2.nii.gz"], "testing")
        assert [scan["name"] for scan in find_scans(tmp_path, path, "testing")] == ["case_2"]

    def test_nothing_to_run_on(self, tmp_path):
        with pytest.raises(ValueError, match="--dataset_dir"):
            find_scans()
        touch(tmp_path, "ct_features.nii.gz")
        with pytest.raises(ValueError, match="holds only outputs of earlier runs"):
            find_scans(tmp_path, passed_over=["_features.nii.gz"])
