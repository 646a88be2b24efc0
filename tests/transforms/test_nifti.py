"""NIfTI: voxels and grid as SimpleITK has them, or refused."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from made_files import oblique

from pgl_ext.data.headers import read_header
from pgl_ext.transforms import LoadVolumed
from pgl_ext.transforms.checks import BadVolumeError
from pgl_ext.transforms.load import read_grid

sitk = pytest.importorskip("SimpleITK")

SHAPE = (5, 6, 7)
PLAIN = np.diag([1.5, 2.0, 2.5, 1.0])


def voxels(dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(-99, 99, SHAPE).astype(dtype)


def save(path: Path, sform=None, qform=None, kind=nib.Nifti1Image, array=None, **fields) -> Path:
    """A file with these forms, and fields of the header as they are given: nibabel corrects them when it writes."""
    image = kind(voxels() if array is None else array, None)
    image.header["pixdim"][1:4] = (1.5, 2.0, 2.5)
    for name, form in (("qform", qform), ("sform", sform)):
        if form is not None:
            getattr(image, f"set_{name}")(form, code=1)
    content = bytearray(image.to_bytes())
    header = kind.header_class(content[: kind.header_class.sizeof_hdr], check=False)
    for name, value in fields.items():
        header[name] = value
    content[: kind.header_class.sizeof_hdr] = header.binaryblock
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def load(path: Path, **entries):
    return LoadVolumed("image")({"image": str(path), **entries})["image"]


def assert_as_simpleitk(path: Path) -> None:
    expected = sitk.ReadImage(str(path), sitk.sitkFloat32)
    image = load(path)
    np.testing.assert_array_equal(image.numpy()[0], sitk.GetArrayFromImage(expected).T)
    direction = np.reshape(expected.GetDirection(), (3, 3)) * expected.GetSpacing()
    affine = np.diag([-1, -1, 1]) @ np.column_stack([direction, expected.GetOrigin()])
    np.testing.assert_allclose(image.affine.numpy()[:3], affine, rtol=1e-4, atol=1e-4)
    # The header alone, which settings are planned from, is read alike.
    np.testing.assert_array_equal(read_grid({"image": str(path)})[1], image.affine.numpy())


def pixdim(*sizes, qfac=1) -> list:
    return [qfac, *sizes, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "header",
    [
        {"sform": oblique()},
        {"qform": oblique()},
        {"qform": oblique(flips=(-1, 1, 1))},
        {"sform": oblique((2, 0, 1))},
        {"sform": PLAIN, "qform": PLAIN},
        {"sform": PLAIN, "pixdim": pixdim(1.50001, 1.99999, 2.5)},
        {"sform": PLAIN, "pixdim": pixdim(1.5, 2, 2.5, qfac=0)},
        {"sform": PLAIN, "qform": PLAIN, "qform_code": 77},
        {"sform": PLAIN, "qform": PLAIN, "sform_code": -1},
        {"sform": PLAIN, "qform": PLAIN, "quatern_b": 1.5},
        {"qform": PLAIN, "pixdim": pixdim(1.5, 2, 2.5, qfac=0)},
        {"sform": oblique(), "xyzt_units": 0},
        {"sform": oblique(), "xyzt_units": 1},
        {"qform": oblique(), "xyzt_units": 3},
        {"sform": oblique(), "xyzt_units": 2 + 8},
        {"sform": PLAIN, "scl_slope": 0.37, "scl_inter": -1024},
        {"sform": PLAIN, "scl_slope": 0, "scl_inter": 0},
        {"sform": np.diag([1.2, 1.7, 2.2, 1]), "sform_code": 4, "qform": PLAIN},  # MNI: smaller than the patient
    ],
)
def test_grid_and_values(tmp_path, header):
    assert_as_simpleitk(save(tmp_path / "a.nii", **header))
    # SimpleITK does not read NIfTI-2.
    first, second = load(tmp_path / "a.nii"), load(save(tmp_path / "b.nii", kind=nib.Nifti2Image, **header))
    np.testing.assert_allclose(first.affine.numpy(), second.affine.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first.numpy(), second.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "no qform and sform, so that left and right are unknown.*orientation.*--data_list_file_path"),
        ({"sform": np.diag([1.4, 2, 2.5, 1])}, r"voxels of \[1\.39.* by its sform, but of \[1\.5, 2\.0, 2\.5\] by its"),
        ({"sform": np.diag([1.4, 2, 2.5, 1]), "qform": PLAIN}, "by its sform, but of"),
        ({"sform": PLAIN @ np.diag([-1, 1, 1, 1]), "qform": PLAIN}, "axes LAS by its sform, but RAS by its qform"),
        ({"sform": PLAIN @ np.diag([-1, -1, 1, 1]), "qform": PLAIN}, "axes LPS by its sform, but RAS by its qform"),
        ({"sform": PLAIN, "pixdim": pixdim(0, 2, 2.5)}, r"pixdim \[0\.0"),
        ({"qform": PLAIN, "pixdim": pixdim(1.5, -2, 2.5)}, "pixdim .*-2"),
        ({"qform": PLAIN, "pixdim": pixdim(1.5, np.nan, 2.5)}, "pixdim .*nan"),
        ({"qform": PLAIN, "pixdim": pixdim(1.5, 2, 2.5, qfac=-3)}, "qfac -3"),
        ({"sform": PLAIN, "xyzt_units": 5}, "xyzt_units 5"),
        ({"sform": PLAIN, "sform_code": 9}, "sform_code 9"),
        ({"sform": PLAIN, "srow_x": [1.5, 0, 0, np.nan]}, "not finite"),
        ({"sform": PLAIN, "srow_z": [0, 2.5, 0, 0], "srow_y": [2, 0, 0, 0]}, "by its sform"),
        ({"sform": PLAIN, "srow_x": [0, 0, 2.5, 0], "srow_z": [0, 0, 0, 0], "srow_y": [1.5, 2, 0, 0]}, "singular"),
        ({"qform": PLAIN, "quatern_b": np.nan}, "not finite|Cannot read"),
        ({"qform": PLAIN, "quatern_b": 0.9, "quatern_c": 0.9}, "sform_code 0, and a qform .* its quaternion"),
        ({"sform": PLAIN, "scl_slope": 0, "scl_inter": -1024}, "scl_slope 0, but scl_inter -1024"),
        ({"sform": PLAIN, "array": voxels(np.complex64)}, "complex"),
    ],
)
def test_what_is_missing_or_contradicts_is_named(tmp_path, header, message):
    path = save(tmp_path / "a.nii", **header)
    with pytest.raises(BadVolumeError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)
    if "scl_slope" not in header and "array" not in header:
        with pytest.raises(BadVolumeError, match=r"a\.nii"):
            read_header({"image": str(path)})


@pytest.mark.parametrize("orientation", ["LAS", "RAS", "LPS", "PSR"])
def test_axes_that_the_item_gives(tmp_path, orientation):
    path = save(tmp_path / "a.nii")
    image = load(path, orientation=orientation)
    np.testing.assert_array_equal(image.numpy()[0], voxels())
    assert "".join(nib.aff2axcodes(image.affine.numpy())) == orientation
    np.testing.assert_allclose(nib.affines.voxel_sizes(image.affine.numpy()), (1.5, 2, 2.5))
    np.testing.assert_allclose(image.affine.numpy() @ [2, 2.5, 3, 1], [0, 0, 0, 1], atol=1e-6)
    # What the file says is not overruled.
    named = save(tmp_path / "b.nii", sform=oblique())
    np.testing.assert_allclose(load(named, orientation=orientation).affine.numpy(), oblique(), atol=1e-6)


@pytest.mark.parametrize("orientation", ["LA", "LAX", "LRS", "", 3])
def test_axes_that_are_none(tmp_path, orientation):
    with pytest.raises(BadVolumeError, match=r"orientation .*a\.nii"):
        load(save(tmp_path / "a.nii"), orientation=orientation)


def test_every_flipped_bit_of_a_compressed_file_is_found(tmp_path):
    path = save(tmp_path / "a.nii.gz", sform=PLAIN, array=np.random.default_rng(0).normal(size=(20, 20, 20)))
    content, rng = path.read_bytes(), np.random.default_rng(1)
    for place in rng.integers(20, len(content), 40):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(BadVolumeError, match=r"Cannot read .*a\.nii\.gz"):
            load(path)


@pytest.mark.parametrize(("end", "is_good"), [(b"", True), (bytes(64), True), (b"garbage", False), (None, False)])
def test_what_follows_a_compressed_file(tmp_path, end, is_good):
    """Zeros are padding; None: the checksum is cut off."""
    path = save(tmp_path / "a.nii.gz", sform=PLAIN)
    path.write_bytes(path.read_bytes()[:-8] if end is None else path.read_bytes() + end)
    if is_good:
        assert_as_simpleitk(path)
    else:
        with pytest.raises(BadVolumeError, match=r"Cannot read .*a\.nii\.gz"):
            load(path)
