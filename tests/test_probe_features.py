import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from pgl_ext.evaluation.probes.features import Statistics, features_at, re_estimate_batch_norm
from pgl_ext.geometry import upsample_features


def random_map(channels: int, size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed))


def all_voxels(size: tuple[int, ...]) -> torch.Tensor:
    return torch.cartesian_prod(*map(torch.arange, size))


CASES = [
    # map, stride, volume
    [(5, 4, 3), (4, 4, 2), (20, 16, 6)],
    [(5, 4, 3), (4, 4, 2), (17, 13, 5)],
    [(9, 7, 11), (1, 2, 1), (9, 13, 11)],
    [(3, 1, 2), (16, 16, 8), (40, 9, 16)],
]


@pytest.mark.parametrize(("cells", "stride", "size"), CASES)
def test_features_are_those_of_scipy_at_voxel_over_stride(cells, stride, size):
    features, voxels = random_map(3, cells), all_voxels(size)
    places = (voxels / torch.tensor(stride)).T.numpy()
    expected = np.stack([map_coordinates(c, places, order=1, mode="nearest") for c in features[0].numpy()], axis=1)
    np.testing.assert_allclose(features_at([features], [stride], voxels), expected, atol=1e-5)


@pytest.mark.parametrize(("cells", "stride", "size"), CASES)
def test_interpolated_maps_have_the_same_values(cells, stride, size):
    features = random_map(3, cells)
    whole = upsample_features(features, size, stride)
    assert whole.shape == (1, 3, *size)
    torch.testing.assert_close(whole[0].flatten(1).T, features_at([features], [stride], all_voxels(size)))


def test_coordinates_come_back_exactly_up_to_the_last_feature():
    size, strides = (33, 32, 17), ((2, 2, 1), (16, 16, 8))
    maps = []
    for stride in strides:
        axes = [torch.arange(0, n, s, dtype=torch.float32) for n, s in zip(size, stride, strict=True)]
        maps.append(torch.stack(torch.meshgrid(*axes, indexing="ij"))[None])
    voxels = all_voxels(size)
    found = features_at(maps, strides, voxels)
    for level, stride in enumerate(strides):
        last = torch.tensor([(n - 1) // s * s for n, s in zip(size, stride, strict=True)])
        torch.testing.assert_close(found[:, 3 * level :][:, :3], voxels.minimum(last).float(), atol=1e-4, rtol=0)


def test_levels_come_one_after_another(make_encoder):
    encoder = make_encoder().eval()
    with torch.no_grad():
        maps = encoder(random_map(1, (31, 32, 16)))
    found = features_at(maps, encoder.strides, torch.tensor([[0, 0, 0], [16, 16, 8]]))
    # The feature at cell 0 lies on voxel 0, and at cell 1 of the deepest maps on voxel (16, 16, 8).
    torch.testing.assert_close(found[0], torch.cat([m[0, :, 0, 0, 0] for m in maps]))
    torch.testing.assert_close(found[1, -encoder.channels[-1] :], maps[-1][0, :, 1, 1, 1])


# --- statistics -----------------------------------------------------------------------------------------------------


def test_pooled_statistics_are_those_of_all_places():
    volumes = [
        [random_map(2, (4, 4, 4), seed) * (1 + seed) + seed, random_map(3, (2, 2, 2), seed)] for seed in range(3)
    ]
    pooled = Statistics.pooled([Statistics.of_maps(maps) for maps in volumes])
    places = [torch.cat([maps[n][0].flatten(1) for maps in volumes], dim=1).numpy() for n in (0, 1)]
    np.testing.assert_allclose(pooled.mean, np.concatenate([p.mean(1) for p in places]), atol=1e-6)
    np.testing.assert_allclose(pooled.deviation, np.concatenate([p.std(1) for p in places]), rtol=1e-5)


def test_maps_and_features_are_standardised_alike():
    maps, strides = [random_map(2, (6, 6, 4)) * 3 + 5, random_map(3, (3, 3, 2))], [(1, 1, 1), (2, 2, 2)]
    statistics, voxels = Statistics.of_maps(maps), all_voxels((6, 6, 4))
    standardised = statistics.standardise_maps(maps)
    for m in standardised:
        np.testing.assert_allclose(m.mean((0, 2, 3, 4)), 0, atol=1e-5)
        np.testing.assert_allclose(m.std((0, 2, 3, 4), correction=0), 1, rtol=1e-5)
    expected = statistics.standardise(features_at(maps, strides, voxels))
    torch.testing.assert_close(features_at(standardised, strides, voxels), expected, atol=1e-5, rtol=1e-5)


def test_a_constant_channel_becomes_zero():
    maps = [torch.full((1, 1, 4, 4, 4), 7.0)]
    assert torch.equal(Statistics.of_maps(maps).standardise_maps(maps)[0], torch.zeros(1, 1, 4, 4, 4))


# --- batch norm -----------------------------------------------------------------------------------------------------


def test_batch_norm_takes_the_mean_statistics_of_the_volumes(make_encoder):
    encoder = make_encoder().eval()
    weights = {name: value.clone() for name, value in encoder.named_parameters()}
    volumes = [random_map(1, size, seed) * 2 + 1 for seed, size in enumerate([(32, 32, 16), (24, 40, 16)])]
    with torch.no_grad():
        stems = [encoder.conv1(volume) for volume in volumes]
    re_estimate_batch_norm(encoder, iter(volumes))
    torch.testing.assert_close(encoder.bn1.running_mean, torch.stack([s.mean((0, 2, 3, 4)) for s in stems]).mean(0))
    torch.testing.assert_close(encoder.bn1.running_var, torch.stack([s.var((0, 2, 3, 4)) for s in stems]).mean(0))
    assert not any(module.training for module in encoder.modules())
    assert all(torch.equal(value, weights[name]) for name, value in encoder.named_parameters())
