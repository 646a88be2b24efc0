"""Preparing scans: the stock steps in their order, and the digest that tells one preparation from another."""

from __future__ import annotations

import enum
import functools
import operator
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import monai
import nibabel
import numpy as np
import pytest
import torch
from made_files import oblique, save_dicom_series
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    ConcatItemsd,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    SelectItemsd,
    Spacingd,
)

from pgl_ext import code_digest
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms import LoadVolumed, RandOverlappingViewsd, loading, preprocessing
from pgl_ext.transforms.checks import BadVolumeError
from pgl_ext.transforms.volumes import Preprocessing

SHAPE = (26, 22, 14)
TASK = SegmentationTask({"liver": [2], "kidneys": [3, 5]})
BOTH = ["image", "label"]
WINDOW = (-600, 325)


@pytest.fixture
def case(tmp_path) -> dict:
    """Image and label map whose axes are permuted, reversed and turned; HU far beyond the window."""
    rng = np.random.default_rng(0)
    affine = oblique(axes=(2, 0, 1), flips=(-1, 1, -1))
    item = {name: str(tmp_path / f"{name}.nii.gz") for name in BOTH}
    nibabel.save(nibabel.Nifti1Image(rng.normal(-100, 700, SHAPE).astype(np.float32), affine), item["image"])
    nibabel.save(nibabel.Nifti1Image(rng.choice([0, 2, 3, 5], SHAPE).astype(np.uint8), affine), item["label"])
    return item


def stock(case: dict, *steps: Callable) -> dict:
    """MONAI's transforms one after the other, from its own reader on."""
    load = LoadImaged(list(case), reader="NibabelReader", ensure_channel_first=True, image_only=True)
    return functools.reduce(lambda data, step: step(data), steps, load(case))


def assert_same(found: MetaTensor, expected: MetaTensor) -> None:
    assert torch.equal(found.as_tensor(), expected.as_tensor())
    assert torch.equal(found.affine, expected.affine)


# --- the steps ------------------------------------------------------------------------------------------------------


def test_an_image_as_stored(case):
    del case["label"]
    expected = stock(case, Orientationd("image", axcodes="RAS", labels=None), NormalizeIntensityd("image"))
    assert_same(preprocessing()(case)["image"], expected["image"])


@pytest.mark.parametrize("spacing", [(3.0, 1.7, 2.2), [1, 1, 1]])
def test_an_image_resampled_and_clipped(case, spacing):
    del case["label"]
    expected = stock(
        case,
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", pixdim=spacing, mode="bilinear"),
        ScaleIntensityRanged("image", *WINDOW, *WINDOW, clip=True),
        NormalizeIntensityd("image"),
    )
    found = preprocessing("image", spacing=spacing, hu_window=WINDOW)(case)
    assert_same(found["image"], expected["image"])
    assert found["image"].shape != (1, *SHAPE)


def test_image_and_label_map(case):
    expected = stock(
        case,
        Orientationd(BOTH, axcodes="RAS", labels=None),
        Spacingd(BOTH, pixdim=(3.0, 1.7, 2.2), mode=["bilinear", "nearest"]),
        ScaleIntensityRanged("image", *WINDOW, *WINDOW, clip=True),
        NormalizeIntensityd("image"),
    )
    found = preprocessing(BOTH, (3.0, 1.7, 2.2), WINDOW, TASK)(case)
    for name in BOTH:
        assert_same(found[name], expected[name])
    assert set(np.unique(found["label"])) == {0, 2, 3, 5}


def test_label_map_on_the_grid_of_its_file(case):
    found = preprocessing(BOTH, (3.0, 1.7, 2.2), WINDOW, TASK, labels_on_file_grid=True)(case)
    assert_same(found["image"], preprocessing(BOTH, (3.0, 1.7, 2.2), WINDOW, TASK)(case)["image"])
    assert_same(found["label"], stock(case)["label"])
    np.testing.assert_array_equal(found["label"][0].numpy(), nibabel.load(case["label"]).dataobj)


def test_further_steps_come_last(case):
    extra = [ConcatItemsd(BOTH, name="both", dim=0), SelectItemsd(["both", "image"])]
    found = preprocessing(BOTH, task=TASK, extra=extra)({**case, "name": "a"})
    plain = preprocessing(BOTH, task=TASK)(case)
    assert set(found) == {"both", "image"}
    assert torch.equal(found["both"].as_tensor(), torch.cat([plain["image"], plain["label"]]).as_tensor())


