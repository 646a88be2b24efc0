"""DICOM: values and grid as pydicom has them, worked out by hand for each slice or frame, or refused."""

from pathlib import Path

import numpy as np
import pytest
from made_dicom import write_frames, write_series, write_slice

from pgl_ext.data.find import find_volumes
from pgl_ext.transforms import LoadVolumed
from pgl_ext.transforms.checks import BadVolumeError
from pgl_ext.transforms.dicom import series_files

pydicom = pytest.importorskip("pydicom")

# x and y of DICOM point to the left and to the back.
AFFINE = np.array([[-1.5, 0, 0, -5], [0, -2, 0, -6], [0, 0, 3, 0], [0, 0, 0, 1]])
SLICES = range(4)
PLACES = [(5, 6, 3 * number) for number in SLICES]


def stored(dtype="u2", low=0, high=2000, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (len(SLICES), 6, 5)).astype(dtype)


def load(path: Path, **entries):
    return LoadVolumed("image")({"image": str(path), **entries})["image"]


def assert_reads(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    """Values are (slices, rows, columns)."""
    image = load(path)
    np.testing.assert_allclose(image.numpy()[0], np.transpose(values, (2, 1, 0)), rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(image.affine.numpy(), affine, atol=1e-6)


# --- values ---------------------------------------------------------------------------------------------------------

SCALES = {
    "fractions after whole numbers": ([1, 0.37, 0.37, 0.01], [0, 0, 0, 0]),
    "a range that grows": ([1, 100, 100, 1], [0, 0, 0, 0]),
    "below zero later on": ([1, 1, 1, 1], [0, -500, -1024, 0]),
    "each its own": ([0.5, 1.25, 2, 0.001], [-1024, 3.5, 0, 7]),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["series", "frames"])
def test_each_slice_has_its_own_scale(tmp_path, kind, scale):
    slopes, intercepts = SCALES[scale]
    pixels = stored()
    if kind == "series":
        path = write_series(tmp_path, pixels, lambda n: {"RescaleSlope": slopes[n], "RescaleIntercept": intercepts[n]})
    else:
        path = write_frames(tmp_path / "0.dcm", pixels, PLACES, list(zip(slopes, intercepts, strict=True)))
    expected = pixels * np.reshape(slopes, (-1, 1, 1)) + np.reshape(intercepts, (-1, 1, 1))
    assert_reads(path, expected)


def test_each_slice_is_signed_or_not(tmp_path):
    unsigned, signed = stored(high=60000), stored("i2", -1000, 1000)
    for number in SLICES:
        write_slice(tmp_path / f"{number}.dcm", (unsigned, signed)[number % 2][number], number)
    expected = np.where(np.arange(4).reshape(-1, 1, 1) % 2, signed.astype(int), unsigned.astype(int)) - 1024
    assert_reads(tmp_path, expected)


@pytest.mark.parametrize("dtype", ["i2", "u2"])
def test_bits_above_the_stored_ones_are_no_part_of_the_value(tmp_path, dtype):
    """An overlay in the high bits, as older files have it."""
    low, high = (-2048, 2047) if dtype == "i2" else (0, 4095)
    values = stored(dtype, low, high)
    pixels = (values.astype("u2") & 0x0FFF) | (stored("u2", 0, 16, seed=1) << 12)
    write_series(tmp_path, pixels.view(dtype), lambda n: {"BitsStored": 12, "HighBit": 11})
    assert_reads(tmp_path, values.astype(int) - 1024)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", "u4"])
def test_other_pixel_types(tmp_path, dtype):
    values = stored(dtype, 0, 100)
    assert_reads(write_series(tmp_path, values), values.astype(int) - 1024)


@pytest.mark.parametrize(
    "padding",
    [
        {"PixelPaddingValue": -2000},
        {"PixelPaddingValue": 30000},
        {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1900},
    ],
)
def test_padding_is_no_part_of_the_scan(tmp_path, padding):
    """It gets the lowest value of the rest, of all slices."""
    values = stored("i2", 10, 1000)
    padded = values.copy()
    padded[:2, :2, :3] = max(padding.values())
    write_series(tmp_path, padded, lambda n: padding)
    expected = np.where(padded == values, values, values[padded == values].min())
    assert_reads(tmp_path, expected.astype(int) - 1024)


def test_inverted_display_does_not_change_hounsfield_units(tmp_path):
    assert_reads(
        write_series(tmp_path, stored(), lambda n: {"PhotometricInterpretation": "MONOCHROME1"}),
        stored().astype(int) - 1024,
    )


def test_values_without_units_need_no_scale(tmp_path):
    write_series(tmp_path, stored(), lambda n: {"Modality": "MR", "RescaleSlope": None, "RescaleIntercept": None})
    assert_reads(tmp_path, stored())


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_compressed_slices(tmp_path, compressor):
    """Written by GDCM; lossless, each with its own slope."""
    pytest.importorskip("itk")
    sitk = pytest.importorskip("SimpleITK")
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    writer.SetUseCompression(True)
    writer.SetCompressor(compressor)
    # GDCM's JPEG 2000 needs slices of some size.
    values = np.random.default_rng(0).integers(-1000, 1000, (len(SLICES), 48, 40)).astype("i2")
    for number, pixels in enumerate(values):
        image = sitk.GetImageFromArray(pixels[None])
        image.SetSpacing((1.5, 2, 3))
        tags = {"0008|0060": "CT", "0020|000d": "1.2", "0020|000e": "1.2.3", "0020|0032": f"5\\6\\{3 * number}"}
        tags |= {"0020|0037": "1\\0\\0\\0\\1\\0"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(tmp_path / f"{number}.dcm"))
        writer.Execute(image)
        dataset = pydicom.dcmread(tmp_path / f"{number}.dcm")
        dataset.RescaleSlope, dataset.RescaleIntercept = 1 + number / 4, -10 * number
        dataset.save_as(tmp_path / f"{number}.dcm")
    assert dataset.file_meta.TransferSyntaxUID.is_compressed
    expected = [pixels * (1 + number / 4) - 10 * number for number, pixels in enumerate(values)]
    assert_reads(tmp_path, expected)


def changed(name, value, *last):
    """An element of all slices, or one that is another in the last slice."""
    return lambda number: {name: last[0] if last and number == SLICES[-1] else value}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed("RescaleIntercept", None), "4 of its 4 slices lack RescaleSlope or RescaleIntercept"),
        (changed("RescaleSlope", 1, None), "1 of its 4 slices lack RescaleSlope or RescaleIntercept"),
        (changed("RescaleSlope", 1, 0), "RescaleSlope is 0"),
        (lambda n: {"PhotometricInterpretation": "MONOCHROME1", "Modality": "MR"}, "stored inverted"),
        (changed("PhotometricInterpretation", "PALETTE COLOR"), "no grey image but PALETTE COLOR"),
        (changed("ModalityLUTSequence", [pydicom.Dataset()]), "values in a table"),
        (changed("Modality", "CT", "MR"), "differ in size or PixelSpacing, or Modality"),
        (changed("Modality", "CT", "SEG"), "03.dcm may be a slice of the DICOM series"),
        (changed("Rows", 6, None), "03.dcm may be a slice of the DICOM series"),
        (changed("SeriesInstanceUID", "1.2.3", ""), "03.dcm may be a slice of the DICOM series"),
        (changed("HighBit", 3), "HighBit 3 and BitsStored 16 contradict"),
        (changed("Rows", 5), "too long for its Rows and Columns"),
        (changed("Columns", 4), "too long for its Rows and Columns"),
        (changed("Rows", 7), "cannot be read"),
        (changed("ImagePositionPatient", [5, 6]), "4 of its 4 slices have no ImagePositionPatient"),
        (changed("ImagePositionPatient", None), "4 of its 4 slices have no ImagePositionPatient"),
        (changed("ImageOrientationPatient", [1, 0, 0, 0, 1, 0], None), "1 of its 4 slices have no ImageOrientation"),
        (changed("PixelSpacing", None), "4 of its 4 slices have no PixelSpacing"),
        (changed("PixelSpacing", [2, 0]), "PixelSpacing 0.0 mm"),
        (changed("PixelSpacing", [2, 1.5], [2, 1.7]), "differ in size or PixelSpacing"),
        (changed("ImageOrientationPatient", [1, 0, 0, 0.5, 1, 0]), "no unit vectors at right angles"),
        (changed("ImageOrientationPatient", [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]), "several planes"),
        (changed("ImagePositionPatient", [5, 6, 3], [5, 6, 9]), "several slices lie at one place"),
    ],
)
def test_what_is_missing_or_contradicts_is_named(tmp_path, change, reason):
    folder = write_series(tmp_path / "case", stored(), change)
    with pytest.raises(BadVolumeError, match=reason) as error:
        load(folder)
    assert str(folder) in str(error.value)


