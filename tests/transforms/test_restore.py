from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from made_files import oblique_affine
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Invertd, Orientationd, Spacingd, SpatialResample

from pgl_ext.task import SegmentationTask
from pgl_ext.transforms import LoadVolumed, restore
from pgl_ext.transforms.restore import RestoreOrgansd, predictive_entropy

SHAPE = (30, 26, 18)
ORGANS = SegmentationTask({"liver": [1], "spleen": [2]})
OVERLAPPING = SegmentationTask({"kidney": [1, 2], "tumour": [2]}, multi_label=True)


def preprocessing(spacing=(1.5, 1.4, 2.5)) -> Compose:
    return Compose(
        [
            LoadVolumed("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            *([Spacingd("image", pixdim=spacing)] if spacing else []),
        ]
    )


def scan(tmp_path, affine: np.ndarray, spacing=(1.5, 1.4, 2.5)) -> dict:
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "scan.nii.gz")
    return preprocessing(spacing)({"image": str(tmp_path / "scan.nii.gz")})


def smooth_probabilities(task: SegmentationTask, shape, seed: int = 0) -> torch.Tensor:
    coarse = torch.randn(1, task.out_channels, 5, 5, 4, generator=torch.Generator().manual_seed(seed))
    return task.probabilities(3 * torch.nn.functional.interpolate(coarse, size=tuple(shape), mode="trilinear"))[0]


def by_monai(probabilities: torch.Tensor, image: MetaTensor, affine: np.ndarray) -> torch.Tensor:
    resample = SpatialResample(mode="bilinear", padding_mode="border")
    source = MetaTensor(probabilities, affine=image.affine)
    return resample(source, dst_affine=torch.from_numpy(affine), spatial_size=SHAPE).as_tensor()


@pytest.mark.parametrize("task", [ORGANS, OVERLAPPING])
@pytest.mark.parametrize("spacing", [None, (1.5, 1.4, 2.5), (0.7, 0.8, 0.9)])
@pytest.mark.parametrize(
    "affine", [np.eye(4), oblique_affine(), oblique_affine(shear=0.2)], ids=["plain", "oblique", "sheared"]
)
def test_agrees_with_monai(tmp_path, monkeypatch, task, spacing, affine):
    """The last affine has a tilted gantry, which MONAI's Spacing takes out: its grids share no axes."""
    monkeypatch.setattr(restore, "_SLAB_VALUES", 5000)  # several slabs
    data = scan(tmp_path, affine, spacing)
    probabilities = smooth_probabilities(task, data["image"].shape[1:])
    out = RestoreOrgansd("pred", task, probabilities=True)({**data, "pred": probabilities})
    stored = nib.load(tmp_path / "scan.nii.gz").affine
    expected = by_monai(probabilities, data["image"], stored)
    torch.testing.assert_close(out["pred_probabilities"].as_tensor(), expected, atol=2e-4, rtol=0)
    assert torch.equal(out["pred"].as_tensor(), task.masks_of_probabilities(out["pred_probabilities"].as_tensor()))
    assert out["pred"].dtype == torch.bool
    assert out["pred"].shape == (2, *SHAPE)
    for name in ("pred", "pred_probabilities"):
        np.testing.assert_allclose(np.asarray(out[name].affine), stored, atol=1e-6)
    assert "pred_uncertainty" not in out


def test_same_axes_are_found_for_every_orientation(tmp_path):
    """All 48 ways to store a volume take the fast path, and without resampling give back every voxel."""
    for orientation in [x + y + z for x in "RL" for y in "AP" for z in "SI"] + ["PSR", "SLA", "AIL", "ILP"]:
        affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(tuple(orientation)), SHAPE)
        turned = oblique_affine() @ affine
        data = scan(tmp_path, turned, None)
        stored = nib.load(tmp_path / "scan.nii.gz")
        masks = torch.cat([data["image"] < 0, data["image"] >= 0])
        pred = RestoreOrgansd("pred", SegmentationTask({"a": 1, "b": 2}, multi_label=True))(
            {**data, "pred": masks * 0.8}
        )
        assert np.array_equal(pred["pred"][0].numpy(), stored.get_fdata() < 0)


