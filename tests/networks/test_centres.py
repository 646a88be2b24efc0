"""Where the cells of each family's deepest map lie, measured against the contract's ``centres``."""

from __future__ import annotations

import pytest
import torch
from made_weights import SMALL

from pgl_ext.networks.build import NETWORKS

# Voxels along the measured axis, and along the others.
LONG = {"swinunetr": (192, 32), "resnet": (256, 16)}
SHAPE = (64, 16)
SEEDS = 10


def error_between_flipped_views(family: str, seed: int, axis: int) -> float:
    """Cells by which features that are aligned differ in place where a view is flipped, along one axis.

    The centre of a cell is that of its gradients' absolute values. What the contract has in the middle of a volume lies
    between two cells, and its centre between theirs, in the volume and in its mirror image; a distance d to the middle
    points the other way in a flipped view, so that 2 d / stride is between them.
    """
    torch.manual_seed(seed)
    network = NETWORKS[family](1, 1, **SMALL[family]).requires_grad_(False)
    stride, centre = network.level_strides[-1][axis], network.centres[-1][axis]
    long, short = LONG.get(family, SHAPE)
    size = [short] * 3
    size[axis] = long
    volume, middle = torch.randn(1, 1, *size), (long - 1) / 2
    cell, beyond = divmod((middle - centre) / stride, 1)
    distances = []
    for view in (volume, volume.flip(2 + axis)):
        view.requires_grad_()
        deepest = network.features(view)[-1].movedim(2 + axis, 0)
        for features, share in zip(deepest[int(cell) :], (1 - beyond, beyond), strict=False):
            (gradient,) = torch.autograd.grad(features, view, torch.randn(features.shape), retain_graph=True)
            weights = gradient.abs().movedim(2 + axis, 0).flatten(1).sum(dim=1)
            distances.append(share * float(weights @ torch.arange(long, dtype=torch.float) / weights.sum() - middle))
    return sum(distances) / stride


@pytest.mark.parametrize("family", NETWORKS)
def test_flipped_views_meet_within_a_tenth_of_a_cell(family):
    errors = [error_between_flipped_views(family, seed, seed % 3) for seed in range(SEEDS)]
    assert abs(sum(errors) / SEEDS) < 0.1
