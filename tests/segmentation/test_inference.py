from __future__ import annotations

import csv
import json
import logging
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from made_files import oblique, oblique_affine, save_dicom_series
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Transform
from scipy import ndimage

from pgl_ext.errors import root_cause
from pgl_ext.files import write_csv
from pgl_ext.segmentation import inference
from pgl_ext.segmentation.inference import SaveSegmentations, scans_to_segment
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms import LoadVolumed
from pgl_ext.transforms.checks import BadVolumesError, CheckVolumed
from pgl_ext.transforms.masks import LabelMapd

INFERENCE = Path(__file__).parents[2] / "bundles" / "pgl_segmentation" / "configs" / "inference.json"
SHAPE = (12, 10, 8)
TASK = SegmentationTask({"liver": [2], "kidney": [5, 6], "tumour": [6]}, multi_label=True)
LOADING = Compose([LoadVolumed("image"), CheckVolumed("image")])


def save_scan(path: Path, affine: np.ndarray | None = None, shape=SHAPE) -> Path:
    voxels = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, oblique_affine() if affine is None else affine), path)
    return path


def masks_of(seed: int = 1) -> torch.Tensor:
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(seed)) < 0.3


def result(source: Path, masks: torch.Tensor, name: str = "case", **extra) -> dict:
    """What inference hands over, on the grid of the file."""
    image = LoadVolumed("image")({"image": str(source), **extra})["image"]
    data = {"name": name, "image": image, "pred": MetaTensor(masks, meta=image.meta), **extra}
    return LabelMapd("pred", TASK)(data)


# --- which scans ----------------------------------------------------------------------------------------------------


def test_outputs_of_earlier_runs_are_passed_over(tmp_path, caplog):
    for name in ("a", "sub/b", "a_seg", "a_probabilities", "sub/b_uncertainty"):
        save_scan(tmp_path / f"{name}.nii.gz")
    with caplog.at_level(logging.INFO):
        items = scans_to_segment(tmp_path / "out", LOADING, tmp_path)
    assert [item["name"] for item in items] == ["a", "b"]
    assert "Passed over 3 outputs" in caplog.text
    assert not (tmp_path / "out").exists()


def test_only_outputs(tmp_path):
    save_scan(tmp_path / "a_seg.nii.gz")
    with pytest.raises(ValueError, match="holds only outputs of earlier runs"):
        scans_to_segment(tmp_path / "out", LOADING, tmp_path)
    items = scans_to_segment(tmp_path / "out", LOADING, tmp_path / "a_seg.nii.gz")
    assert [item["name"] for item in items] == ["a_seg"]


def test_one_slice_stands_for_its_series(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 9, SHAPE).astype(np.int16)
    folder = save_dicom_series(tmp_path / "study", voxels, oblique(flips=(-1, -1, 1)), "1.2.3")
    for path in (folder, folder / "003.dcm"):
        items = scans_to_segment(tmp_path / "out", LOADING, path)
        assert items == [{"image": str(folder), "series_uid": "1.2.3", "name": "study"}]


def test_items_of_a_data_list(tmp_path):
    save_scan(tmp_path / "a.nii.gz")
    (tmp_path / "list.json").write_text(json.dumps({"test": [{"image": "a.nii.gz", "label": "x.nii.gz"}]}))
    items = scans_to_segment(tmp_path / "out", LOADING, None, tmp_path / "list.json")
    assert items == [{"image": str(tmp_path / "a.nii.gz"), "name": "a"}]


def test_all_bad_scans_are_named_and_may_be_skipped(tmp_path):
    save_scan(tmp_path / "good.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "good.nii.gz").read_bytes()[:200])
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4)), tmp_path / "constant.nii")
    with pytest.raises(BadVolumesError, match=r"2 of 3 volumes") as error:
        scans_to_segment(tmp_path / "out", LOADING, tmp_path)
    assert "constant.nii" in str(error.value)
    assert "cut.nii.gz" in str(error.value)
    assert not (tmp_path / "out").exists()
    items = scans_to_segment(tmp_path / "out", LOADING, tmp_path, skip_bad_files="true")
    assert [item["name"] for item in items] == ["good"]
    assert "cut.nii.gz" in (tmp_path / "out" / "skipped_files.txt").read_text()


