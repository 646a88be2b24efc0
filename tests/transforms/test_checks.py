import pickle

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from pgl_ext.task import SegmentationTask
from pgl_ext.tools.phantom import LABELS, ORIENTATIONS, generate_case
from pgl_ext.transforms import LoadVolumed
from pgl_ext.transforms.checks import BadVolumeError, BadVolumesError, CheckLabeld, CheckVolumed, check_volume


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
    [(affine(a11=0), "zero spacing"), (affine(a11=0, a01=3), "singular affine"), (affine(a03=np.nan), "not finite")],
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


@pytest.mark.parametrize(
    ("values", "is_label_map"),
    [
        (np.arange(14), True),
        (np.arange(50), True),
        (np.arange(51), False),
        ([0, 255], True),
        ([-1024, 0, 1], True),
        (np.arange(14) / 2, False),  # a map of probabilities, say
        (np.arange(-1024, 325), False),
    ],
)
@pytest.mark.parametrize("voxels", [8000, 100])
def test_what_looks_like_a_label_map_is_mentioned(values, is_label_map, voxels, caplog):
    """Also where nearly all voxels have one value, as in masks of small organs and in scans that are padded."""
    image = np.zeros((1, 64, 64, 40), dtype=np.float32)
    image.reshape(-1)[50001 : 50001 + voxels] = np.resize(values[-voxels:], voxels)
    image = MetaTensor(torch.from_numpy(image), meta={"filename_or_obj": "/data/liver.nii"})
    assert CheckVolumed("image")({"image": image})["image"] is image
    found = len(np.union1d(values, 0))
    message = f"/data/liver.nii looks like a label map, but is taken for a scan: its voxels have only {found} different"
    assert (message in caplog.text) is is_label_map


def test_all_bad_volumes_are_listed_and_survive_pickling():
    bad = {f"/data/{i}.nii": f"reason {i}" for i in range(30)}
    error = pickle.loads(pickle.dumps(BadVolumesError(bad, total=100)))
    assert error.bad == bad
    assert all(name in str(error) and reason in str(error) for name, reason in bad.items())
    assert "30 of 100" in str(error)
    assert "--skip_bad_files true" in str(error)


# ---- Label maps

TASK = SegmentationTask({"kidney": [1, 2], "tumour": [2], "cyst": [5]}, background_values=[0, 7], multi_label=True)
SHAPE = (9, 8, 7)
ANGLE = np.deg2rad(20)
OBLIQUE = np.array(
    [
        [1.5 * np.cos(ANGLE), -2 * np.sin(ANGLE), 0, -100],
        [1.5 * np.sin(ANGLE), 2 * np.cos(ANGLE), 0, 30],
        [0, 0, 3, 700],
        [0, 0, 0, 1],
    ]
)


def label_map(**voxels: float) -> np.ndarray:
    label = np.random.default_rng(0).choice([0.0, 1, 2, 5, 7], size=SHAPE)
    label.reshape(-1)[: len(voxels)] = list(voxels.values())
    return label


def pair(
    label: np.ndarray, label_affine: np.ndarray = OBLIQUE, affine: np.ndarray = OBLIQUE, shape: tuple = SHAPE
) -> dict:
    return {
        "image": MetaTensor(torch.ones(1, *shape), affine=torch.tensor(affine), meta={"filename_or_obj": "/d/im.nii"}),
        "label": MetaTensor(
            torch.as_tensor(label, dtype=torch.float32)[None],
            affine=torch.tensor(label_affine),
            meta={"filename_or_obj": "/d/la.nii"},
        ),
    }


def moved(voxels: float, axis: int = 0) -> np.ndarray:
    """The affine with its first voxel so many voxels further along an axis."""
    affine = OBLIQUE.copy()
    affine[:, 3] += voxels * affine[:, axis]
    return affine


def test_good_label_map_passes_unchanged():
    data = pair(label_map())
    out = CheckLabeld("label", TASK)(data)
    assert out["label"] is data["label"]
    assert out["image"] is data["image"]


def scaled(factor: float) -> np.ndarray:
    return OBLIQUE @ np.diag([factor, 1, 1, 1])


@pytest.mark.parametrize("affine", [moved(0.09), moved(-0.09, axis=2), scaled(1.01)])
def test_affines_that_differ_by_rounding_are_made_equal(affine):
    data = pair(label_map(), affine)
    out = CheckLabeld("label", TASK)(data)
    assert torch.equal(out["label"].affine, data["image"].affine)
    np.testing.assert_array_equal(out["label"], data["label"])
    np.testing.assert_array_equal(data["label"].affine, affine)


