import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from made_files import SHAPE, oblique, save_dicom_series, sitk_image, voxels
from monai.data import MetaTensor
from monai.transforms import Orientationd, SaveImage

from pgl_ext.transforms.load import SUPPORTED_SUFFIXES, LoadVolumed


def load(path: Path | str, **entries) -> MetaTensor:
    return LoadVolumed("image")({"image": str(path), **entries})["image"]


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def assert_volume(image: MetaTensor, array: np.ndarray, affine: np.ndarray, tolerance: float = 1e-5) -> None:
    assert isinstance(image, MetaTensor)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image.numpy()[0], array)
    np.testing.assert_allclose(image.affine.numpy(), affine, atol=tolerance)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
def test_nifti(tmp_path, suffix):
    path = save_nifti(tmp_path / "a.nii.gz", voxels(), oblique()).rename(tmp_path / f"b{suffix}")
    if suffix == ".nii":
        save_nifti(path, voxels(), oblique())
    image = load(path)
    assert_volume(image, voxels(), oblique())
    assert image.meta["filename_or_obj"] == str(path)


def test_nifti_scale_factors_are_applied(tmp_path):
    image = nibabel.Nifti1Image(voxels(), np.eye(4))
    image.header.set_slope_inter(2, -5)
    nibabel.save(image, tmp_path / "a.nii")
    np.testing.assert_array_equal(load(tmp_path / "a.nii").numpy()[0], nibabel.load(tmp_path / "a.nii").get_fdata())


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
def test_orientation_agrees_with_nibabel(tmp_path, axes, flips):
    path = save_nifti(tmp_path / "a.nii.gz", voxels(), oblique(axes, flips))
    canonical = nibabel.as_closest_canonical(nibabel.load(path))
    image = Orientationd("image", axcodes="RAS", labels=None)({"image": load(path)})["image"]
    assert_volume(image, canonical.get_fdata(), canonical.affine)


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_nrrd_and_metaimage(tmp_path, suffix, axes):
    pytest.importorskip("itk")
    sitk = pytest.importorskip("SimpleITK")
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk_image(voxels(), oblique(axes)), str(path), True)
    image = load(path)
    assert_volume(image, voxels(), oblique(axes))
    assert image.meta["filename_or_obj"] == str(path)


@pytest.mark.parametrize(
    ("space", "signs"),
    [("left-posterior-superior", (-1, -1)), ("right-anterior-superior", (1, 1)), ("left-anterior-superior", (-1, 1))],
)
def test_nrrd_spaces(tmp_path, space, signs):
    pytest.importorskip("itk")
    nrrd = pytest.importorskip("nrrd")
    header = {"space": space, "space directions": np.diag([2.0, 3.0, 4.0]), "space origin": [1.0, 2.0, 3.0]}
    nrrd.write(str(tmp_path / "a.nrrd"), voxels(), header=header)
    expected = np.diag([*signs, 1, 1]) @ np.array([[2, 0, 0, 1], [0, 3, 0, 2], [0, 0, 4, 3], [0, 0, 0, 1]])
    assert_volume(load(tmp_path / "a.nrrd"), voxels(), expected)


@pytest.mark.parametrize("tilt", [0.0, 0.4])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 0, 1)], ids=["axial", "sagittal", "coronal"])
def test_dicom_series(tmp_path, axes, tilt):
    pytest.importorskip("itk")
    affine = oblique(axes, flips=(-1, -1, 1), tilt=tilt)
    folder = save_dicom_series(tmp_path / "case", voxels(), affine, "1.2.3")
    image = load(folder)
    assert_volume(image, voxels(), affine, 1e-4)
    assert image.meta["filename_or_obj"] == str(folder)


def moved(folder: Path, move) -> Path:
    """The series with its slices, numbered downwards, where ``move(number, position, orientation)`` puts them."""
    import pydicom

    for number, path in enumerate(sorted(folder.glob("*.dcm"))):
        slice_ = pydicom.dcmread(path)
        position, orientation = move(number, np.array(slice_.ImagePositionPatient), slice_.ImageOrientationPatient)
        slice_.ImagePositionPatient = [f"{x:.8g}" for x in position]
        slice_.ImageOrientationPatient = list(orientation)
        slice_.save_as(path)
    return folder