def test_coordinates_survive(tmp_path):
    """A probability that is linear in millimetres is the same function of millimetres afterwards."""
    data = scan(tmp_path, oblique_affine())
    direction, offset = np.array([0.004, -0.003, 0.005]), 0.5

    def ramp(shape, affine):
        grid = np.stack([*np.meshgrid(*map(np.arange, shape), indexing="ij"), np.ones(shape)], axis=-1)
        return torch.from_numpy((grid @ np.asarray(affine).T)[..., :3] @ direction + offset).float()[None]

    task = SegmentationTask({"one side": 1}, multi_label=True)
    pred = ramp(data["image"].shape[1:], data["image"].affine)
    out = RestoreOrgansd("pred", task, probabilities=True)({**data, "pred": pred})
    expected = ramp(SHAPE, nib.load(tmp_path / "scan.nii.gz").affine)
    inner = (slice(None), *[slice(4, -4)] * 3)
    torch.testing.assert_close(out["pred_probabilities"].as_tensor()[inner], expected[inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_through_a_loader(tmp_path, suffix):
    """The meta of either reader is still there after collating and decollating."""
    voxels = SimpleITK.GetImageFromArray(np.random.default_rng(0).normal(size=SHAPE[::-1]).astype(np.float32))
    voxels.SetSpacing((0.9, 1.7, 3.1))
    voxels.SetDirection(np.linalg.qr(oblique_affine()[:3, :3])[0].ravel())
    SimpleITK.WriteImage(voxels, str(tmp_path / f"scan{suffix}"))
    dataset = Dataset([{"image": str(tmp_path / f"scan{suffix}")}], preprocessing())
    (item,) = decollate_batch(next(iter(DataLoader(dataset, batch_size=1))))
    probabilities = smooth_probabilities(ORGANS, item["image"].shape[1:])
    out = RestoreOrgansd("pred", ORGANS, probabilities=True)({**item, "pred": probabilities})
    expected = by_monai(
        probabilities, item["image"], np.asarray(LoadVolumed("x")({"x": dataset.data[0]["image"]})["x"].affine)
    )
    torch.testing.assert_close(out["pred_probabilities"].as_tensor(), expected, atol=2e-4, rtol=0)
    assert out["pred"].meta["filename_or_obj"].endswith(suffix)


def test_agrees_with_inverting_the_preprocessing(tmp_path):
    scan(tmp_path, oblique_affine())
    transform = preprocessing()
    data = transform({"image": str(tmp_path / "scan.nii.gz")})
    probabilities = smooth_probabilities(ORGANS, data["image"].shape[1:])
    pred = MetaTensor(probabilities, meta=data["image"].meta)
    out = RestoreOrgansd("pred", ORGANS, probabilities=True)({**data, "pred": pred})
    inverted = Invertd("pred", transform, "image", nearest_interp=False)({**data, "pred": pred})["pred"]
    assert inverted.shape == (3, *SHAPE)
    # The inversion reads zeros, not the border, beyond the last samples.
    inner = (slice(None), *[slice(2, -2)] * 3)
    difference = (out["pred_probabilities"][inner] - inverted[inner]).abs()
    assert difference.max() < 2e-4


def test_entropy():
    """Certain is 0, undecided is 1; scipy's entropy in between."""
    from scipy.stats import entropy

    probabilities = smooth_probabilities(ORGANS, (6, 5, 4)).double()
    expected = entropy(probabilities.numpy(), axis=0, base=3)[None]
    np.testing.assert_allclose(predictive_entropy(probabilities, ORGANS), expected, atol=1e-6)
    certain, undecided = torch.tensor([1.0, 0, 0]), torch.full((3,), 1 / 3)
    for value, wanted in ((certain, 0), (undecided, 1)):
        assert predictive_entropy(value.view(3, 1, 1, 1), ORGANS).item() == pytest.approx(wanted, abs=1e-6)
    for value, wanted in (([0, 1], 0), ([0.5, 1], 1), ([0.25, 0.9], entropy([0.25, 0.75], base=2))):
        found = predictive_entropy(torch.tensor(value).view(2, 1, 1, 1), OVERLAPPING)
        assert found.item() == pytest.approx(wanted, abs=1e-6)


def test_uncertainty_is_that_of_the_probabilities_there(tmp_path):
    data = scan(tmp_path, oblique_affine())
    pred = smooth_probabilities(ORGANS, data["image"].shape[1:])
    out = RestoreOrgansd("pred", ORGANS, probabilities=True, uncertainty=True)({**data, "pred": pred})
    assert out["pred_uncertainty"].shape == (1, *SHAPE)
    expected = predictive_entropy(out["pred_probabilities"].as_tensor(), ORGANS)
    torch.testing.assert_close(out["pred_uncertainty"].as_tensor(), expected)


def test_what_does_not_fit(tmp_path):
    data = scan(tmp_path, np.eye(4))
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4, 4\).*2 organs.*needs \(3, "):
        RestoreOrgansd("pred", ORGANS)({**data, "pred": torch.zeros(2, 4, 4, 4)})
    with pytest.raises(ValueError, match=r"original_affine.*LoadVolumed"):
        RestoreOrgansd("pred", ORGANS)({"image": MetaTensor(torch.zeros(1, 4, 4, 4)), "pred": torch.zeros(3, 4, 4, 4)})
    with pytest.raises(KeyError):
        RestoreOrgansd("pred", ORGANS)(data)
