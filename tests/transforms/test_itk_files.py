"""NRRD and MetaImage: voxels and grid as pynrrd and the bytes of the file have them, or refused."""

import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pgl_ext.transforms import LoadVolumed
from pgl_ext.transforms.checks import BadVolumeError

pytest.importorskip("itk")
nrrd = pytest.importorskip("nrrd")

VOXELS = np.random.default_rng(0).integers(-999, 999, (5, 6, 7)).astype(np.int16)
DIRECTIONS = np.array([[2, 0.5, 0], [0, 3, 0], [0, 0, -4]])  # a row for each axis
ORIGIN = np.array([1.0, 2, 3])
LPS = {"space": "left-posterior-superior", "space directions": DIRECTIONS, "space origin": ORIGIN}


def load(path: Path, **entries):
    return LoadVolumed("image")({"image": str(path), **entries})["image"]


def write_nrrd(path: Path, **header) -> Path:
    nrrd.write(str(path), VOXELS, header={**LPS, **header})
    return path


def write_meta(path: Path, data: bytes | None = None, **header) -> Path:
    data = VOXELS.tobytes(order="F") if data is None else data
    if header.get("CompressedData") == "True":
        data = zlib.compress(data)
        header.setdefault("CompressedDataSize", len(data))
    fields = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "TransformMatrix": "0 1 0 -1 0 0 0 0 1",
        "Offset": "1 2 3",
        "ElementSpacing": "2 3 4",
        "DimSize": "5 6 7",
        "ElementType": "MET_SHORT",
        **header,
        "ElementDataFile": "LOCAL",
    }
    text = "".join(f"{name} = {value}\n" for name, value in fields.items() if value is not None)
    path.write_bytes(text.encode() + data)
    return path


META_AFFINE = np.array([[0, 3.0, 0, -1], [-2, 0, 0, -2], [0, 0, 4, 3]])  # the matrix has a row for each axis


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr"])
@pytest.mark.parametrize(
    ("header", "scale"),
    [
        ({}, [-1, -1, 1]),
        ({"encoding": "raw", "endian": "big"}, [-1, -1, 1]),
        ({"encoding": "ascii"}, [-1, -1, 1]),
        ({"space": "RAS"}, [1, 1, 1]),
        ({"space": "left-anterior-superior"}, [-1, 1, 1]),
        ({"space units": ["um"] * 3}, [-1e-3, -1e-3, 1e-3]),
        ({"space units": ["mm", "mm", "cm"]}, [-1, -1, 10]),
        ({"space units": ["millimeters"] * 3}, [-1, -1, 1]),
    ],
)
def test_nrrd_as_pynrrd_reads_it(tmp_path, suffix, header, scale):
    path = write_nrrd(tmp_path / f"a{suffix}", **header)
    voxels, found = nrrd.read(str(path))
    image = load(path)
    np.testing.assert_array_equal(image.numpy()[0], voxels)
    expected = np.column_stack([found["space directions"].T, found["space origin"]])
    np.testing.assert_allclose(image.affine.numpy()[:3], np.diag(scale) @ expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("header", "units"),
    [
        ({}, 1),
        ({"CompressedData": "True"}, 1),
        ({"ElementSpacing": None, "ElementSize": "2 3 4"}, 1),
        ({"DistanceUnits": "um"}, 1e-3),
        ({"DistanceUnits": "mm"}, 1),
        ({"data": VOXELS.astype(">i2").tobytes(order="F"), "BinaryDataByteOrderMSB": "True"}, 1),
    ],
)
def test_meta_image_as_its_bytes_say(tmp_path, header, units):
    image = load(write_meta(tmp_path / "a.mha", **header))
    np.testing.assert_array_equal(image.numpy()[0], VOXELS)
    np.testing.assert_allclose(image.affine.numpy()[:3], META_AFFINE * units, rtol=1e-6)


NO_DIRECTIONS = {"space": None, "space directions": None, "space origin": None}