@pytest.mark.parametrize("affine", [moved(0.11), moved(-0.11, axis=2), moved(3, axis=1), scaled(1.02)])
def test_label_map_on_another_grid_of_the_same_shape(affine):
    with pytest.raises(
        BadVolumeError, match=r"la\.nii lies on another grid than its image /d/im\.nii: corners"
    ) as error:
        CheckLabeld("label", TASK)(pair(label_map(), affine))
    assert "nearest neighbour" in str(error.value)


def test_label_map_of_another_shape():
    with pytest.raises(
        BadVolumeError, match=r"shape \(9, 8, 7\) at \[1.5, 2.0, 3.0\] mm against \(9, 8, 14\)"
    ) as error:
        CheckLabeld("label", TASK)(pair(label_map(), shape=(9, 8, 14)))
    assert all(word in str(error.value) for word in ("/d/la.nii", "/d/im.nii", "nearest neighbour"))


@pytest.mark.parametrize("shape", [SHAPE, (9, 8, 14)])
def test_label_map_elsewhere(shape):
    with pytest.raises(BadVolumeError, match=r"la\.nii does not overlap its image /d/im\.nii: it spans"):
        CheckLabeld("label", TASK)(pair(label_map(), moved(15, axis=2), shape=shape))


@pytest.mark.parametrize("image_axes", ORIENTATIONS)
@pytest.mark.parametrize("label_axes", [*ORIENTATIONS, "SRP"])
def test_label_map_stored_along_other_axes_is_turned(tmp_path, image_axes, label_axes):
    """Each voxel keeps its place in mm, and lies where the image's lies."""
    image, label, affine = generate_case(0, (20, 18, 16), orientation=image_axes)
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(label_axes))
    turned = nibabel.Nifti1Image(label, affine).as_reoriented(turn)
    nibabel.save(nibabel.Nifti1Image(image, affine), tmp_path / "image.nii")
    nibabel.save(turned, tmp_path / "label.nii")
    task = SegmentationTask({name: [value] for value, name in enumerate(LABELS) if value})
    keys = ["image", "label"]
    data = LoadVolumed(keys)({key: str(tmp_path / f"{key}.nii") for key in keys})
    out = CheckLabeld("label", task)(data)["label"]
    np.testing.assert_array_equal(out[0], label)
    np.testing.assert_array_equal(out.affine, data["image"].affine)


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        ({"a": 3, "b": 3, "c": 9}, r"not the task's: 3 \(2 voxels\), 9 \(1 voxels\); the task's are \[0, 1, 2, 5, 7\]"),
        ({"a": -1}, r"-1 \(1 voxels\).*background_values"),
        ({"a": np.nan, "b": 0.5, "c": 1.2, "d": 3}, "1 NaN voxels and 2 whose value is not a whole number, such as"),
        ({"a": np.inf}, "inf"),
        ({str(value): value for value in range(100, 130)}, r"100 \(1 voxels\).*109 \(1 voxels\) and 20 more"),
    ],
)
def test_values_that_are_not_the_task_s(voxels, message):
    with pytest.raises(BadVolumeError, match=rf"/d/la\.nii has .*{message}"):
        CheckLabeld("label", TASK)(pair(label_map(**voxels)))


@pytest.mark.parametrize("value", [0, 7])
def test_empty_label_map(value):
    with pytest.raises(BadVolumeError, match=r"/d/la\.nii is empty: none of its 504 voxels"):
        CheckLabeld("label", TASK)(pair(np.full(SHAPE, value)))


def test_label_map_without_an_affine_that_can_be_used():
    with pytest.raises(BadVolumeError, match=r"/d/la\.nii has zero spacing"):
        CheckLabeld("label", TASK)(pair(label_map(), OBLIQUE @ np.diag([0, 1, 1, 1])))


def test_label_values_that_float16_cannot_hold():
    CheckLabeld("label", SegmentationTask({"organ": [2048]}))
    with pytest.raises(ValueError, match="label value 2049, but values above 2048"):
        CheckLabeld("label", SegmentationTask({"organ": [2049]}))
    assert np.array_equal(np.arange(2049), np.arange(2049).astype(np.float16))


def test_label_map_must_not_be_absent():
    data = {"image": pair(label_map())["image"]}
    with pytest.raises(KeyError):
        CheckLabeld("label", TASK)(data)