# --- multi-frame files ----------------------------------------------------------------------------------------------

HU = [(1, -1024)] * 4


def test_frames_in_another_order(tmp_path):
    order = [2, 0, 3, 1]
    path = write_frames(tmp_path / "a.dcm", stored()[order], [PLACES[n] for n in order], HU)
    assert_reads(path, stored().astype(int) - 1024)
    (item,) = find_volumes(tmp_path)
    assert item == {"image": str(tmp_path), "series_uid": "1.2.3"}
    assert_reads(tmp_path, stored().astype(int) - 1024)


def test_a_stack_in_two_files(tmp_path):
    for part in (slice(0, 2), slice(2, 4)):
        write_frames(tmp_path / f"{part.start}.dcm", stored()[part], PLACES[part], HU[part])
    assert_reads(tmp_path, stored().astype(int) - 1024)


@pytest.mark.parametrize(
    ("places", "scales", "shared", "reason"),
    [
        ([(5, 6, 3 * n + 6 * (n > 1)) for n in SLICES], HU, {}, "slices lie 3 to 9 mm apart"),
        ([(5, 6, 3 * (n % 2)) for n in SLICES], HU, {}, "several phases"),
        ([(5, 6 + n, 3 * n) for n in SLICES], HU, {}, "tilted gantry"),
        (PLACES, [None, *HU[1:]], {}, "1 of its 4 slices lack RescaleSlope"),
        (PLACES, HU, {"PixelMeasuresSequence": {"SliceThickness": 3}}, "4 of its 4 slices have no PixelSpacing"),
        (PLACES, HU, {"PlaneOrientationSequence": {}}, "4 of its 4 slices have no ImageOrientationPatient"),
    ],
)
def test_frames_that_are_no_volume(tmp_path, places, scales, shared, reason):
    path = write_frames(tmp_path / "a.dcm", stored(), places, scales, shared)
    with pytest.raises(BadVolumeError, match=reason) as error:
        load(path)
    assert str(path) in str(error.value)


