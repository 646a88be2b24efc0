import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from pgl_ext.transforms.intensity import (
    BatchIntensityd,
    RandBatchBlur,
    RandBatchBrightness,
    RandBatchGamma,
    RandBatchNoise,
    RandBatchPatchSwap,
)


class RandBatchVoxelSwap(RandBatchPatchSwap):
    """Patches that small images have room for."""

    def __init__(self, prob: float = 0.5, fraction: tuple = (0.3, 0.8)) -> None:
        super().__init__(prob, fraction, patch_size=1)


TRANSFORMS = [RandBatchNoise, RandBatchBlur, RandBatchBrightness, RandBatchGamma, RandBatchVoxelSwap]


def images(shape: tuple = (3, 2, 12, 10, 8), seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample_range(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each channel, (B, C, 1, 1, 1)."""
    voxels = x.double().numpy()
    return voxels.min((2, 3, 4), keepdims=True), voxels.max((2, 3, 4), keepdims=True)


class TestEach:
    @pytest.mark.parametrize("transform", TRANSFORMS[:4])
    def test_a_channel_is_augmented_as_a_sample_of_its_own(self, transform):
        x = images((2, 3, 12, 10, 8))
        alone = transform(prob=1.0).set_random_state(0)
        together = transform(prob=1.0).set_random_state(0)(x)
        torch.testing.assert_close(together, alone(x.reshape(6, 1, 12, 10, 8)).view(x.shape))

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_each_sample_draws_its_own_parameter(self, transform):
        x = images((1, 1, 12, 10, 8)).expand(6, 1, 12, 10, 8)
        result = transform(prob=1.0).set_random_state(0)(x)
        for a in range(6):
            for b in range(a):
                assert not torch.allclose(result[a], result[b], atol=1e-4)

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_probability(self, transform):
        x = images((400, 1, 2, 2, 2))
        changed = (transform(prob=0.3).set_random_state(1)(x) != x).flatten(1).any(1)
        assert 0.2 < changed.float().mean() < 0.4

    @pytest.mark.parametrize("transform", [RandBatchBlur, RandBatchBrightness, RandBatchGamma])
    @pytest.mark.parametrize("value", [0.0, -2.5, 1.0])
    def test_constant_sample(self, transform, value):
        x = torch.full((2, 1, 8, 8, 8), value)
        torch.testing.assert_close(transform(prob=1.0).set_random_state(0)(x), x)

    @pytest.mark.parametrize("transform", TRANSFORMS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_keeps_shape_and_dtype(self, transform, dtype):
        x = images((2, 1, 9, 8, 7)).to(dtype)
        result = transform(prob=1.0).set_random_state(0)(x)
        assert result.shape == x.shape
        assert result.dtype == dtype
        assert torch.isfinite(result).all()

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_autocast_does_not_change_it(self, transform):
        x = images((2, 1, 9, 8, 7))
        expected = transform(prob=1.0).set_random_state(0)(x)
        with torch.autocast("cpu", torch.bfloat16):
            result = transform(prob=1.0).set_random_state(0)(x)
        assert torch.equal(result, expected)

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_only_drawn_samples_change(self, transform):
        x = images((16, 1, 6, 6, 6))
        result = transform(prob=0.5).set_random_state(2)(x)
        same = (result == x).flatten(1).all(1)
        assert 0 < same.sum() < 16


class TestFormulas:
    @pytest.mark.parametrize("variance", [0.01, 0.1, 1.0])
    def test_noise_variance(self, variance):
        x = images((2, 1, 32, 32, 32))
        noise = RandBatchNoise(1.0, (variance, variance)).set_random_state(0)(x) - x
        for sample in noise:
            assert float(sample.var()) == pytest.approx(variance, rel=0.05)
            assert abs(float(sample.mean())) < 5 * (variance / sample.numel()) ** 0.5
        correlation = np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]
        assert abs(correlation) < 0.03, "samples get different noise"

    @pytest.mark.parametrize("sigma", [0.5, 0.73, 1.0, 1.6])
    def test_blur_is_gaussian(self, sigma):
        x = images()
        blur = RandBatchBlur(1.0, (sigma, sigma))
        expected = [
            [gaussian_filter(c.astype(np.float64), sigma, mode="nearest", truncate=4.0) for c in sample]
            for sample in x.numpy()
        ]
        np.testing.assert_allclose(blur(x), expected, atol=1e-5)

    def test_blur_within_a_range_keeps_each_samples_own_sigma(self):
        x = torch.zeros(4, 1, 17, 17, 17)
        x[:, :, 8, 8, 8] = 1
        result = RandBatchBlur(1.0, (0.5, 1.0)).set_random_state(0)(x)[:, 0].double()
        np.testing.assert_allclose(result.sum((1, 2, 3)), 1, rtol=1e-5)
        offset = torch.arange(17, dtype=torch.float64) - 8
        for axis in (1, 2, 3):
            profile = result.sum([a for a in (1, 2, 3) if a != axis])
            sigma = (profile * offset**2).sum(1).sqrt()
            assert ((sigma > 0.49) & (sigma < 1.01)).all()
            assert sigma.unique().numel() == 4

    @pytest.mark.parametrize("factor", [0.75, 1.0, 1.25, 3.0])
    def test_brightness(self, factor):
        x = images() * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1, 1, 1)
        expected = np.clip(x.double().numpy() * factor, *sample_range(x))
        np.testing.assert_allclose(RandBatchBrightness(1.0, (factor, factor))(x), expected, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("gamma", [0.7, 1.0, 1.5])
    def test_gamma(self, gamma):
        x = images() * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1, 1, 1) + 2
        low, high = sample_range(x)
        expected = ((x.double().numpy() - low) / (high - low)) ** gamma * (high - low) + low
        result = RandBatchGamma(1.0, (gamma, gamma))(x)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
        for kept, original in zip(sample_range(result), (low, high), strict=True):
            np.testing.assert_allclose(kept, original, rtol=1e-5)

    @pytest.mark.parametrize("transform", [RandBatchGamma, RandBatchBrightness])
    def test_range_is_the_samples_own(self, transform):
        x = images((8, 1, 10, 10, 10)) * torch.linspace(0.1, 3, 8).view(8, 1, 1, 1, 1)
        result = transform(prob=1.0).set_random_state(0)(x)
        for new, old, compare in zip(sample_range(result), sample_range(x), (np.greater, np.less), strict=True):
            assert compare(new, old + (-1e-5 if compare is np.greater else 1e-5)).all()


class TestPatchSwap:
    SIZE = (32, 24, 16)

    def permutation(self, seed: int = 0, fraction: float = 0.2, **settings) -> np.ndarray:
        """Which voxel each voxel of two samples now holds, by its flat index, (2, X, Y, Z)."""
        voxels = torch.arange(np.prod(self.SIZE)).view(1, 1, *self.SIZE).float().repeat(2, 1, 1, 1, 1)
        swap = RandBatchPatchSwap(1.0, (fraction, fraction), **settings).set_random_state(seed)
        return swap(voxels)[:, 0].long().numpy()

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("patch_size", [(8, 4, 4), (5, 3, 2)], ids=str)
    def test_swaps_pairs_of_whole_patches(self, seed, patch_size):
        pairs = round(0.2 * np.prod(self.SIZE) / np.prod(patch_size) / 2)
        for source in self.permutation(seed, patch_size=patch_size):
            # Exchanged, twice gives the original.
            np.testing.assert_array_equal(source.ravel()[source.ravel()], np.arange(source.size))
            # Raster order meets a patch at its first corner; all of it has moved by the same.
            shift = source - np.arange(source.size).reshape(self.SIZE)
            patches = 0
            while shift.any():
                corner = np.argwhere(shift)[0]
                patch = tuple(slice(a, a + p) for a, p in zip(corner, patch_size, strict=True))
                assert shift[patch].shape == patch_size
                assert len(np.unique(shift[patch])) == 1
                shift[patch] = 0
                patches += 1
            assert patches == 2 * pairs

    def test_patches_lie_anywhere(self):
        voxels = np.arange(np.prod(self.SIZE)).reshape(self.SIZE)
        moved = np.stack([source != voxels for seed in range(40) for source in self.permutation(seed)])
        for axis in range(3):
            assert moved.any(tuple(a for a in range(4) if a != axis + 1)).all()
        assert len({tuple(np.argwhere(sample)[0] % (8, 4, 4)) for sample in moved}) > 40

    def test_samples_differ_and_channels_move_together(self):
        first, second = self.permutation()
        assert not np.array_equal(first, second)
        x = images((3, 2, *self.SIZE))
        x[:, 1] = -2 * x[:, 0]
        result = RandBatchPatchSwap(1.0, (0.2, 0.2)).set_random_state(0)(x)
        assert not torch.equal(result, x)
        assert torch.equal(result[:, 1], -2 * result[:, 0])

    def test_fraction_is_drawn_per_sample(self):
        x = images((200, 1, *self.SIZE))
        changed = (RandBatchPatchSwap(1.0, (0.0, 0.2)).set_random_state(0)(x) != x).flatten(1).double().mean(1)
        assert float(changed.mean()) == pytest.approx(0.1, abs=0.01)
        assert float(changed.min()) < 0.01
        assert float(changed.max()) == pytest.approx(0.2, abs=0.01)

    def test_nothing_to_swap_in_a_tiny_image(self):
        x = images((2, 1, 4, 4, 4))
        assert torch.equal(RandBatchPatchSwap(1.0)(x), x)

    @pytest.mark.parametrize("seed", range(3))
    def test_no_room(self, seed):
        swap = RandBatchPatchSwap(1.0, (0.0, 0.5)).set_random_state(seed)
        with pytest.raises(ValueError, match=r"\(8, 8, 8\) voxels have no room for 2 patches of \(8, 4, 4\)"):
            swap(images((2, 1, 8, 8, 8)))

    def test_patch_size(self):
        with pytest.raises(ValueError, match=r"patch_size must be positive, got \(8, 0, 4\)"):
            RandBatchPatchSwap(patch_size=(8, 0, 4))


class TestArguments:
    @pytest.mark.parametrize("transform", TRANSFORMS)
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ((1.1,), r"prob must lie in \[0, 1\], got 1.1"),
            ((-0.1,), "got -0.1"),
            ((0.5, (2.0, 1.0)), r"two increasing numbers, got \(2.0, 1.0\)"),
            ((0.5, (1.0, 1.1, 1.2)), "two increasing numbers"),
        ],
    )
    def test_bad(self, transform, args, message):
        with pytest.raises(ValueError, match=message):
            transform(*args)

    @pytest.mark.parametrize(
        ("transform", "name"),
        [
            (RandBatchBlur, "sigma"),
            (RandBatchGamma, "gamma"),
            (RandBatchNoise, "variance"),
            (RandBatchPatchSwap, "fraction"),
        ],
    )
    def test_outside_the_parameters_domain(self, transform, name):
        with pytest.raises(ValueError, match=name):
            transform(0.5, (-1.0, 1.0))

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_not_a_batch(self, transform):
        with pytest.raises(ValueError, match=r"expected a batch \(B, C, X, Y, Z\), got shape \(1, 8, 8, 8\)"):
            transform()(torch.zeros(1, 8, 8, 8))


class TestBatch:
    def transforms(self) -> BatchIntensityd:
        return BatchIntensityd("views", [transform(prob=0.8) for transform in TRANSFORMS])

    @pytest.mark.parametrize("shape", [(3, 2, 1, 8, 8, 4), (5, 1, 8, 8, 4)])
    def test_views_draw_their_own_parameters(self, shape):
        views = images((1, *shape[-3:])).expand(shape)
        batch = {"views": views, "affines": torch.eye(4)}
        result = self.transforms().set_random_state(0)(batch)
        assert result["views"].shape == shape
        assert result["affines"] is batch["affines"]
        assert batch["views"] is views
        assert len(result["views"].reshape(-1, 8, 8, 4).unique(dim=0)) > 3

    def test_non_contiguous_views(self):
        views = images((2, 2, 8, 8, 4, 1)).permute(0, 1, 5, 2, 3, 4).transpose(0, 1)
        result = self.transforms().set_random_state(0)({"views": views})["views"]
        expected = self.transforms().set_random_state(0)({"views": views.contiguous()})["views"]
        torch.testing.assert_close(result, expected)

    def test_order(self):
        """Each step sees the result of the one before it."""
        x = images((1, 2, 1, 8, 8, 4))
        brightness, gamma = RandBatchBrightness(1.0, (1.25, 1.25)), RandBatchGamma(1.0, (1.5, 1.5))
        result = BatchIntensityd("views", [brightness, gamma])({"views": x})["views"]
        torch.testing.assert_close(result[0], gamma(brightness(x[0])))

    def test_no_transforms(self):
        x = images((1, 2, 1, 8, 8, 4))
        assert torch.equal(BatchIntensityd("views", [])({"views": x})["views"], x)
