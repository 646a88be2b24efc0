import pickle

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from pgl_ext.data.checks import BadVolumeError, BadVolumesError, CheckVolumed, check_volume


def good() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)


def with_voxels(value: float, count: int) -> np.ndarray:
    image = good()
    image.reshape(-1)[:count] = value
    return image


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, MetaTensor], ids=["numpy", "tensor", "metatensor"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int16])
def test_good_volume_passes(kind, dtype):
    check_volume(kind((10 * good()).astype(dtype)), "a.nii")


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["numpy", "tensor"])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (with_voxels(np.nan, 3), "3 NaN and 0 infinite of 120 voxels"),
        (with_voxels(np.inf, 2), "0 NaN and 2 infinite of 120 voxels"),
        (with_voxels(-np.inf, 1), "0 NaN and 1 infinite of 120 voxels"),
        (np.full((1, 4, 5, 6), -1000, np.float32), "constant: all 120 voxels are -1000"),
        (np.zeros((1, 4, 0, 6), np.float32), r"empty: shape \(1, 4, 0, 6\)"),
    ],
)
def test_bad_voxels(kind, image, message):
    with pytest.raises(BadVolumeError, match=rf"dir/a\.nii .*{message}"):
        check_volume(kind(image), "dir/a.nii")


def affine(**changes) -> np.ndarray:
    matrix = np.diag([2.0, 3.0, 4.0, 1.0])
    for where, value in changes.items():
        matrix[int(where[1]), int(where[2])] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (affine(a11=0), "zero spacing"),
        (affine(a11=0, a01=3), "singular affine"),
        (affine(a03=np.nan), "not finite"),
    ],
)
def test_bad_affine(matrix, message):
    with pytest.raises(BadVolumeError, match=message):
        check_volume(MetaTensor(torch.from_numpy(good()), affine=torch.from_numpy(matrix)), "a.nii")


@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_small_spacing_is_not_singular(scale):
    matrix = np.diag([scale, scale, scale, 1.0])
    check_volume(MetaTensor(torch.from_numpy(good()), affine=torch.from_numpy(matrix)), "a.nii")


def test_check_transform_names_the_file_and_changes_nothing():
    meta = {"filename_or_obj": "/data/a.nii"}
    image = MetaTensor(torch.from_numpy(good()), meta=meta)
    assert CheckVolumed("image")({"image": image})["image"] is image
    with pytest.raises(BadVolumeError, match=r"/data/a\.nii is constant"):
        CheckVolumed("image")({"image": MetaTensor(torch.zeros(1, 2, 2, 2), meta=meta)})


def test_all_bad_volumes_are_listed_and_survive_pickling():
    bad = {f"/data/{i}.nii": f"reason {i}" for i in range(30)}
    error = pickle.loads(pickle.dumps(BadVolumesError(bad, total=100)))
    assert error.bad == bad
    assert all(name in str(error) and reason in str(error) for name, reason in bad.items())
    assert "30 of 100" in str(error)
    assert "--skip_bad_files true" in str(error)
