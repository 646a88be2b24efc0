"""Resampling beside entries that are no volumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Spacingd

from pgl_ext.transforms import VolumeSpacingd

# What MONAI Label puts into the item of an image.
OTHERS = {"image_path": "folder/scan.nii.gz", "image_size": 3, "model": "pgl_segmentation"}
SETTINGS = {"keys": ["image", "label"], "pixdim": (2.0, 1.5, 3.0), "mode": ("bilinear", "nearest")}


@pytest.fixture
def item() -> dict:
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    meta = {"filename_or_obj": "folder/scan.nii.gz"}
    torch.manual_seed(0)
    voxels = {"image": torch.rand(1, 20, 18, 12), "label": torch.randint(0, 3, (1, 20, 18, 12)).float()}
    return {key: MetaTensor(value, affine=affine, meta=meta) for key, value in voxels.items()}


@pytest.mark.parametrize("lazy", [False, True])
def test_volumes_are_those_of_monai(item, lazy):
    expected = Spacingd(**SETTINGS)(item, lazy=lazy)
    found = VolumeSpacingd(**SETTINGS)({**item, **OTHERS}, lazy=lazy)
    assert {key: found[key] for key in OTHERS} == OTHERS
    assert found.keys() == item.keys() | OTHERS.keys()
    for key, volume in expected.items():
        assert torch.equal(found[key].as_tensor(), volume.as_tensor())
        assert torch.equal(found[key].affine, volume.affine)
        assert found[key].meta["filename_or_obj"] == "folder/scan.nii.gz"


def test_is_inverted_as_monais_is(item):
    stock, ours = Spacingd(**SETTINGS), VolumeSpacingd(**SETTINGS)
    expected = stock.inverse(stock(item))
    found = ours.inverse(ours({**item, **OTHERS}))
    for key, volume in expected.items():
        assert torch.equal(found[key].as_tensor(), volume.as_tensor())
        assert found[key].shape == item[key].shape
        assert torch.equal(found[key].affine, volume.affine)


def test_monais_fails_on_text(item):
    """The reason why it is there: without the failure it can go."""
    with pytest.raises(AttributeError, match="'str' object has no attribute 'update'"):
        Spacingd(**SETTINGS)({**item, **OTHERS})


def test_missing_volumes(item):
    del item["label"]
    with pytest.raises(KeyError, match="label"):
        VolumeSpacingd(**SETTINGS)(item)
    assert VolumeSpacingd(**SETTINGS, allow_missing_keys=True)({**item, **OTHERS}).keys() == item.keys() | OTHERS.keys()
