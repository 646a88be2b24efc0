from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer, sliding_window_inference

from pgl_ext.segmentation.inferers import FlipInferer, VolumeInferer
from pgl_ext.task import SegmentationTask

ORGANS = SegmentationTask({"left kidney": [1], "right kidney": [2]})
OVERLAPPING = SegmentationTask({"kidney": [1, 2], "tumour": [2], "cyst": [3]}, multi_label=True)
ALL_AXES = [axes for count in range(4) for axes in itertools.combinations((0, 1, 2), count)]


class PositionDependent(torch.nn.Module):
    """Its weights differ from voxel to voxel, so that it is not equivariant to anything."""

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, *size, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + x.cumsum(2) * 0.1 + x.cumsum(4)


def mean_over_flips(volume: np.ndarray, network, task: SegmentationTask, axes: tuple[int, ...]) -> np.ndarray:
    """Brute force in NumPy, which flips by slicing."""
    results = []
    for reverse in itertools.product((False, True), repeat=len(axes)):
        cut = [slice(None)] * 5
        for axis, reversed_ in zip(axes, reverse, strict=True):
            cut[2 + axis] = slice(None, None, -1) if reversed_ else slice(None)
        logits = network(torch.from_numpy(volume[tuple(cut)].copy())).detach().double().numpy()
        if task.multi_label:
            probabilities = 1 / (1 + np.exp(-logits))
        else:
            probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        results.append(probabilities[tuple(cut)])
    return np.mean(results, axis=0)


@pytest.mark.parametrize("task", [ORGANS, OVERLAPPING])
@pytest.mark.parametrize("axes", ALL_AXES)
def test_mean_over_all_flips(axes, task):
    network = PositionDependent((20, 5, 6))
    volume = np.random.default_rng(0).normal(size=(2, 1, 20, 5, 6)).astype(np.float32)
    found = FlipInferer(SimpleInferer(), task, axes)(MetaTensor(torch.from_numpy(volume)), network)
    np.testing.assert_allclose(found.numpy(), mean_over_flips(volume, network, task, axes), atol=1e-5)


def test_flipping_the_scan_flips_the_result():
    """Whatever the network does, the average over an axis's flips is equivariant to that flip, and to no other."""
    network = PositionDependent((7, 6, 5))
    inferer = FlipInferer(SimpleInferer(), ORGANS, (0, 2))
    volume = torch.randn(1, 1, 7, 6, 5)
    result = inferer(volume, network)
    for dims in ([2], [4], [2, 4]):
        torch.testing.assert_close(inferer(volume.flip(dims), network).flip(dims), result)
    assert (inferer(volume.flip([3]), network).flip([3]) - result).abs().max() > 0.01


@pytest.mark.parametrize("task", [ORGANS, OVERLAPPING])
@pytest.mark.parametrize("chosen", [None, [0, 1, 2], [1], [torch.tensor([2]), torch.tensor([0])]])
def test_networks_are_averaged_after_the_softmax(task, chosen):
    """By hand: MONAI's sliding windows over the volume for each network, then the mean of the probabilities."""
    torch.manual_seed(0)
    networks = torch.nn.ModuleList(torch.nn.Conv3d(1, 3, 5, padding=2) for _ in range(3))
    volume = 3 * torch.randn(1, 1, 30, 24, 17)
    with torch.no_grad():
        logits = [sliding_window_inference(volume, (16, 16, 8), 2, one, 0.25, "gaussian") for one in networks]
    to_probabilities = torch.sigmoid if task.multi_label else lambda values: torch.softmax(values, 1)
    used = range(3) if chosen is None else map(int, chosen)
    expected = torch.stack([to_probabilities(logits[number]) for number in used]).mean(0)
    found = FlipInferer(VolumeInferer((16, 16, 8), 2, 0.25), task)(volume, networks, models=chosen)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_flips_of_several_networks():
    networks = torch.nn.ModuleList(PositionDependent((20, 5, 6)) for _ in range(2))
    networks[1].weight.data.neg_()
    volume = np.random.default_rng(0).normal(size=(1, 1, 20, 5, 6)).astype(np.float32)
    found = FlipInferer(SimpleInferer(), ORGANS, (0, 2))(torch.from_numpy(volume), networks)
    expected = np.mean([mean_over_flips(volume, network, ORGANS, (0, 2)) for network in networks], axis=0)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_network_sees_each_flip_once_and_the_scan_stays_as_it_is():
    seen = []
    volume = torch.arange(8.0).view(1, 1, 2, 2, 2)
    FlipInferer(SimpleInferer(), ORGANS, (0, 1, 2))(volume, lambda x: seen.append(x.clone()) or x.repeat(1, 3, 1, 1, 1))
    assert len({tuple(x.flatten().tolist()) for x in seen}) == len(seen) == 8
    assert torch.equal(volume.flatten(), torch.arange(8.0))


@pytest.mark.parametrize("axes", [(3,), (-1,), (0, 0), ("x",)])
def test_bad_axes(axes):
    with pytest.raises(ValueError, match="different ones of 0, 1, 2"):
        FlipInferer(SimpleInferer(), ORGANS, axes)


@pytest.mark.parametrize("size", [(40, 33, 21), (16, 16, 8), (9, 30, 5)])
def test_windows_of_a_voxelwise_network_agree_with_the_whole(size):
    network = torch.nn.Conv3d(1, 3, 1)
    volume = torch.randn(1, 1, *size)
    with torch.no_grad():
        stitched = VolumeInferer((16, 16, 8), sw_batch_size=3)(MetaTensor(volume), network)
        torch.testing.assert_close(stitched, network(volume), atol=1e-5, rtol=0)
    assert type(stitched) is torch.Tensor


def test_windows_that_disagree_are_weighted_as_monai_does():
    """By Gaussians; a network that sees its neighbours, and so the edges of its windows, tells weightings apart."""
    torch.manual_seed(0)
    network, volume = torch.nn.Conv3d(1, 2, 7, padding=3), torch.randn(1, 1, 40, 33, 21)
    stock = {mode: SlidingWindowInferer((16, 16, 8), 2, 0.25, mode) for mode in ("gaussian", "constant")}
    with torch.no_grad():
        expected, other = (inferer(volume, network) for inferer in stock.values())
        found = VolumeInferer((16, 16, 8), sw_batch_size=2, overlap=0.25)(volume, network)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - other).abs().max() > 0.01


def test_small_volumes_are_padded_with_their_minimum():
    windows = []
    volume = torch.rand(1, 1, 9, 10, 5) + 3
    VolumeInferer((16, 16, 8))(volume, lambda x: windows.append(x.clone()) or x)
    (window,) = windows
    assert window.shape[2:] == (16, 16, 8)
    assert window.min() == volume.min()


def test_half_precision_windows_are_added_up_in_float32():
    volume = torch.ones(1, 1, 40, 40, 20)
    stitched = VolumeInferer((16, 16, 8), overlap=0.25)(volume, lambda x: x.half())
    assert stitched.dtype == torch.float32
    torch.testing.assert_close(stitched, volume)


@pytest.mark.parametrize(
    "kwargs", [{"roi_size": (0, 4, 4)}, {"roi_size": 4, "overlap": 1}, {"roi_size": 4, "sw_batch_size": 0}]
)
def test_bad_windows(kwargs):
    with pytest.raises(ValueError, match="got"):
        VolumeInferer(**kwargs)