@pytest.mark.parametrize("suffix", ["_seg.nii.gz", "_seg.dcm", "_overlay.png"])
def test_nothing_is_overwritten(tmp_path, suffix):
    save_scan(tmp_path / "a.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"a{suffix}").touch()
    for overwrite in (False, "false"):
        with pytest.raises(FileExistsError, match=rf"a{suffix} exist already.*--overwrite true"):
            scans_to_segment(tmp_path / "out", LOADING, tmp_path / "a.nii.gz", overwrite=overwrite)
    assert scans_to_segment(tmp_path / "out", LOADING, tmp_path / "a.nii.gz", overwrite=True)


def test_a_run_that_was_stopped_goes_on(tmp_path):
    """With the scans that have no row of volumes, which is written last, and the one whose row is the last."""
    for name in "abcd":
        save_scan(tmp_path / "scans" / f"{name}.nii.gz")
    out, scans = tmp_path / "out", tmp_path / "scans"
    assert len(scans_to_segment(out, LOADING, scans, resume=True)) == 4
    saver = SaveSegmentations(out, TASK, overlays=False)
    for name in "ab":
        saver.save(result(str(scans / f"{name}.nii.gz"), masks_of(), name))
    (out / "c_seg.nii.gz").touch()  # half done
    with pytest.raises(FileExistsError, match="--resume true"):
        scans_to_segment(out, LOADING, scans)
    assert [item["name"] for item in scans_to_segment(out, LOADING, scans, resume="true")] == ["b", "c", "d"]
    again = SaveSegmentations(out, TASK, overlays=False)
    for name in "bcd":
        again.save(result(str(scans / f"{name}.nii.gz"), masks_of(), name))
    with open(out / "volumes.csv", newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == [c for c in "abcd" for _ in TASK.names]
    assert [item["name"] for item in scans_to_segment(out, LOADING, scans, resume=True)] == ["d"]


def test_the_table_is_not_written_anew_for_each_scan(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(inference, "write_csv", lambda *args, original=write_csv: written.append(1) or original(*args))
    saver = SaveSegmentations(tmp_path / "out", TASK, overlays=False)
    for name in "abcde":
        saver.save(result(save_scan(tmp_path / f"{name}.nii.gz"), masks_of(), name))
    assert len(written) == 1
    assert len((tmp_path / "out" / "volumes.csv").read_text().splitlines()) == 1 + 5 * len(TASK.names)


# --- components -----------------------------------------------------------------------------------------------------


def keep_components(count: int | None, task: SegmentationTask = TASK) -> Transform | None:
    """The transform of the bundle's config."""
    parser = ConfigParser()
    parser.read_config(str(INFERENCE))
    parser.update({"task": task, "keep_components": count})
    return parser.get_parsed_content("postprocessing#transforms#1")


def largest(mask: np.ndarray, count: int) -> np.ndarray:
    """The largest components by SciPy; voxels that touch at a corner are connected."""
    labels, found = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(mask, labels, range(1, found + 1))
    return np.isin(labels, 1 + np.argsort(-sizes)[:count])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_largest_components_of_each_organ_are_kept(count):
    masks = MetaTensor(torch.rand(3, 20, 18, 16, generator=torch.Generator().manual_seed(0)) < 0.06)
    before, affine = masks.clone(), masks.affine
    out = keep_components(count)({"pred": masks})["pred"]
    assert (out.dtype, out.shape) == (torch.bool, before.shape)
    assert torch.equal(out.affine, affine)
    for found, mask in zip(out.numpy(), before.numpy(), strict=True):
        components, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
        # Of components of the same size any may be kept, but each of them whole.
        assert found.sum() == largest(mask, count).sum()
        kept = np.unique(components[found])
        assert kept.size == count
        assert np.array_equal(found, np.isin(components, kept) & mask)


@pytest.mark.parametrize("count", [1, 2])
def test_components_of_an_organ_do_not_depend_on_the_others(count):
    """The first channel is an organ too, and no background; organs may overlap."""
    masks = torch.zeros(3, *SHAPE, dtype=torch.bool)
    masks[:, 1:4, 1:4, 1:4] = True
    masks[:, 4, 4, 4] = True  # touches at a corner
    masks[:2, 8:10, 6:9, 5:7] = True
    masks[0, 11, 0, 0] = True
    out = keep_components(count)({"pred": MetaTensor(masks.clone())})["pred"]
    assert out.flatten(1).sum(1).tolist() == [[28, 28, 28], [40, 40, 28]][count - 1]
    assert out[:, 4, 4, 4].all()
    for found, mask in zip(out.numpy(), masks.numpy(), strict=True):
        assert np.array_equal(found, largest(mask, count))


def test_the_only_organ_has_its_components_too():
    task = SegmentationTask({"liver": [1]}, multi_label=True)
    masks = torch.zeros(1, *SHAPE, dtype=torch.bool)
    masks[0, :3], masks[0, 5:7] = True, True
    out = keep_components(1, task)({"pred": MetaTensor(masks.clone())})["pred"]
    assert torch.equal(out[0, :5].as_tensor(), masks[0, :5])
    assert not out[0, 5:].any()


def test_empty_masks_stay_empty():
    masks = MetaTensor(torch.zeros(3, *SHAPE, dtype=torch.bool))
    assert not keep_components(1)({"pred": masks})["pred"].any()


def test_all_components_stay_by_default():
    assert keep_components(None) is None


@pytest.mark.parametrize(
    ("components", "message"),
    [(0, "at least 1, got 0"), ({"liver": 1}, "a whole number, got"), (1.5, r"1\.5"), (True, "True")],
)
def test_bad_components(components, message):
    with pytest.raises(RuntimeError) as error:
        keep_components(components)
    assert re.search(f"^keep_components must be .*{message}", str(root_cause(error.value)))


# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_grid_of_a_nifti_scan(tmp_path, suffix):
    """qform and sform may differ, and neither may change by a bit."""
    source = tmp_path / f"case{suffix}"
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(*SHAPE, 1)).astype(np.float32), None)
    image.set_qform(oblique_affine((0.7, 1.3, 2.9)), code=1)
    image.set_sform(oblique_affine(), code=4)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, source)
    data = result(source, masks_of())
    SaveSegmentations(tmp_path / "out", TASK).save(data)
    found, expected = nib.load(tmp_path / "out" / "case_seg.nii.gz"), nib.load(source)
    assert found.shape == SHAPE
    assert found.get_data_dtype() == np.uint8
    assert np.array_equal(found.affine, expected.affine)
    for form in ("qform", "sform"):
        assert np.array_equal(getattr(found, f"get_{form}")(), getattr(expected, f"get_{form}")())
        assert int(found.header[f"{form}_code"]) == int(expected.header[f"{form}_code"])
    liver, kidney, tumour = masks_of().numpy()
    expected = np.select([tumour, liver, kidney], [6, 2, 5], 0)
    assert np.array_equal(np.asarray(found.dataobj), expected)


