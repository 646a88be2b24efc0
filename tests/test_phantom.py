from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImage

from pgl_ext.tools.phantom import LABELS, ORIENTATIONS, generate_case, write_dataset

SMALL = (64, 64, 32)
# Limits of an organ's mean HU over all contrast phases, partial volume at the coarse test resolution included.
MEAN_HU = {
    "lungs": (-880, -650),
    "ribs": (180, 600),
    "spine": (150, 500),
    "liver": (30, 130),
    "spleen": (15, 130),
    "kidneys": (5, 190),
    "aorta": (15, 270),
    "stomach": (-600, 150),
}


@pytest.fixture(scope="module")
def cases():
    return [generate_case(seed, SMALL) for seed in range(12)]


def world_centre(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Centre of a mask in RAS+ mm: x grows to the patient's right, y to the front, z to the head."""
    return affine[:3, :3] @ np.argwhere(mask).mean(0) + affine[:3, 3]


def test_same_seed_same_bytes_and_global_state_untouched():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = generate_case(7, SMALL)
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    for a, b in zip(first, generate_case(7, SMALL), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()
    assert not np.array_equal(first[0], generate_case(8, SMALL)[0])


def test_types_and_grid(cases):
    for image, label, affine in cases:
        assert image.dtype == np.int16
        assert label.dtype == np.uint8
        assert image.shape == label.shape == SMALL
        assert affine.shape == (4, 4)
        assert image.min() >= -1024
        assert np.median(image[:, :, 0][:4, :4]) < -900  # air in the corner
    spacings = {tuple(np.round(np.abs(np.diag(affine))[:3], 3)) for *_, affine in cases}
    assert len(spacings) == len(cases)


def test_every_organ_is_present_with_plausible_intensity_and_volume(cases):
    for image, label, affine in cases:
        millilitres = abs(np.linalg.det(affine)) / 1000
        assert set(np.unique(label)) == set(range(len(LABELS)))
        for value, name in enumerate(LABELS[1:], 1):
            low, high = MEAN_HU[name]
            assert low < image[label == value].mean() < high, name
        volume = {name: (label == value).sum() * millilitres for value, name in enumerate(LABELS)}
        assert 1500 < volume["lungs"] < 6000
        assert 500 < volume["liver"] < 2600
        assert 40 < volume["spleen"] < 500
        assert 100 < volume["kidneys"] < 600


def test_left_and_right_in_world_coordinates(cases):
    orientations = set()
    for _, label, affine in cases:
        orientations.add("".join(nib.aff2axcodes(affine)))
        at = {name: world_centre(label == value, affine) for value, name in enumerate(LABELS) if value}
        spine = at["spine"]
        assert at["liver"][0] > spine[0] + 20
        assert at["spleen"][0] < spine[0] - 40
        assert at["stomach"][0] < spine[0] - 10
        assert at["aorta"][0] < spine[0]
        assert at["stomach"][1] > spine[1]  # in front of the spine
        assert at["lungs"][2] > at["liver"][2] > at["kidneys"][2]
    assert orientations == set(ORIENTATIONS)


def test_orientation_changes_the_grid_but_not_the_patient():
    by_orientation = {name: generate_case(3, SMALL, orientation=name) for name in ORIENTATIONS}
    reference = by_orientation["RAS"]
    for name, (image, label, affine) in by_orientation.items():
        assert "".join(nib.aff2axcodes(affine)) == name
        canonical = nib.as_closest_canonical(nib.Nifti1Image(image, affine))
        assert np.array_equal(np.asarray(canonical.dataobj), reference[0])
        assert np.allclose(canonical.affine, reference[2])
        assert np.isclose(world_centre(label == 4, affine), world_centre(reference[1] == 4, reference[2])).all()


def test_default_size_varies_in_slices_only():
    image, *_ = generate_case(0)
    assert image.shape[:2] == (128, 128)
    assert 56 <= image.shape[2] <= 76


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"seed": -1}, "seed must be >= 0"),
        ({"seed": 0, "shape": (64, 64)}, r"three numbers.*\(64, 64\)"),
        ({"seed": 0, "shape": (64, 64, 8)}, "at least 16"),
        ({"seed": 0, "orientation": "SAR"}, "orientation must be one of"),
    ],
)
def test_generate_case_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate_case(**kwargs)


def test_dataset_loads_in_monai(tmp_path):
    path = write_dataset(tmp_path / "data", cases=3, seed=5, test_cases=1, shape=(32, 32, 16))
    content = json.loads(path.read_text())
    assert content["modality"] == {"0": "CT"}
    assert content["labels"] == {str(i): name for i, name in enumerate(LABELS)}
    assert (content["numTraining"], content["numTest"]) == (3, 1)
    assert all(item["image"].startswith("./imagesTr/") for item in content["training"])
    training = load_decathlon_datalist(path, data_list_key="training")
    test = load_decathlon_datalist(path, data_list_key="test")
    assert (len(training), len(test)) == (3, 1)
    for item, orientation in zip(training, ORIENTATIONS, strict=True):
        image, label = (LoadImage(image_only=True)(item[key]) for key in ("image", "label"))
        assert image.shape == label.shape == (32, 32, 16)
        assert np.allclose(image.affine, label.affine)
        assert "".join(nib.aff2axcodes(image.affine)) == orientation
        header = nib.load(item["image"]).header
        assert header.get_data_dtype() == np.int16
        assert header.get_xyzt_units()[0] == "mm"


def test_without_test_cases_there_is_no_test_list(tmp_path):
    path = write_dataset(tmp_path, cases=1, shape=(16, 16, 16))
    assert "test" not in json.loads(path.read_text())
    assert not (tmp_path / "imagesTs").exists()


def test_repeated_call_writes_only_what_is_missing(tmp_path):
    settings = {"cases": 2, "seed": 1, "shape": (16, 16, 16)}
    path = write_dataset(tmp_path, **settings)
    first, second = sorted((tmp_path / "imagesTr").iterdir())
    times = first.stat().st_mtime_ns, path.stat().st_mtime_ns
    voxels = np.asarray(nib.load(second).dataobj)
    second.unlink()
    assert write_dataset(tmp_path, **settings) == path
    assert times == (first.stat().st_mtime_ns, path.stat().st_mtime_ns)
    assert np.array_equal(np.asarray(nib.load(second).dataobj), voxels)


def test_refuses_to_overwrite(tmp_path):
    write_dataset(tmp_path / "ours", cases=1, shape=(16, 16, 16))
    with pytest.raises(FileExistsError, match="other settings"):
        write_dataset(tmp_path / "ours", cases=2, shape=(16, 16, 16))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        write_dataset(tmp_path / "foreign", cases=1, shape=(16, 16, 16))
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]
    with pytest.raises(NotADirectoryError, match="is a file"):
        write_dataset(tmp_path / "foreign" / "thesis.txt", cases=1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cases": 0}, "cases must be at least 1, got 0"),
        ({"cases": 1, "test_cases": -1}, "test_cases must be >= 0, got -1"),
        ({"cases": 1, "seed": -1}, "seed must be >= 0, got -1"),
        ({"cases": 1, "shape": (8, 8, 8)}, "at least 16"),
    ],
)
def test_write_dataset_bad_arguments(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "new", **kwargs)
    assert not (tmp_path / "new").exists()
