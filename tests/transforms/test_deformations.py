import numpy as np
import pytest
import torch
from monai.transforms import Randomizable
from scipy.interpolate import BPoly
from scipy.optimize import brentq

from pgl_ext.transforms import RandBezierIntensity, RandDeformedCopyd, RandLocalShuffle, RandPaint
from pgl_ext.transforms.deformations import rescale_to_unit

DEFORMATIONS = [RandLocalShuffle, RandBezierIntensity, RandPaint]
SIZES = [(96, 96, 16), (48, 48, 32), (32, 32, 16)]
SMALL = [(5, 7, 3), (1, 1, 1), (17, 1, 9)]


def patch(size: tuple = (24, 20, 12), channels: int = 1, seed: int = 0) -> np.ndarray:
    """No two voxels are alike, so that each is known again wherever it goes."""
    count = channels * int(np.prod(size))
    values = np.random.default_rng(seed).permutation(count) / count
    return values.reshape(channels, *size).astype(np.float32)


def box(start: np.ndarray, size: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start.tolist(), size.tolist(), strict=True))


def set_blocks(transform: Randomizable, start: list, size: list, monkeypatch) -> None:
    """Let a transform draw these blocks."""
    drawn = {"start": np.array(start), "size": np.array(size)}
    monkeypatch.setattr(transform, "randomize", lambda _: transform.__dict__.update(drawn))


class TestEach:
    @pytest.mark.parametrize("size", [*SIZES, *SMALL], ids=str)
    @pytest.mark.parametrize("transform", DEFORMATIONS)
    def test_keeps_shape_type_and_range(self, transform, size):
        deform = transform(prob=1.0).set_random_state(0)
        for _ in range(3):
            result = deform(patch(size))
            assert result.shape == (1, *size)
            assert result.dtype == np.float32
            assert result.min() >= 0
            assert result.max() <= 1

    @pytest.mark.parametrize("transform", DEFORMATIONS)
    def test_arrays_and_tensors_alike(self, transform):
        x = patch()
        array = transform(prob=1.0).set_random_state(3)(x)
        tensor = transform(prob=1.0).set_random_state(3)(torch.from_numpy(x))
        assert isinstance(array, np.ndarray)
        assert type(tensor) is torch.Tensor
        np.testing.assert_array_equal(array, tensor)

    @pytest.mark.parametrize(
        ("deform", "prob"), [(RandLocalShuffle(blocks=10), 0.5), (RandBezierIntensity(), 0.9), (RandPaint(), 0.9)]
    )
    def test_probability(self, deform, prob):
        x = patch((12, 11, 10))
        deform.set_random_state(0)
        changed = np.mean([deform(x) is not x for _ in range(600)])
        assert changed == pytest.approx(prob, abs=4 * (prob * (1 - prob) / 600) ** 0.5)

    @pytest.mark.parametrize("transform", DEFORMATIONS)
    def test_not_a_patch(self, transform):
        with pytest.raises(ValueError, match=r"expected a patch \(C, X, Y, Z\), got shape \(8, 8, 8\)"):
            transform()(np.zeros((8, 8, 8)))