@pytest.mark.parametrize("orientation", ["LAS", "RAS", "PSR"])
def test_a_scan_without_qform_and_sform(tmp_path, orientation):
    """Read by the axes that its item gives; the label map lies on it in every viewer, whatever that assumes."""
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), None)
    image.header.set_zooms((0.8, 0.9, 2.0))
    nib.save(image, tmp_path / "case.nii")
    SaveSegmentations(tmp_path, TASK).save(result(tmp_path / "case.nii", masks_of(), orientation=orientation))
    found = nib.load(tmp_path / "case_seg.nii.gz")
    assert np.array_equal(found.affine, nib.load(tmp_path / "case.nii").affine)
    assert int(found.header["qform_code"]) == int(found.header["sform_code"]) == 0


def test_maps_along_the_fourth_axis(tmp_path):
    data = result(save_scan(tmp_path / "case.nii.gz"), masks_of())
    data["pred_probabilities"] = MetaTensor(torch.rand(3, *SHAPE), meta=data["pred"].meta)
    data["pred_uncertainty"] = MetaTensor(torch.rand(1, *SHAPE), meta=data["pred"].meta)
    SaveSegmentations(tmp_path / "out", TASK).save(data)
    maps = [nib.load(tmp_path / "out" / f"case_{name}.nii.gz") for name in ("probabilities", "uncertainty")]
    assert [m.shape for m in maps] == [(*SHAPE, 3), SHAPE]
    for m, key in zip(maps, ("pred_probabilities", "pred_uncertainty"), strict=True):
        assert m.get_data_dtype() == np.float32
        assert np.array_equal(m.affine, nib.load(tmp_path / "case.nii.gz").affine)
        values = np.asarray(m.dataobj).reshape(*SHAPE, -1)
        assert np.array_equal(np.moveaxis(values, -1, 0), data[key].numpy())