UNEVEN = [
    (lambda n, p, o: (np.subtract(p, [0, 0, 4.0 * (n > 2)]), o), r"slices lie 4 to 8 mm apart: complete the series"),
    (lambda n, p, o: (np.subtract(p, [0, 0, 0.6 * (n > 2)]), o), r"slices lie 4 to 4.6 mm apart: complete the series"),
    (lambda n, p, o: (np.subtract(p, [0, 0, 4.0 * (n == 2)]), o), r"several slices lie at one place"),
    (
        lambda n, p, o: (np.add(p, [0, 1.5 * n, 0]), o),
        r"shift by 9 mm from the first to the last, as with a tilted gantry",
    ),
    (lambda n, p, o: (p, [0, 1, 0, 0, 0, -1] if n == 0 else o), r"lie in several planes, as those of a localizer"),
]


@pytest.mark.parametrize(("move", "reason"), UNEVEN)
def test_slices_that_are_no_volume(tmp_path, move, reason):
    pytest.importorskip("itk")
    pytest.importorskip("pydicom")
    folder = save_dicom_series(tmp_path / "case", voxels(), np.diag([-2.0, -2, 4, 1]), "1.2.3")
    assert load(folder).shape[1:] == voxels().shape
    with pytest.raises(ValueError, match=reason) as caught:
        load(moved(folder, move))
    assert str(caught.value).startswith(f"{folder} is no regular volume: ")


def test_positions_that_were_rounded(tmp_path):
    """Steps of 0.625 mm, written with one decimal, are 0.6 and 0.7 mm."""
    pytest.importorskip("itk")
    pytest.importorskip("pydicom")
    folder = save_dicom_series(tmp_path / "case", voxels(), np.diag([-1.0, -1, 0.625, 1]), "1.2.3")
    assert load(moved(folder, lambda n, p, o: (np.round(p, 1), o))).shape[1:] == voxels().shape


def test_steps_that_hardly_differ(tmp_path):
    """4 and 4.3 mm: less than a tenth."""
    pytest.importorskip("itk")
    pytest.importorskip("pydicom")
    folder = save_dicom_series(tmp_path / "case", voxels(), np.diag([-2.0, -2, 4, 1]), "1.2.3")
    folder = moved(folder, lambda n, p, o: (np.subtract(p, [0, 0, 0.3 * (n > 2)]), o))
    assert load(folder).shape[1:] == voxels().shape


def test_two_dicom_series_in_one_folder(tmp_path):
    pytest.importorskip("itk")
    pytest.importorskip("pydicom")
    from pgl_ext.data.find import find_volumes

    affine = oblique(flips=(-1, -1, 1))
    # The UID of one is the beginning of the other's.
    arrays = {"1.2.3": voxels(), "1.2.3.4": voxels((4, 5, 3)) + 7}
    for uid, array in arrays.items():
        save_dicom_series(tmp_path, array, affine, uid, prefix=uid)
    items = find_volumes(tmp_path)
    assert [item["series_uid"] for item in items] == list(arrays)
    for item in items:
        assert_volume(LoadVolumed("image")(item)["image"], arrays[item["series_uid"]], affine, 1e-4)
    with pytest.raises(ValueError, match=r"holds 2 DICOM series: set 'series_uid' to one of 1\.2\.3, 1\.2\.3\.4"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"has no DICOM series '9\.9'"):
        load(tmp_path, series_uid="9.9")


@pytest.mark.parametrize("shape", [(5, 6, 7, 1), (5, 6, 7, 1, 1)])
def test_trailing_singletons_are_dropped(tmp_path, shape):
    image = load(save_nifti(tmp_path / "a.nii", voxels(shape), oblique()))
    assert_volume(image, voxels(shape).reshape(SHAPE), oblique())


def test_nothing_but_the_image_changes_and_several_keys_work(tmp_path):
    path = str(save_nifti(tmp_path / "a.nii", voxels()))
    item = {"image": path, "label": path, "task": "liver"}
    out = LoadVolumed(["image", "label", "absent"], allow_missing_keys=True)(item)
    assert item["image"] == path
    assert out["task"] == "liver"
    assert torch.equal(out["image"], out["label"])
    with pytest.raises(KeyError):
        LoadVolumed("absent")(item)


def test_saving_restores_the_file(tmp_path):
    path = save_nifti(tmp_path / "scan.nii.gz", voxels(), oblique((2, 0, 1)))
    SaveImage(tmp_path / "out", output_postfix="seg", print_log=False)(load(path))
    saved = nibabel.load(tmp_path / "out" / "scan" / "scan_seg.nii.gz")
    np.testing.assert_array_equal(saved.get_fdata(), voxels())
    np.testing.assert_allclose(saved.affine, oblique((2, 0, 1)), atol=1e-5)


