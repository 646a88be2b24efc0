"""Phantoms: what their voxels hold, where the organs lie, and what is written."""

import json

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist

from pgl_ext.tools.phantom import LABELS, ORIENTATIONS, generate_case, write_dataset

SMALL = (64, 64, 32)
TINY = (16, 16, 16)
# Limits of an organ's mean HU, with fat and air in the voxels at its edge, and of its volume in ml.
EXPECTED = {
    "lungs": ((-880, -650), (900, 5000)),
    "ribs": ((150, 600), (150, 900)),
    "spine": ((130, 500), (150, 900)),
    "liver": ((30, 130), (500, 2600)),
    "spleen": ((0, 130), (60, 600)),
    "kidneys": ((0, 190), (90, 600)),
    "aorta": ((0, 270), (40, 250)),
    "stomach": ((-600, 150), (100, 900)),
}


@pytest.fixture(scope="module")
def cases():
    return [generate_case(seed, SMALL, ORIENTATIONS[seed % 3]) for seed in range(9)]


def organ_centres(label: np.ndarray, affine: np.ndarray) -> dict[str, np.ndarray]:
    """Centre of every organ in mm: x to the patient's right, y to the front, z to the head."""
    return {
        name: nib.affines.apply_affine(affine, np.argwhere(label == value).mean(0))
        for value, name in enumerate(LABELS)
        if value
    }


def organ_volumes(label: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Millilitres of every organ."""
    return np.bincount(label.ravel(), minlength=len(LABELS))[1:] * abs(np.linalg.det(affine)) / 1000


def test_the_seed_alone_decides():
    for first, second in zip(generate_case(7, SMALL), generate_case(7, SMALL), strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(generate_case(7, SMALL)[1], generate_case(8, SMALL)[1])


def test_default_grid():
    image, _, affine = generate_case(0)
    assert image.shape[:2] == (128, 128)
    assert 56 <= image.shape[2] <= 76
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), (2.9, 2.9, 4), rtol=0.25)


def test_spacings_differ(cases):
    assert len({tuple(nib.affines.voxel_sizes(affine)) for *_, affine in cases}) == len(cases)


def test_body_lies_in_air(cases):
    for image, label, _ in cases:
        assert (image.dtype, label.dtype) == (np.int16, np.uint8)
        assert image.shape == label.shape == SMALL
        assert image.min() >= -1024
        assert image[:4, :4].mean() < -950
        assert 0.2 < (image > -400).mean() < 0.7


def test_organs_have_plausible_intensities_and_volumes(cases):
    for image, label, affine in cases:
        volumes = organ_volumes(label, affine)
        for value, name in enumerate(LABELS[1:], 1):
            (least_hu, most_hu), (least_ml, most_ml) = EXPECTED[name]
            assert least_hu < image[label == value].mean() < most_hu, name
            assert least_ml < volumes[value - 1] < most_ml, name


def test_organs_lie_where_they_belong(cases):
    for _, label, affine in cases:
        at = organ_centres(label, affine)
        assert at["liver"][0] > at["spine"][0] + 20
        assert at["spleen"][0] < at["spine"][0] - 40
        assert at["stomach"][0] < at["spine"][0] - 10
        assert at["aorta"][0] < at["spine"][0]
        assert at["stomach"][1] > at["aorta"][1] > at["spine"][1]
        assert at["lungs"][2] > at["liver"][2] > at["kidneys"][2]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation_changes_the_grid_but_not_the_patient(orientation):
    image, label, affine = generate_case(3, SMALL, orientation)
    expected_image, expected_label, expected_affine = generate_case(3, SMALL, "RAS")
    assert "".join(nib.aff2axcodes(affine)) == orientation
    for voxels, expected in ((image, expected_image), (label, expected_label)):
        canonical = nib.as_closest_canonical(nib.Nifti1Image(voxels, affine))
        np.testing.assert_array_equal(canonical.dataobj, expected)
        np.testing.assert_allclose(canonical.affine, expected_affine)


def test_shape_changes_the_resolution_but_not_the_patient():
    _, coarse, coarse_affine = generate_case(3, SMALL)
    _, fine, fine_affine = generate_case(3, (96, 96, 64))
    np.testing.assert_allclose(organ_volumes(coarse, coarse_affine), organ_volumes(fine, fine_affine), rtol=0.1)
    centres = organ_centres(fine, fine_affine)
    for name, centre in organ_centres(coarse, coarse_affine).items():
        np.testing.assert_allclose(centre, centres[name], atol=4, err_msg=name)


def test_dataset_loads_in_monai(tmp_path):
    path = write_dataset(tmp_path / "data", cases=3, seed=5, test_cases=1, shape=TINY)
    content = json.loads(path.read_text())
    assert content["labels"] == {str(value): name for value, name in enumerate(LABELS)}
    assert (content["numTraining"], content["numTest"]) == (3, 1)
    training = load_decathlon_datalist(path, data_list_key="training")
    assert len(training) == 3
    assert len(load_decathlon_datalist(path, data_list_key="test")) == 1
    for item, orientation in zip(training, ORIENTATIONS, strict=True):
        image, label = nib.load(item["image"]), nib.load(item["label"])
        assert image.shape == label.shape == TINY
        np.testing.assert_array_equal(image.affine, label.affine)
        assert "".join(nib.aff2axcodes(image.affine)) == orientation
        assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)


def test_a_case_does_not_depend_on_the_others(tmp_path):
    write_dataset(tmp_path / "few", cases=1, test_cases=1, shape=TINY)
    path = write_dataset(tmp_path / "more", cases=3, shape=TINY)
    assert "test" not in json.loads(path.read_text())
    for few, more in (("Tr/phantom_000", "Tr/phantom_000"), ("Ts/phantom_001", "Tr/phantom_001")):
        for kind in ("images", "labels"):
            written = (tmp_path / "few" / f"{kind}{few}.nii.gz").read_bytes()
            assert written == (tmp_path / "more" / f"{kind}{more}.nii.gz").read_bytes()


def test_an_equal_call_leaves_everything_as_it_is(tmp_path):
    path = write_dataset(tmp_path, cases=1, shape=TINY)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert write_dataset(tmp_path, cases=1, shape=list(TINY)) == path
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("change", [{"cases": 2}, {"seed": 1}, {"test_cases": 1}, {"shape": (17, 16, 16)}])
def test_does_not_write_into_another_data_set(tmp_path, change):
    write_dataset(tmp_path, cases=1, shape=TINY)
    with pytest.raises(FileExistsError, match="new or empty folder"):
        write_dataset(tmp_path, **{"cases": 1, "shape": TINY, **change})


def test_does_not_write_into_a_folder_with_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="new or empty folder"):
        write_dataset(tmp_path, cases=1, shape=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be >= 0"),
        ({"seed": 0, "shape": (64, 64)}, r"three numbers.*\(64, 64\)"),
        ({"seed": 0, "shape": (64, 64, 8)}, "at least 16"),
        ({"seed": 0, "orientation": "SAR"}, "orientation one of"),
    ],
)
def test_bad_arguments_of_a_case(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_case(**arguments)


@pytest.mark.parametrize("arguments", [{"cases": 0}, {"test_cases": -1}, {"seed": -1}, {"shape": (8, 8, 8)}])
def test_bad_arguments_of_a_data_set_leave_no_folder(tmp_path, arguments):
    with pytest.raises(ValueError, match="must be"):
        write_dataset(tmp_path / "new", **{"cases": 1, **arguments})
    assert not (tmp_path / "new").exists()