@pytest.mark.parametrize(
    ("write", "header", "message"),
    [
        (write_nrrd, {**NO_DIRECTIONS, "spacings": [2, 3, 4]}, "no space and space directions.*left and right are unk"),
        (write_nrrd, {"space": "scanner-xyz"}, "left and right are unknown"),
        (write_nrrd, NO_DIRECTIONS, "no spacings, so that the size of its voxels is unknown"),
        (write_nrrd, {"space units": ["pixel"] * 3}, "units pixel, pixel, pixel"),
        (write_nrrd, {"space directions": np.diag([2, 0, 4.0])}, "Cannot read|zero"),
        (write_nrrd, {"space directions": np.diag([2, np.nan, 4.0])}, "Cannot read|not finite"),
        (write_meta, {"TransformMatrix": None}, "no TransformMatrix, so that left and right are unknown"),
        (write_meta, {"ElementSpacing": None}, "no ElementSpacing, so that the size of its voxels is unknown"),
        (write_meta, {"ElementSpacing": "2 -3 4"}, "not above 0"),
        (write_meta, {"ElementSpacing": "2 nan 4"}, "Cannot read|not above 0"),
        (write_meta, {"TransformMatrix": "2 0 0 0 1 0 0 0 1"}, "no unit vectors"),
        (write_meta, {"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "Cannot read|singular"),
        (write_meta, {"DistanceUnits": "furlong"}, "units furlong"),
        (write_meta, {"ElementToIntensityFunctionSlope": 2}, "ElementToIntensityFunctionSlope"),
        (write_meta, {"CompressedData": "True", "CompressedDataSize": 7}, "CompressedDataSize is 7, but its data have"),
        (write_meta, {"CompressedData": "True", "CompressedDataSize": None}, "CompressedDataSize is None"),
        (write_meta, {"CompressedData": "True", "data": b"too little"}, "it holds 10 bytes of 420"),
        (write_meta, {"data": VOXELS.tobytes(order="F")[:-9]}, "Cannot read"),
        (write_meta, {"DimSize": "5 6 6"}, "it holds 420 bytes of 360"),
        (write_meta, {"ElementType": "MET_UCHAR"}, "it holds 420 bytes of 210"),
        (write_meta, {"BinaryData": None}, "does not say BinaryData = True"),
        (write_meta, {"Offset": "1 2"}, "'1 2' for Offset, not 3 numbers"),
        (write_meta, {"Offset ": "1 2 4"}, "two values for Offset, 1 2 3 and 1 2 4"),
    ],
)
def test_what_is_missing_or_contradicts_is_named(tmp_path, write, header, message):
    path = tmp_path / ("a.nrrd" if write is write_nrrd else "a.mha")
    header = {name: value for name, value in header.items() if write is write_meta or value is not None}
    if header.keys() & {"spacings"} or message.startswith("no spacings"):
        nrrd.write(str(path), VOXELS, header=header)
    else:
        write(path, **header)
    with pytest.raises(BadVolumeError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_axes_that_the_item_gives(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".nrrd":
        nrrd.write(str(path), VOXELS, header={"spacings": [2, 3, 4]})
    else:
        write_meta(path, TransformMatrix=None)
    image = load(path, orientation="PSR")
    np.testing.assert_array_equal(image.numpy()[0], VOXELS)
    assert "".join(nib.aff2axcodes(image.affine.numpy())) == "PSR"
    np.testing.assert_allclose(nib.affines.voxel_sizes(image.affine.numpy()), (2, 3, 4))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nhdr"])
def test_damage_to_compressed_data_is_found(tmp_path, suffix):
    """Flipped bits, a lost end, and more behind it, of gzip and zlib."""
    path = tmp_path / f"a{suffix}"
    write_meta(path, CompressedData="True") if suffix == ".mha" else write_nrrd(path)
    data = tmp_path / "a.raw.gz" if suffix == ".nhdr" else path
    content, rng = data.read_bytes(), np.random.default_rng(0)
    start = 20 if suffix == ".nhdr" else content.index(b"LOCAL\n" if suffix == ".mha" else b"\n\n") + 20
    damaged = [content[:-4], content + b"garbage"]
    for place in rng.integers(start, len(content), 20):
        damaged.append(content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :])
    for bad in damaged:
        data.write_bytes(bad)
        with pytest.raises(BadVolumeError, match=rf"Cannot read .*a\{suffix}"):
            load(path)
    data.write_bytes(content + bytes(16))
    np.testing.assert_array_equal(load(path).numpy()[0], VOXELS)