def write_garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 100)


def write_truncated_nifti(path: Path) -> None:
    save_nifti(path, np.random.default_rng(0).normal(size=(20, 20, 20)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_truncated_itk(path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk_image(voxels((20, 20, 20)), np.eye(4)), str(path), True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_empty(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.nii", write_garbage),
        ("a.nii.gz", write_garbage),
        ("a.nii.gz", write_empty),
        ("a.nii", write_truncated_nifti),
        ("a.nii.gz", write_truncated_nifti),
        ("a.mha", write_garbage),
        ("a.mha", write_truncated_itk),
        ("a.nrrd", write_garbage),
        ("a.nrrd", write_truncated_itk),
        ("a.dcm", write_garbage),
    ],
)
def test_unreadable_file_is_named(tmp_path, name, write):
    if not name.startswith("a.nii"):
        pytest.importorskip("itk")
    write(tmp_path / name)
    with pytest.raises(ValueError, match=r"Cannot read .*restore or convert it, or remove it") as error:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.dcm"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")
    with pytest.raises(ValueError, match=rf"{name} is a pointer of Git LFS, .*`git lfs pull`"):
        load(tmp_path / name)


def write_rgb_nifti(path: Path) -> None:
    colour = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    save_nifti(path, np.zeros(SHAPE, colour))


def write_4d_nifti(path: Path) -> None:
    save_nifti(path, voxels((5, 6, 7, 3)))


def write_2d_nifti(path: Path) -> None:
    save_nifti(path, voxels((5, 6)))


def write_rgb_itk(path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((7, 6, 5, 3), np.uint8), isVector=True), str(path))


def write_4d_itk(path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 7, 6, 5), np.uint8), isVector=False), str(path))


@pytest.mark.parametrize(
    ("name", "write", "shape"),
    [
        ("a.nii.gz", write_4d_nifti, (5, 6, 7, 3)),
        ("a.nii.gz", write_rgb_nifti, (5, 6, 7, 3)),
        ("a.nii.gz", write_2d_nifti, (5, 6)),
        ("a.mha", write_4d_itk, (5, 6, 7, 3)),
        ("a.mha", write_rgb_itk, (5, 6, 7, 3)),
        ("a.nrrd", write_rgb_itk, (5, 6, 7, 3)),
    ],
)
def test_other_than_single_channel_3d_is_refused(tmp_path, name, write, shape):
    if name != "a.nii.gz":
        pytest.importorskip("itk")
    write(tmp_path / name)
    with pytest.raises(ValueError, match="which is no 3D volume") as error:
        load(tmp_path / name)
    assert f"{tmp_path / name} has shape {shape}" in str(error.value)


def test_unsupported_type_and_missing_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.png is of an unsupported type '\.png'") as error:
        load(tmp_path / "a.png")
    assert all(suffix in str(error.value) for suffix in SUPPORTED_SUFFIXES)
    with pytest.raises(FileNotFoundError, match=r"b\.nii does not exist"):
        load(tmp_path / "b.nii")


def test_folder_without_dicom(tmp_path):
    pytest.importorskip("itk")
    with pytest.raises(ValueError, match="holds no DICOM series"):
        load(tmp_path)


@pytest.mark.slow
def test_works_without_the_optional_packages(tmp_path):
    save_nifti(tmp_path / "a.nii", voxels())
    for name in ("a.mha", "a.dcm"):
        write_garbage(tmp_path / name)
    script = """
import sys
sys.modules.update(dict.fromkeys(["itk", "nrrd", "pydicom", "SimpleITK"]))
from pgl_ext.data.find import find_volumes
from pgl_ext.transforms.load import LoadVolumed
print(tuple(LoadVolumed("image")({"image": "a.nii"})["image"].shape))
for attempt in (lambda: LoadVolumed("image")({"image": "a.mha"}), lambda: find_volumes(".")):
    try:
        attempt()
    except ImportError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    shape, metaimage, dicom = run.stdout.splitlines()
    assert shape == "(1, 5, 6, 7)"
    assert "a.mha" in metaimage
    assert "pip install itk" in metaimage
    assert "a.dcm" in dicom
    assert "pip install pydicom" in dicom
