from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from made_files import oblique, save_dicom_series

from pgl_ext.segmentation.dicom_seg import organ_codes, require_highdicom, write_dicom_seg
from pgl_ext.transforms.load import LoadVolumed, series_files

SHAPE = (9, 7, 6)
NAMES = ("liver", "left kidney", "kidney tumour")


def series(folder: Path, affine: np.ndarray) -> Path:
    voxels = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    return save_dicom_series(folder, voxels, affine, "1.2.3")


def organs(overlapping: bool, seed: int = 1) -> np.ndarray:
    """Random masks, so that no flip or permutation of axes leaves them as they are; the last slice is empty."""
    rng = np.random.default_rng(seed)
    if overlapping:
        masks = rng.random((3, *SHAPE)) < 0.3
    else:
        labels = rng.integers(0, 5, SHAPE)
        masks = np.stack([labels == number for number in (1, 2, 3)])
    masks[..., -1] = False
    return masks


def points_of_segment(seg: pydicom.Dataset, number: int) -> set[tuple[float, ...]]:
    """Where a segment's voxels lie in the patient, in LPS mm, by the attributes of the frames alone."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    across, down = np.reshape(np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float), (2, 3))
    row_spacing, column_spacing = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    points = set()
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number:
            origin = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
            for row, column in np.argwhere(frame):
                points.add(tuple(np.round(origin + column * column_spacing * across + row * row_spacing * down, 2)))
    return points


def points_of_mask(mask: np.ndarray, affine: np.ndarray) -> set[tuple[float, ...]]:
    ras = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    return {tuple(point) for point in np.round(ras * [-1, -1, 1], 2)}


def same(found: set, expected: set) -> bool:
    """Equal but for rounding."""
    if len(found) != len(expected):
        return False
    a, b = np.array(sorted(found)), np.array(sorted(expected))
    return bool((np.linalg.norm(a[:, None] - b[None], axis=-1).min(1) < 0.05).all())


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("flips", [(-1, -1, 1), (-1, -1, -1), (1, -1, 1)])
def test_segments_lie_where_the_masks_do(tmp_path, flips, overlapping):
    """Written for the volume as it was read; compared in the patient. Files are named in reverse order of slices."""
    folder = series(tmp_path / "series", oblique(flips=flips))
    masks = organs(overlapping)
    write_dicom_seg(masks, NAMES, series_files(str(folder), ""), tmp_path / "out" / "seg.dcm", "three organs")
    seg = pydicom.dcmread(tmp_path / "out" / "seg.dcm")
    affine = LoadVolumed("image")({"image": str(folder)})["image"].affine.numpy()
    for number, mask in enumerate(masks, start=1):
        assert same(points_of_segment(seg, number), points_of_mask(mask, affine))
    assert seg.Modality == "SEG"
    assert seg.SeriesDescription == "three organs"
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == list(NAMES)


def test_frames_refer_to_their_slices(tmp_path):
    folder = series(tmp_path, oblique(flips=(-1, -1, 1)))
    files = series_files(str(folder), "")
    write_dicom_seg(organs(True), NAMES, files, tmp_path / "seg.dcm")
    seg, position = pydicom.dcmread(tmp_path / "seg.dcm"), {}
    for file in files:
        source = pydicom.dcmread(file)
        position[source.SOPInstanceUID] = np.array(source.ImagePositionPatient, dtype=float)
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3"
    for group in seg.PerFrameFunctionalGroupsSequence:
        (uid,) = [item.ReferencedSOPInstanceUID for item in group.DerivationImageSequence[0].SourceImageSequence]
        own = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        np.testing.assert_allclose(own, position[uid], atol=1e-4)


def test_uneven_slices_keep_their_own_positions(tmp_path):
    """Where a slice is missing, the volume's affine is only nearly right; the frames still lie on the slices."""
    folder = series(tmp_path, oblique(flips=(-1, -1, 1)))
    files = series_files(str(folder), "")
    Path(files.pop(2)).unlink()
    masks = np.ones((1, *SHAPE[:2], SHAPE[2] - 1), dtype=bool)
    write_dicom_seg(masks, ["body"], files, tmp_path / "seg.dcm")
    groups = pydicom.dcmread(tmp_path / "seg.dcm").PerFrameFunctionalGroupsSequence
    found = [[float(x) for x in group.PlanePositionSequence[0].ImagePositionPatient] for group in groups]
    expected = [[float(x) for x in pydicom.dcmread(file).ImagePositionPatient] for file in files]
    np.testing.assert_allclose(sorted(found), sorted(expected), atol=1e-4)


def test_nothing_found(tmp_path):
    folder = series(tmp_path, oblique(flips=(-1, -1, 1)))
    write_dicom_seg(np.zeros((3, *SHAPE), dtype=bool), NAMES, series_files(str(folder), ""), tmp_path / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert not seg.pixel_array.any()
    assert len(seg.SegmentSequence) == 3


@pytest.mark.parametrize(
    ("name", "category", "kind", "region", "side"),
    [
        ("spleen", "Anatomical Structure", "Spleen", None, None),
        ("left adrenal gland", "Anatomical Structure", "Adrenal gland", None, "Left"),
        ("RightParotid", "Anatomical Structure", "Parotid gland", None, "Right"),
        ("SpinalCord", "Anatomical Structure", "Spinal cord", None, None),
        ("lungs", "Anatomical Structure", "Lung", None, None),
        ("left ventricle", "Anatomical Structure", "Left ventricle", None, None),
        ("kidney tumour", "Morphologically Abnormal Structure", "Neoplasm", "Kidney", None),
        ("portal and splenic veins", "Anatomical Structure", "Anatomical Structure", None, None),
        ("Organ 7", "Anatomical Structure", "Anatomical Structure", None, None),
    ],
)
def test_codes(name, category, kind, region, side):
    found = [None if code is None else code.meaning for code in organ_codes(name)]
    assert found == [category, kind, region, side]


def test_codes_are_written(tmp_path):
    folder = series(tmp_path, oblique(flips=(-1, -1, 1)))
    write_dicom_seg(organs(True), NAMES, series_files(str(folder), ""), tmp_path / "seg.dcm")
    _, kidney, tumour = pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence
    coded = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (coded.CodeValue, coded.CodingSchemeDesignator) == ("64033007", "SCT")
    assert coded.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == "7771000"
    assert tumour.AnatomicRegionSequence[0].CodeValue == "64033007"
    assert kidney.SegmentAlgorithmType == "AUTOMATIC"


def test_files_that_do_not_fit(tmp_path):
    folder = series(tmp_path, oblique(flips=(-1, -1, 1)))
    files = series_files(str(folder), "")
    with pytest.raises(ValueError, match=r"5 DICOM files .*do not fit masks of \(9, 7, 6\) voxels"):
        write_dicom_seg(organs(True), NAMES, files[1:], tmp_path / "seg.dcm")
    with pytest.raises(ValueError, match=r"shape \(3, 9, 7, 6\), expected .* of 1 organs"):
        write_dicom_seg(organs(True), ["liver"], files, tmp_path / "seg.dcm")
    assert not (tmp_path / "seg.dcm").exists()


def test_without_highdicom(monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ImportError, match=r"pip install highdicom.*--save_dicom_seg false"):
        require_highdicom()
