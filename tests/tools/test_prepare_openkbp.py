from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from programs import ROOT

from pgl_ext.data.datalist import load_datalist

sys.path.append(str(ROOT / "studies"))
import prepare_openkbp

SPACING = (4.0, 3.0, 2.0)  # mm, of the box's axes
FIRST, LAST = np.array([40, 20, 10]), np.array([59, 49, 24])  # of the voxels that have a value


def hu(place) -> int:
    return 70 * place[0] + 8 * place[1] + place[2] - 1000


def write_patient(folder: Path, organs: dict[str, list[tuple[int, int, int]]]) -> None:
    """A patient whose HU are those of :func:`hu`, before clipping."""
    folder.mkdir(parents=True)
    places = np.stack(np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(FIRST, LAST, strict=True)), indexing="ij"), -1)
    rows = [f"{p * 128 * 128 + left * 128 + i},{hu((p, left, i)) + 1000}.0" for p, left, i in places.reshape(-1, 3)]
    (folder / "ct.csv").write_text("\n".join([",data", *rows]) + "\n")
    (folder / "voxel_dimensions.csv").write_text("\n".join(map(str, SPACING)) + "\n")
    for name, voxels in organs.items():
        rows = [f"{p * 128 * 128 + left * 128 + i}," for p, left, i in voxels]
        (folder / f"{name}.csv").write_text("\n".join([",data", *rows]) + "\n")


@pytest.fixture
def source(tmp_path) -> Path:
    source = tmp_path / "provided-data"
    organs = {"Brainstem": [(45, 30, 12), (46, 30, 12)], "Mandible": [(46, 30, 12)], "PTV70": [(50, 30, 12)]}
    write_patient(source / "train-pats" / "pt_10", organs)
    write_patient(source / "train-pats" / "pt_9", organs | {"Larynx": [(55, 45, 20)]})
    write_patient(source / "validation-pats" / "pt_201", organs)
    write_patient(source / "test-pats" / "pt_300", organs)
    return source


@pytest.fixture
def patients(tmp_path) -> str:
    path = tmp_path / "patients.yaml"
    path.write_text("pretraining: [300]\ntraining: [9, 10]\nvalidation: [201]\n")
    return str(path)


def test_lists(source, patients, tmp_path):
    prepare_openkbp.prepare(str(source), str(tmp_path / "out"), patients)
    scans = load_datalist(str(tmp_path / "out" / "openkbp_ssl" / "dataset.json"))
    assert [Path(item["image"]).name for item in scans] == ["pt_300.nii.gz"]
    assert not list((tmp_path / "out" / "openkbp_ssl").rglob("labels"))
    content = json.loads((tmp_path / "out" / "openkbp_seg" / "dataset.json").read_text())
    names = [[entry["image"] for entry in content[name]] for name in ("training", "validation")]
    assert names == [["images/pt_10.nii.gz", "images/pt_9.nii.gz"], ["images/pt_201.nii.gz"]]  # as text is sorted
    assert content["training"][1]["organs_contoured"] == ["Brainstem", "Larynx", "Mandible"]
    assert content["labels"]["7"] == "Mandible"
    for entry in (*content["training"], *content["validation"]):
        assert (tmp_path / "out" / "openkbp_seg" / entry["label"]).is_file()


def test_every_voxel_lies_where_it_should(source):
    """As SimpleITK, whose physical points are LPS, finds the voxels of an image."""
    scan, _, _ = prepare_openkbp.read_patient(source / "train-pats" / "pt_9")
    nib.save(scan, source / "scan.nii.gz")
    image = sitk.ReadImage(str(source / "scan.nii.gz"))
    assert image.GetDirection() == (-1, 0, 0, 0, -1, 0, 0, 0, 1)  # RAS
    assert image.GetSize() == (30 + 6, 20 + 6, 15)
    assert image.GetSpacing() == pytest.approx((3, 4, 2))
    centre = (FIRST + LAST) / 2
    for place in (FIRST, LAST, np.array([41, 47, 11])):
        back, left, down = (place - centre) * SPACING
        voxel = image.TransformPhysicalPointToIndex((left, back, -down))
        assert image[voxel] == min(3071, hu(place))
    edge = sitk.GetArrayViewFromImage(image)[:, :3]
    assert edge.min() == edge.max() == -1000


def test_values_are_clipped(source):
    scan, _, _ = prepare_openkbp.read_patient(source / "train-pats" / "pt_9")
    values = np.unique(np.asarray(scan.dataobj))
    assert values[0] == -1000
    assert values[-1] == 3071 < hu(LAST)
    assert scan.get_data_dtype() == np.int16


def test_labels(source):
    scan, labels, contoured = prepare_openkbp.read_patient(source / "train-pats" / "pt_9")
    assert contoured == ["Brainstem", "Larynx", "Mandible"]
    assert np.array_equal(labels.affine, scan.affine)
    values, scan_values = np.asarray(labels.dataobj), np.asarray(scan.dataobj)
    assert {value: (values == value).sum() for value in np.unique(values)[1:]} == {1: 1, 6: 1, 7: 1}
    # The mandible's voxel is one of the brainstem's too, and the later organ's.
    assert scan_values[values == 7] == hu((46, 30, 12))
    assert scan_values[values == 6] == min(3071, hu((55, 45, 20)))


def test_patients_that_are_not_there(source, tmp_path, patients):
    (source / "train-pats" / "pt_9" / "ct.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks ct\.csv of 1 patients: pt_9\. Give the folder"):
        prepare_openkbp.prepare(str(source), str(tmp_path / "out"), patients)
    assert not (tmp_path / "out").exists()


def test_no_patient_is_in_two_lists():
    lists = yaml.safe_load(prepare_openkbp.PATIENTS.read_text())
    assert {name: len(numbers) for name, numbers in lists.items()} == {
        "pretraining": 165,
        "training": 70,
        "validation": 9,
    }
    assert len({number for numbers in lists.values() for number in numbers}) == 165 + 70 + 9
