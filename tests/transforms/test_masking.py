from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from pgl_ext.transforms import RandBlockMaskd

SIZE = (40, 33, 24)


def masks(count: int = 40, seed: int = 0, **settings) -> np.ndarray:
    transform = RandBlockMaskd("views", **settings).set_random_state(seed)
    views = torch.randn(2, 3, *SIZE)
    out = [transform({"views": views})["mask"] for _ in range(count)]
    assert all(mask.shape == (2, 1, *SIZE) and mask.dtype == torch.bool for mask in out)
    return torch.cat(out)[:, 0].numpy()


def test_views_stay_as_they_are():
    views = torch.randn(2, 1, *SIZE)
    before = views.clone()
    out = RandBlockMaskd("views")({"views": views, "affines": 1})
    assert out.keys() == {"views", "affines", "mask"}
    assert torch.equal(out["views"], before)


def test_the_share_of_hidden_voxels_lies_in_the_range():
    shares = masks(share=(0.3, 0.5)).mean(axis=(1, 2, 3))
    assert 0.35 < shares.mean() < 0.45
    assert shares.min() > 0.2
    assert shares.max() < 0.6


@pytest.mark.parametrize("side", [1, 4, 8])
def test_blocks_are_cubes(side):
    """No run of hidden or shown voxels that touches no border is shorter than a cube's side, nor another multiple."""
    for mask in masks(4, block_size=(side, side), share=(0.5, 0.5)):
        for axis in range(3):
            rows = np.moveaxis(mask, axis, 0)
            edges = np.argwhere((rows[1:] != rows[:-1]).any(axis=(1, 2))).ravel() + 1
            assert len(set(edges % side)) == 1
    if side == 8:
        labels, count = ndimage.label(mask)
        assert count < mask.sum() / side**3 * 4
        assert labels.max() == count


def test_views_of_a_pair_are_masked_each_by_itself():
    pairs = masks(10).reshape(10, 2, *SIZE)
    assert all((first != second).any() for first, second in pairs)


def test_the_grid_is_moved():
    """Blocks would else always begin at the first voxel."""
    starts = set()
    for mask in masks(20, block_size=(8, 8)):
        changes = np.argwhere((mask[1:] != mask[:-1]).any(axis=(1, 2))).ravel() + 1
        starts.add(int(changes[0] % 8))
    assert len(starts) > 3


def test_the_seed_decides():
    assert np.array_equal(masks(3), masks(3))
    assert not np.array_equal(masks(3), masks(3, seed=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": (0, 4)}, r"block_size must be \(smallest, largest\)"),
        ({"block_size": (8, 4)}, r"got \(8, 4\)"),
        ({"share": (0.5, 1.0)}, r"share must be .*got \(0\.5, 1\.0\)"),
        ({"share": (0.0, 0.5)}, "share"),
    ],
)
def test_ranges_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        RandBlockMaskd("views", **settings)