def test_frames_without_places(tmp_path):
    write_slice(tmp_path / "a.dcm", stored(), NumberOfFrames=4)
    with pytest.raises(BadVolumeError, match=r"Cannot read .*a\.dcm has 4 frames, but places of 0"):
        load(tmp_path / "a.dcm")


def test_one_slice_is_no_scan(tmp_path):
    write_slice(tmp_path / "a.dcm", stored()[0])
    with pytest.raises(BadVolumeError, match=r"a\.dcm .*a single slice: give the folder of its series"):
        load(tmp_path / "a.dcm")


# --- the files of a series ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parent", ["{}/{}", "{1}", "disc/{0}/im/{1}"])
def test_a_series_in_several_folders_is_one_scan(tmp_path, parent):
    for number, pixels in enumerate(stored()):
        write_slice(tmp_path / parent.format(number % 2, f"{number}.dcm"), pixels, number)
    (item,) = find_volumes(tmp_path)
    assert_reads(item["image"], stored().astype(int) - 1024)
    assert len(series_files(item["image"], item["series_uid"])) == len(SLICES)


def test_copies_of_a_series_are_one_scan(tmp_path):
    for name in ("a", "b"):
        write_series(tmp_path / name, stored())
    (item,) = find_volumes(tmp_path)
    assert_reads(item["image"], stored().astype(int) - 1024)


def test_patients_who_share_a_uid_are_two_scans(tmp_path):
    for name in ("a", "b"):
        write_series(tmp_path / name, stored(), lambda n, name=name: {"PatientID": name})
    items = find_volumes(tmp_path)
    assert [item["image"] for item in items] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert load(items[0]["image"]).shape[1:] == (5, 6, 4)


@pytest.mark.parametrize("size", [40, 1000], ids=["in the pixels", "in the header"])
def test_a_truncated_slice_is_named(tmp_path, size):
    write_series(tmp_path, stored())
    path = tmp_path / "02.dcm"
    path.write_bytes(path.read_bytes()[:-size])
    with pytest.raises(BadVolumeError, match=r"02\.dcm.*[Rr]estore"):
        load(tmp_path)
