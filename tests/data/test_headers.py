"""Size and spacing of scans along right, anterior and superior, whatever the axes of the file."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from pgl_ext.data.headers import read_header, read_headers
from pgl_ext.transforms.checks import BadVolumeError

# Axes of the file: superior, left, anterior.
AFFINE = np.array([[0, -2.0, 0, 5], [0, 0, 3.0, 6], [1.5, 0, 0, 7], [0, 0, 0, 1]])


def test_axes_are_put_in_order(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), AFFINE), tmp_path / "a.nii.gz")
    assert read_header({"image": tmp_path / "a.nii.gz"}) == ((5, 6, 4), (2.0, 3.0, 1.5))


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_formats_agree_with_simpleitk(tmp_path, suffix):
    image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16))
    image.SetSpacing((0.7, 0.8, 2.5))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    header = read_header({"image": str(tmp_path / f"a{suffix}")})
    assert header.shape == image.GetSize()
    np.testing.assert_allclose(header.spacing, image.GetSpacing(), rtol=1e-6)


def test_many_keep_their_order(tmp_path):
    for size in (3, 4, 5):
        nibabel.save(nibabel.Nifti1Image(np.zeros((size, 2, 2), np.int16), np.eye(4)), tmp_path / f"{size}.nii")
    items = [{"image": str(tmp_path / f"{size}.nii")} for size in (5, 3, 4)]
    assert [header.shape[0] for header in read_headers(items)] == [5, 3, 4]


@pytest.mark.parametrize("content", [b"", b"no NIfTI at all, but long enough to be a header" * 20])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "bad.nii").write_bytes(content)
    with pytest.raises(BadVolumeError, match=r"bad\.nii"):
        read_header({"image": str(tmp_path / "bad.nii")})


def test_slices_are_no_volumes(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5), np.int16), np.eye(4)), tmp_path / "slice.nii")
    with pytest.raises(BadVolumeError, match="three dimensions"):
        read_header({"image": str(tmp_path / "slice.nii")})