class TestLocalShuffle:
    def test_one_block_is_permuted_and_nothing_else_touched(self):
        x = patch((40, 40, 40), channels=2)
        for seed in range(10):
            deform = RandLocalShuffle(1.0, blocks=1).set_random_state(seed)
            result = deform(x)
            block = (slice(None), *box(deform.start[0], deform.size[0]))
            np.testing.assert_array_equal(np.sort(result[block].reshape(2, -1)), np.sort(x[block].reshape(2, -1)))
            if deform.size[0].prod() > 8:
                assert not np.array_equal(result[block], x[block])
            outside = np.ones(x.shape, dtype=bool)
            outside[block] = False
            np.testing.assert_array_equal(result[outside], x[outside])

    def test_channels_move_together(self):
        x = patch((40, 40, 16))
        result = RandLocalShuffle(1.0, blocks=50).set_random_state(0)(np.concatenate([x, 1 - x]))
        np.testing.assert_array_equal(result[1], 1 - result[0])

    @pytest.mark.parametrize("size", [(40, 30, 20), (32, 32, 16), (23, 7, 51)], ids=str)
    @pytest.mark.parametrize("blocks", [30, 2000])
    def test_where_blocks_overlap_the_later_one_shows_the_original(self, size, blocks):
        """Brute force: the last block on each voxel, of whose original voxels it shows one, and each only once."""
        x = patch(size)
        deform = RandLocalShuffle(1.0, blocks).set_random_state(1)
        result = deform(x)[0]
        last = np.full(size, -1)
        for number in range(blocks):
            last[box(deform.start[number], deform.size[number])] = number
        assert len(np.unique(last)) > min(blocks, 100) / 3
        np.testing.assert_array_equal(result[last < 0], x[0][last < 0])
        for number in np.unique(last[last >= 0]):
            shown = result[last == number]
            assert set(shown.tolist()) <= set(x[0][box(deform.start[number], deform.size[number])].ravel().tolist())
            assert len(set(shown.tolist())) == len(shown)

    @pytest.mark.parametrize("size", [*SIZES, *SMALL], ids=str)
    def test_blocks_lie_inside_and_have_sides_of_up_to_a_tenth(self, size):
        deform = RandLocalShuffle().set_random_state(0)
        deform.randomize(size)
        assert deform.start.shape == deform.size.shape == (10_000, 3)
        assert (deform.start >= 0).all()
        for axis, n in enumerate(size):
            assert (deform.start + deform.size)[:, axis].max() == n
            assert deform.start[:, axis].min() == 0
            counts = np.bincount(deform.size[:, axis])
            assert counts[0] == 0
            assert len(counts) == max(n // 10, 1) + 1
            np.testing.assert_allclose(counts[1:] / 10_000, 1 / (len(counts) - 1), rtol=0.2)

    def test_every_permutation_is_as_likely_as_any_other(self, monkeypatch):
        x, counts = patch((3, 1, 1)), {}
        deform = RandLocalShuffle(1.0).set_random_state(0)
        set_blocks(deform, [[0, 0, 0]], [[3, 1, 1]], monkeypatch)
        for _ in range(1200):
            order = tuple(deform(x).ravel())
            counts[order] = counts.get(order, 0) + 1
        assert len(counts) == 6
        assert all(150 < count < 250 for count in counts.values())

    def test_number_of_blocks(self):
        with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
            RandLocalShuffle(blocks=0)


class TestBezier:
    ramp = np.linspace(0, 1, 201, dtype=np.float32)

    def curve(self, seed: int) -> tuple[RandBezierIntensity, np.ndarray]:
        deform = RandBezierIntensity(1.0).set_random_state(seed)
        return deform, deform(self.ramp.reshape(1, -1, 1, 1)).ravel()

    @pytest.mark.parametrize("seed", range(20))
    def test_is_monotone_between_0_and_1(self, seed):
        deform, y = self.curve(seed)
        ends = (1, 0) if deform.decreasing else (0, 1)
        assert (y[0], y[-1]) == pytest.approx(ends, abs=1e-6)
        assert (np.diff(y) * (-1 if deform.decreasing else 1) >= -1e-6).all()

    @pytest.mark.parametrize("seed", range(10))
    def test_is_the_bezier_curve(self, seed):
        """SciPy's Bernstein polynomials, solved for the parameter at each intensity."""
        deform, y = self.curve(seed)
        points = np.array([(0, 0), *deform.control_points, (1, 1)])
        curve = BPoly(points[:, None], [0, 1])
        t = [brentq(lambda t, v=v: curve(t)[0] - v, 0, 1) for v in self.ramp[1:-1].astype(float)]
        expected = curve(t)[:, 1]
        np.testing.assert_allclose(y[1:-1], 1 - expected if deform.decreasing else expected, atol=3e-4)

    def test_half_fall_and_control_points_fill_the_unit_square(self):
        deform, falling, points = RandBezierIntensity().set_random_state(0), [], []
        for _ in range(1000):
            deform.randomize((1, 1, 1))
            falling.append(deform.decreasing)
            points.append(deform.control_points.ravel())
        assert np.mean(falling) == pytest.approx(0.5, abs=0.06)
        np.testing.assert_allclose(np.mean(points, axis=0), 0.5, atol=0.04)
        np.testing.assert_allclose(np.std(points, axis=0), 12**-0.5, atol=0.02)

    def test_equal_intensities_stay_equal(self):
        x = np.round(patch() * 8) / 8
        result = RandBezierIntensity(1.0).set_random_state(0)(x)
        assert len(np.unique(result)) == len(np.unique(x))


class TestPaint:
    def drawn(self, count: int, size: tuple = (48, 48, 32), **settings) -> list[tuple[bool, np.ndarray, np.ndarray]]:
        deform = RandPaint(1.0, **settings).set_random_state(0)
        result = []
        for _ in range(count):
            deform.randomize(size)
            result.append((deform.inpaint, deform.start, deform.size))
        return result

    def test_a_fifth_is_painted_in(self):
        assert np.mean([inpaint for inpaint, _, _ in self.drawn(2000)]) == pytest.approx(0.2, abs=0.04)

    @pytest.mark.parametrize(("inpaint_prob", "sure", "blocks"), [(1.0, 0, 5), (0.0, 1, 4)])
    def test_number_of_blocks(self, inpaint_prob, sure, blocks):
        """Each of them follows the one before with probability 0.95, beside the window that is sure."""
        counts = [len(size) - sure for _, _, size in self.drawn(2000, inpaint_prob=inpaint_prob)]
        assert max(counts) == blocks
        assert min(counts) >= 0
        expected = [0.95**count * 0.05 for count in range(blocks)] + [0.95**blocks]
        found = np.bincount(counts, minlength=blocks + 1) / len(counts)
        np.testing.assert_allclose(found, expected, atol=0.03)
        assert np.mean(np.array(counts) == blocks) == pytest.approx(0.95**blocks, abs=0.04)

    @pytest.mark.parametrize("size", [*SIZES, *SMALL], ids=str)
    @pytest.mark.parametrize("inpaint_prob", [0.0, 1.0])
    def test_sides_of_blocks(self, size, inpaint_prob):
        boxes = self.drawn(400, size, inpaint_prob=inpaint_prob)
        start, sides = (np.concatenate([entry[i] for entry in boxes]) for i in (1, 2))
        for axis, n in enumerate(size):
            if inpaint_prob:
                allowed = range(max(n // 6, 1), max(n // 3, 1) + 1)
            else:
                allowed = [n - removed for removed in range(3 * n // 7, 4 * n // 7 + 1)]
            assert set(sides[:, axis].tolist()) == set(allowed)
            # The border is left alone where there is room: by half of what is left of the largest block.
            margin = min(3, (n - max(allowed)) // 2)
            assert start[:, axis].min() == margin
            assert (start + sides)[:, axis].max() == n - margin

    @pytest.mark.parametrize("size", [*SIZES, *SMALL], ids=str)
    @pytest.mark.parametrize("inpaint_prob", [0.0, 1.0])
    def test_noise_in_the_blocks_or_outside_the_windows(self, size, inpaint_prob):
        x = 2 + patch(size, channels=2)  # outside the noise's range
        deform = RandPaint(1.0, inpaint_prob).set_random_state(2)
        for _ in range(5):
            result = deform(x)
            inside = np.zeros(size, dtype=bool)
            for start, side in zip(deform.start, deform.size, strict=True):
                inside[box(start, side)] = True
            noisy = inside if inpaint_prob else ~inside
            np.testing.assert_array_equal(result[:, ~noisy], x[:, ~noisy])
            assert (result[:, noisy] <= 1).all()

    def test_noise_is_uniform_and_of_each_voxel_and_channel(self):
        noise = RandPaint(1.0, 0.0).set_random_state(0)(np.full((2, 48, 48, 32), 2, dtype=np.float32))
        values = noise[:, (noise < 2).all(axis=0)]
        assert values.size > 10_000
        np.testing.assert_allclose(np.quantile(values, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
        assert abs(np.corrcoef(values)[0, 1]) < 0.05
        assert len(np.unique(values)) > 0.99 * values.size

    def test_without_a_block_nothing_changes(self, monkeypatch):
        deform = RandPaint(1.0, 1.0)
        set_blocks(deform, np.zeros((0, 3), int), np.zeros((0, 3), int), monkeypatch)
        deform.inpaint = True
        np.testing.assert_array_equal(deform(patch()), patch())

    def test_probability_of_in_painting(self):
        with pytest.raises(ValueError, match=r"inpaint_prob must lie in \[0, 1\], got 2"):
            RandPaint(inpaint_prob=2)


def views(size: tuple = (32, 32, 16), count: int = 2, channels: int = 1) -> torch.Tensor:
    """Standardised, each with a range of its own."""
    torch.manual_seed(0)
    return torch.randn(count, channels, *size) * torch.linspace(0.5, 2, count).view(-1, 1, 1, 1, 1) - 0.3


def deformed_copy(prob: float = 1.0) -> RandDeformedCopyd:
    return RandDeformedCopyd("views", [transform(prob=prob) for transform in DEFORMATIONS])


class TestDeformedCopy:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_views_stay_and_the_copy_has_their_range(self, size):
        x = views(size)
        data = {"views": x.clone(), "affines": torch.eye(4)}
        result = deformed_copy().set_random_state(0)(data)
        assert set(data) == {"views", "affines"}
        assert set(result) == {"views", "affines", "deformed"}
        assert torch.equal(result["views"], x)
        assert result["deformed"].shape == x.shape
        assert result["deformed"].dtype == torch.float32
        for view, copy in zip(x, result["deformed"], strict=True):
            assert not torch.allclose(view, copy)
            assert copy.min() >= view.min() - 1e-5
            assert copy.max() <= view.max() + 1e-5

    def test_without_deformations_it_is_a_copy(self):
        for transform in (deformed_copy(0.0), RandDeformedCopyd("views", [])):
            torch.testing.assert_close(transform({"views": views()})["deformed"], views())

    def test_deformations_see_each_channel_in_its_own_unit_range(self):
        seen = []
        RandDeformedCopyd("views", [lambda view: seen.append(view) or view])({"views": views(count=3, channels=2)})
        for view, original in zip(seen, views(count=3, channels=2).numpy(), strict=True):
            expected = [(channel - channel.min()) / (channel.max() - channel.min()) for channel in original]
            np.testing.assert_allclose(view, expected, atol=1e-6)
            assert all((channel.min(), channel.max()) == (0, 1) for channel in view)

    def test_order(self):
        """Each deformation sees the result of the one before it, and the last is mapped back to the view's range."""
        x = views(count=1)
        result = RandDeformedCopyd("views", [lambda v: v / 2, lambda v: v + 0.5])({"views": x})["deformed"]
        span = x.max() - x.min()
        torch.testing.assert_close(result, (x - x.min()) / 2 + 0.5 * span + x.min())

    def test_each_view_draws_its_own(self):
        x = views(count=1).expand(4, -1, -1, -1, -1)
        copies = deformed_copy().set_random_state(0)({"views": x})["deformed"]
        assert len(copies.unique(dim=0)) == 4

    def test_views_without_contrast(self):
        x = torch.full((2, 1, 16, 16, 16), -1.5)
        torch.testing.assert_close(deformed_copy().set_random_state(0)({"views": x})["deformed"], x)

    def test_one_key(self):
        with pytest.raises(ValueError, match=r"views have one key, but keys are \('a', 'b'\)"):
            RandDeformedCopyd(["a", "b"], [])


def test_rescaling_is_undone_by_what_it_returns():
    x = views(count=3, channels=2)
    scaled, lowest, span = rescale_to_unit(x)
    np.testing.assert_allclose(scaled.amin((1, 2, 3, 4)), 0)
    np.testing.assert_allclose(scaled.amax((1, 2, 3, 4)), 1)
    torch.testing.assert_close(scaled * span + lowest, x)
    assert (rescale_to_unit(torch.full((1, 1, 2, 2, 2), 7.0))[0] == 0).all()