def test_volumes(tmp_path):
    affine = oblique_affine((1.0, 2.0, 5.0))
    saver = SaveSegmentations(tmp_path / "out", TASK, overlays=False)
    for name, seed in (("a", 1), ("b", 2), ("a", 3)):
        saver.save(result(save_scan(tmp_path / f"{name}.nii.gz", affine), masks_of(seed), name))
    with open(tmp_path / "out" / "volumes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["organ"]) for row in rows] == [(c, o) for c in "ba" for o in TASK.names]
    for row in rows:
        voxels = int(masks_of({"a": 3, "b": 2}[row["case"]])[TASK.names.index(row["organ"])].sum())
        assert float(row["millilitres"]) == pytest.approx(voxels * 0.01, abs=1e-3)


def test_what_an_earlier_run_wrote_does_not_stay(tmp_path):
    source = save_scan(tmp_path / "case.nii.gz")
    for name in ("case_uncertainty.nii.gz", "case_overlay.png", "other_uncertainty.nii.gz"):
        (tmp_path / name).touch()
    SaveSegmentations(tmp_path, TASK, overlays=False).save(result(source, masks_of()))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"case.nii.gz", "case_seg.nii.gz", "other_uncertainty.nii.gz", "volumes.csv"}


def test_the_same_segmentation_is_the_same_file(tmp_path):
    data = result(save_scan(tmp_path / "case.nii.gz"), masks_of())
    for name in ("a", "b"):
        SaveSegmentations(tmp_path / name, TASK, overlays="false").save(data)
    assert (tmp_path / "a" / "case_seg.nii.gz").read_bytes() == (tmp_path / "b" / "case_seg.nii.gz").read_bytes()


def test_a_dicom_series_also_gets_a_seg(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 9, SHAPE).astype(np.int16)
    folder = save_dicom_series(tmp_path / "case", voxels, oblique(flips=(-1, -1, 1)), "1.2.3")
    data = result(folder, masks_of(), series_uid="1.2.3")
    SaveSegmentations(tmp_path / "out", TASK).save(data)
    seg = pydicom.dcmread(tmp_path / "out" / "case_seg.dcm")
    numbers = [
        int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        for group in seg.PerFrameFunctionalGroupsSequence
    ]
    counts = [int(seg.pixel_array[np.equal(numbers, number)].sum()) for number in (1, 2, 3)]
    assert counts == masks_of().flatten(1).sum(1).tolist()
    assert (tmp_path / "out" / "case_overlay.png").stat().st_size > 5000
    found = nib.load(tmp_path / "out" / "case_seg.nii.gz")
    np.testing.assert_allclose(found.affine, oblique(flips=(-1, -1, 1)), atol=1e-4)
    np.testing.assert_allclose(found.get_qform(), found.get_sform(), atol=1e-4)


def test_headers_that_do_not_allow_a_seg_lose_nothing_else(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise AttributeError("no attribute 'ImageType'")

    monkeypatch.setattr("pgl_ext.segmentation.inference.write_dicom_seg", refuse)
    voxels = np.random.default_rng(0).integers(0, 9, SHAPE).astype(np.int16)
    folder = save_dicom_series(tmp_path / "case", voxels, oblique(flips=(-1, -1, 1)), "1.2.3")
    SaveSegmentations(tmp_path / "out", TASK).save(result(folder, masks_of(), series_uid="1.2.3"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "case_seg.nii.gz",
        "case_overlay.png",
        "volumes.csv",
    }
    assert "no DICOM SEG" in caplog.text
    assert "ImageType" in caplog.text