def test_of_a_dicom_series(tmp_path):
    pytest.importorskip("itk")
    array = np.random.default_rng(0).integers(-1000, 1000, (9, 8, 7)).astype(np.int16)
    folder = save_dicom_series(tmp_path / "series", array, oblique(), "1.2.3")
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), oblique()), tmp_path / "same.nii")
    series = preprocessing("image", hu_window=WINDOW)({"image": str(folder), "series_uid": "1.2.3"})["image"]
    file = preprocessing("image", hu_window=WINDOW)({"image": str(tmp_path / "same.nii")})["image"]
    assert torch.equal(series.as_tensor(), file.as_tensor())


def test_loading_changes_nothing(case):
    for keys, task in ((BOTH, TASK), ("image", None)):
        found, expected = loading(keys, task)(case), stock(case)
        for name in BOTH if task else ["image"]:
            assert_same(found[name], expected[name])


@pytest.mark.parametrize("prepare", [loading, preprocessing])
def test_bad_scans_and_label_maps_are_turned_away(case, prepare):
    def problem(task: SegmentationTask) -> str:
        with pytest.raises(RuntimeError) as caught:
            prepare(BOTH, task=task)(case)
        cause = caught.value
        while not isinstance(cause, BadVolumeError):
            cause = cause.__cause__
        return str(cause)

    assert "label values that are not the task's: 3" in problem(SegmentationTask({"liver": [2]}))
    nibabel.save(nibabel.Nifti1Image(np.full(SHAPE, np.nan, np.float32), np.eye(4)), case["image"])
    assert "NaN" in problem(TASK)


# --- the digest -----------------------------------------------------------------------------------------------------


class Scale:
    """A user's own step."""

    def __init__(self, **settings: object) -> None:
        self.__dict__.update(settings)

    def __call__(self, data: dict) -> dict:
        return {**data, "image": data["image"] * 2}


class ScaleOtherwise(Scale):
    def __call__(self, data: dict) -> dict:
        return {**data, "image": data["image"] * 3}


class Mode(enum.Enum):
    ONE = 1
    OTHER = 2


def scaled_by(factor: float) -> Callable:
    return lambda image: image * factor


def times(image: torch.Tensor, factor: float = 2) -> torch.Tensor:
    return image * factor


def digest_with(step: object) -> str:
    return preprocessing("image", extra=[step]).digest


@pytest.mark.parametrize("window", [(325, -1024), (5, 5)])
def test_an_empty_window(window):
    with pytest.raises(ValueError, match=r"hu_window is \(.*: give the lower value first"):
        preprocessing("image", hu_window=window)


ARGUMENTS = {"keys": BOTH, "spacing": (1, 1, 3), "hu_window": WINDOW, "task": TASK}


@pytest.mark.parametrize(
    "changed",
    [
        {"spacing": None},
        {"spacing": (1, 1, 3.5)},
        {"hu_window": None},
        {"hu_window": (-600, 326)},
        {"keys": "image", "task": None},
        {"keys": ["image", "other"]},
        {"task": SegmentationTask({"liver": [2], "kidneys": [3, 6]})},
        {"task": SegmentationTask({"liver": [2], "kidneys": [3, 5]}, background_values=[0, 1])},
        {"task": SegmentationTask({"liver": [2], "kidneys": [3]}, background_values=[0, 5])},
        {"labels_on_file_grid": True},
        {"extra": [ConcatItemsd(BOTH, name="image", dim=0)]},
    ],
)
def test_other_arguments_other_digest(changed):
    assert preprocessing(**ARGUMENTS).digest == preprocessing(**ARGUMENTS).digest
    assert preprocessing(**{**ARGUMENTS, **changed}).digest != preprocessing(**ARGUMENTS).digest


def test_names_of_organs_change_nothing():
    for organs in ({"foie": [2], "reins": [3, 5]}, {"abdomen": [2, 3, 5]}, {"kidneys": [5, 3], "liver": [2]}):
        task = SegmentationTask(organs)
        assert preprocessing(**{**ARGUMENTS, "task": task}).digest == preprocessing(**ARGUMENTS).digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Scale(), ScaleOtherwise()),
        (Scale(a=1), Scale(b=1)),
        (Scale(a=1), Scale(a=1.5)),
        (Scale(a=[1, [2]]), Scale(a=[1, 2])),
        (Scale(a={"x": 1}), Scale(a={"x": 2})),
        (Scale(a={"x", "y"}), Scale(a={"x", "z"})),
        (Scale(a=np.zeros(3)), Scale(a=np.ones(3))),
        (Scale(a=np.zeros(3)), Scale(a=np.zeros((3, 1)))),
        (Scale(a=np.zeros(3)), Scale(a=np.zeros(3, np.float32))),
        (Scale(a=torch.zeros(3)), Scale(a=torch.ones(3))),
        (Scale(a=torch.float32), Scale(a=torch.float16)),
        (Scale(a=np.float32), Scale(a=np.float16)),
        (Scale(a=Path("a")), Scale(a=Path("b"))),
        (Scale(a=Mode.ONE), Scale(a=Mode.OTHER)),
        (Scale(a=Scale(b=1)), Scale(a=Scale(b=2))),
        (Scale(a=Scale(b=1).__call__), Scale(a=Scale(b=2).__call__)),
        (Lambdad("image", lambda x: x + 1), Lambdad("image", lambda x: x + 2)),
        (Lambdad("image", lambda x: x + 1), Lambdad("image", lambda x: x - 1)),
        (Lambdad("image", lambda x: x.abs()), Lambdad("image", lambda x: x.exp())),
        (Lambdad("image", lambda x: [y + 1 for y in x]), Lambdad("image", lambda x: [y + 2 for y in x])),
        (Lambdad("image", lambda x, by=1: x + by), Lambdad("image", lambda x, by=2: x + by)),
        (Lambdad("image", scaled_by(2)), Lambdad("image", scaled_by(3))),
        (Lambdad("image", scaled_by(2)), Lambdad("image", times)),
        (Lambdad("image", functools.partial(times, factor=2)), Lambdad("image", functools.partial(times, factor=3))),
        (Lambdad("image", operator.itemgetter(0)), Lambdad("image", operator.itemgetter(1))),
        (LoadImaged("image", dtype=np.float32), LoadImaged("image", dtype=np.float16)),
        (Spacingd("image", (1, 1, 1), mode="bilinear"), Spacingd("image", (1, 1, 1), mode="nearest")),
        (Compose([Scale(), SelectItemsd("image")]), Compose([SelectItemsd("image"), Scale()])),
    ],
)
def test_other_steps_other_digest(one, other):
    assert digest_with(one) == digest_with(one)
    assert digest_with(one) != digest_with(other)


def test_steps_of_the_same_settings_have_one_digest():
    assert digest_with(Scale(a=1, b={"x", "y"})) == digest_with(Scale(b={"y", "x"}, a=1))
    assert digest_with(Lambdad("image", scaled_by(2))) == digest_with(Lambdad("image", scaled_by(2)))
    knots = [Scale(a=1), Scale(a=1), Scale(a=2)]
    for step in knots:
        step.itself = step
    assert digest_with(knots[0]) == digest_with(knots[1]) != digest_with(knots[2])


def test_the_digest_stays_when_scans_are_prepared(case):
    prepare = preprocessing(**ARGUMENTS, extra=[Lambdad("image", times)])
    before = prepare.digest
    prepare(case)
    prepare.set_random_state(seed=1)
    assert prepare.digest == pickle.loads(pickle.dumps(prepare)).digest == before
    assert prepare.digest == preprocessing(**ARGUMENTS, extra=[Lambdad("image", times)]).digest


def test_code_and_version_count(monkeypatch):
    before = preprocessing(**ARGUMENTS).digest
    monkeypatch.setattr(monai, "__version__", "1.6.9")
    assert preprocessing(**ARGUMENTS).digest != before
    monkeypatch.undo()
    original = code_digest._source_digest
    for module, counts in (("transforms/checks.py", True), ("task.py", True), ("transforms/views.py", False)):
        source = (Path(code_digest.__file__).parent / module).read_text()
        changed = lambda text, source=source: original(text + "\nX = 1\n" if text == source else text)  # noqa: E731
        monkeypatch.setattr(code_digest, "_source_digest", changed)
        assert (preprocessing(**ARGUMENTS).digest != before) is counts, module


def test_code_of_steps_counts_whose_settings_do_not():
    """Steps that are given as they are, without arguments."""
    steps = [LoadVolumed("image"), RandOverlappingViewsd("image", (16, 16, 8))]
    assert Preprocessing(steps[:1], {}).digest != Preprocessing(steps, {}).digest


SCRIPT = """
from monai.transforms import ConcatItemsd, Lambdad
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms import preprocessing

def digest():
    task = SegmentationTask({"liver": [2], "kidneys": [3, 5]})
    extra = [
        ConcatItemsd(["image", "label"], name="image", dim=0),
        Lambdad("image", lambda image: image if image.meta.get("modality") in {"CT", "MR", "PT", "US"} else -image),
    ]
    extra[1].kinds = {"CT", "MR", "PT", "US"}
    return preprocessing(["image", "label"], (1, 1, 3), (-600, 325), task, extra=extra).digest
"""


@pytest.mark.slow
def test_another_process_with_another_hash_seed_has_the_same_digest():
    found = {}
    exec(SCRIPT, found)
    for seed in (1, 2):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", SCRIPT + "print(digest())"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.split() == [found["digest"]()]
