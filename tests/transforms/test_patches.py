import blosc2
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flip, Resize, SpatialCrop

from pgl_ext.transforms import RandOrganPatchd, SplitCased

PATCH = (24, 20, 12)
VOLUME = (60, 52, 30)


def ramp(size: tuple = VOLUME) -> torch.Tensor:
    """Three channels: the voxel's own coordinates."""
    return torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij"))


def make_case(size: tuple = VOLUME, seed: int = 0) -> torch.Tensor:
    """Image and label map (2, X, Y, Z), noise both."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, *size, generator=generator)
    label = torch.randint(0, 5, (1, *size), generator=generator)
    return torch.cat([image, label.float()])


def cut(case, seed: int = 0, points=None, patch_size=PATCH, **settings) -> tuple[dict, RandOrganPatchd]:
    transform = RandOrganPatchd("image", patch_size, **settings).set_random_state(seed)
    data = {"image": case} if points is None else {"image": case, "organ_points": points}
    return transform(data), transform


class FakeVolume:
    """Large and without memory: every crop is zeros."""

    def __init__(self, size: tuple) -> None:
        self.shape = (2, *size)

    def __getitem__(self, key: tuple) -> np.ndarray:
        return np.zeros([2, *(s.stop - s.start for s in key[1:])], dtype=np.float16)


class TestContract:
    @pytest.mark.parametrize(
        ("patch_size", "expected"), [(PATCH, PATCH), ([16, 16, 8], (16, 16, 8)), (9, (9, 9, 9)), ((1, 2, 3), (1, 2, 3))]
    )
    def test_shapes(self, patch_size, expected):
        sample, _ = cut(make_case(), patch_size=patch_size)
        assert set(sample) == {"image", "label"}
        for value in sample.values():
            assert type(value) is torch.Tensor
            assert value.shape == (1, *expected)
            assert value.dtype == torch.float32

    def test_other_entries_and_input_stay(self):
        case, points = make_case(), [np.array([[3, 4, 5]])]
        before = case.clone()
        data = {"image": case, "organ_points": points, "annotated": torch.tensor([True])}
        sample = RandOrganPatchd("image", PATCH)(data)
        assert set(sample) == {"image", "label", "annotated"}
        assert data["image"] is case
        assert data["organ_points"] is points
        assert torch.equal(case, before)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"patch_size": (24, 0, 12)}, r"patch_size must be positive, got \(24, 0, 12\)"),
            ({"scale_range": (1.4, 1.1)}, "two increasing positive factors"),
            ({"scale_range": (0, 1.1)}, "two increasing positive factors"),
            ({"scale_range": (1.1,)}, "two increasing positive factors"),
            ({"flip_prob": (0.5, 0.5, 1.5)}, r"must lie in \[0, 1\]"),
            ({"organ_prob": -0.1}, r"organ_prob -0.1 must lie in \[0, 1\]"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, settings, message):
        with pytest.raises(ValueError, match=message):
            RandOrganPatchd("image", **{"patch_size": PATCH, **settings})


def surely_nearest(transform: RandOrganPatchd) -> torch.Tensor:
    """Voxels of a patch without those whose centre lies halfway between two of the crop's: either is the nearest."""
    halfway = [((np.arange(p) + 0.5) * c % p == 0) & (c != p) for p, c in zip(PATCH, transform.crop_size, strict=True)]
    halfway = [h[::-1] if f else h for h, f in zip(halfway, transform.flip, strict=True)]
    return torch.from_numpy(~np.logical_or.outer(np.logical_or.outer(halfway[0], halfway[1]), halfway[2]))


def padded_crop(case: torch.Tensor, transform: RandOrganPatchd) -> tuple[np.ndarray, np.ndarray]:
    """Image and label map of the crop: beyond the volume the smallest value of the image that was read, and 0."""
    size, start = case.shape[1:], transform.crop_start
    stop = start + transform.crop_size
    seen = tuple(slice(max(0, a), min(n, e)) for a, e, n in zip(start, stop, size, strict=True))
    padding = [(max(0, -a), max(0, e - n)) for a, e, n in zip(start, stop, size, strict=True)]
    image, label = (channel[seen].numpy() for channel in case)
    return np.pad(image, padding, constant_values=image.min()), np.pad(label, padding, constant_values=0)


class TestVoxels:
    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("scale_range", [(1.1, 1.4), (0.6, 0.75), (1.0, 1.0)], ids=str)
    def test_equals_stock_monai(self, seed, scale_range):
        case = make_case(seed=seed)
        sample, transform = cut(case, seed, scale_range=scale_range)
        crop = SpatialCrop(roi_start=transform.crop_start, roi_end=transform.crop_start + transform.crop_size)
        axes = np.flatnonzero(transform.flip).tolist()
        flip = [Flip(axes)] if axes else []

        def stock(volume: torch.Tensor, mode: str) -> torch.Tensor:
            return Compose([crop, Resize(PATCH, mode=mode), *flip])(MetaTensor(volume)).as_tensor()

        torch.testing.assert_close(sample["image"], stock(case[:1], "trilinear"), atol=1e-5, rtol=1e-5)
        expected = stock(case[1:], "nearest-exact")
        sure = surely_nearest(transform)
        assert sure.float().mean() > 0.1
        assert torch.equal(sample["label"][:, sure], expected[:, sure])

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_label_and_image_stay_aligned(self, axis):
        """The image is a ramp along one axis, the label map its value in whole numbers."""
        coordinate = ramp()[axis : axis + 1] + 1
        for seed in range(10):
            sample, _ = cut(torch.cat([coordinate, coordinate]), seed)
            # The nearest voxel is at most half a voxel from the place that was interpolated at.
            assert (sample["image"] - sample["label"]).abs().max() <= 0.5 + 1e-4

    @pytest.mark.parametrize("size", [(20, 52, 9), (7, 5, 3), (60, 9, 30)], ids=str)
    @pytest.mark.parametrize("seed", range(4))
    def test_smaller_volumes_are_scaled_and_flipped_as_stock_monai_does(self, size, seed):
        case = make_case(size, seed)
        sample, transform = cut(case, seed, scale_range=(0.8, 1.25), flip_prob=0.5)
        image, label = padded_crop(case, transform)
        axes = np.flatnonzero(transform.flip).tolist()
        for key, padded, mode in (("image", image, "trilinear"), ("label", label, "nearest-exact")):
            stock = Compose([Resize(PATCH, mode=mode), *([Flip(axes)] if axes else [])])(MetaTensor(padded[None]))
            same = torch.isclose(sample[key], stock.as_tensor(), atol=1e-5, rtol=1e-5)[0]
            assert same.all() if key == "image" else same[surely_nearest(transform)].all()

    @pytest.mark.parametrize("size", [(10, 52, 30), (60, 52, 3), (12, 9, 5), (1, 1, 1), (25, 21, 13)], ids=str)
    def test_smaller_volumes_are_padded(self, size):
        """With the smallest value of the image that was read, and with 0 in the label map."""
        case = torch.cat([ramp(size).sum(0, keepdim=True) + 100, torch.full((1, *size), 3.0)])
        for seed in range(10):
            sample, transform = cut(case, seed, scale_range=(1.0, 1.0), flip_prob=0)
            start, stop = transform.crop_start, transform.crop_start + transform.crop_size
            # As much of the volume as can be seen is seen.
            covered = np.minimum(stop, size) - np.maximum(start, 0)
            assert (covered == np.minimum(transform.crop_size, size)).all()
            image, label = padded_crop(case, transform)
            # At scale 1 nothing is interpolated.
            np.testing.assert_allclose(sample["image"][0].numpy(), image, atol=1e-3)
            np.testing.assert_array_equal(sample["label"][0].numpy(), label)

    @pytest.mark.parametrize("scale_range", [(0.5, 0.5), (1.0, 1.4), (2.0, 3.0)], ids=str)
    def test_labels_are_never_mixed(self, scale_range):
        values = torch.tensor([0.0, 7, 300, 2048])
        label = values[torch.randint(0, 4, (1, *VOLUME), generator=torch.Generator().manual_seed(0))]
        for seed in range(5):
            sample, _ = cut(torch.cat([torch.zeros(1, *VOLUME), label]), seed, scale_range=scale_range)
            assert set(sample["label"].unique().tolist()) <= set(values.tolist())

    @pytest.mark.parametrize(
        "convert",
        [
            lambda c: MetaTensor(c),
            lambda c: c.numpy(),
            lambda c: np.asfortranarray(c.numpy()),
            lambda c: c.numpy()[:, ::-1].copy()[:, ::-1],
            lambda c: blosc2.asarray(c.numpy().astype(np.float16)),
            lambda c: c.half(),
        ],
        ids=["MetaTensor", "numpy", "Fortran order", "reversed", "blosc2", "half"],
    )
    def test_array_types(self, convert):
        # Whole numbers that every type holds exactly.
        case = torch.randint(0, 200, (2, *VOLUME), generator=torch.Generator().manual_seed(1)).float()
        expected, _ = cut(case, 5)
        sample, _ = cut(convert(case), 5)
        for name in ("image", "label"):
            assert torch.equal(sample[name], expected[name])


class TestCrop:
    @pytest.mark.parametrize("size", [(200, 200, 150), (40, 32, 18)], ids=str)
    @pytest.mark.parametrize("organ_prob", [0, 1])
    def test_size_and_place(self, size, organ_prob):
        points = [np.array([[0, 0, 0], np.array(size) - 1, np.array(size) // 2])]
        transform = RandOrganPatchd("image", PATCH, (1.1, 1.4), organ_prob=organ_prob).set_random_state(0)
        sizes = []
        for _ in range(200):
            transform({"image": FakeVolume(size), "organ_points": points})
            sizes.append(transform.crop_size)
            assert (transform.crop_start >= 0).all()
            assert (transform.crop_start + transform.crop_size <= size).all()
        scale = np.array(sizes) / PATCH
        # Whole voxels, by rounding.
        assert (scale > 1.1 - 0.5 / np.array(PATCH) - 1e-9).all()
        assert (scale < 1.4 + 0.5 / np.array(PATCH) + 1e-9).all()
        # Drawn per axis, over the whole range.
        np.testing.assert_allclose(scale.mean(0), 1.25, atol=0.03)
        assert np.abs(np.corrcoef(scale.T) - np.eye(3)).max() < 0.25

    def test_reaches_every_voxel(self):
        transform = RandOrganPatchd("image", (16, 16, 8), organ_prob=0).set_random_state(0)
        seen = np.zeros((64, 64, 32), dtype=int)
        for _ in range(300):
            transform({"image": FakeVolume(seen.shape)})
            stop = transform.crop_start + transform.crop_size
            seen[tuple(slice(a, e) for a, e in zip(transform.crop_start, stop, strict=True))] += 1
        for axis in range(3):
            assert seen.any(tuple(a for a in range(3) if a != axis)).all()


class TestOrgans:
    # One organ of a thousand voxels, one of three, one that the case does not have.
    large = 20 + np.argwhere(np.ones((10, 10, 10)))
    small = np.array([[70, 20, 60], [71, 20, 60], [70, 21, 60]])
    none = np.zeros((0, 3), dtype=np.int32)
    size = (90, 90, 90)

    def centres(self, points, organ_prob=1.0, draws=400, **settings) -> np.ndarray:
        """Of the crops, in voxels of the volume."""
        transform = RandOrganPatchd("image", 8, organ_prob=organ_prob, **settings).set_random_state(0)
        found = []
        for _ in range(draws):
            transform({"image": FakeVolume(self.size), "organ_points": points})
            found.append(transform.crop_start + transform.crop_size // 2)
        return np.array(found)

    def test_each_organ_is_as_frequent_as_any_other(self):
        points = [self.large, self.small, self.none]
        centres = self.centres(points)
        in_organ = [(centres[:, None] == organ).all(-1).any(1) for organ in (self.large, self.small)]
        # Far from the borders every crop is centred on a voxel of an organ.
        assert (in_organ[0] ^ in_organ[1]).all()
        assert 0.4 < in_organ[0].mean() < 0.6
        # Within an organ every voxel is: all three of the small one, in equal shares.
        counts = [(centres == point).all(1).sum() for point in self.small]
        assert min(counts) > 0.2 * in_organ[1].sum()

    @pytest.mark.parametrize("organ_prob", [0.0, 0.3, 0.5, 1.0])
    def test_organ_prob(self, organ_prob):
        centres = self.centres([self.large], organ_prob)
        share = (centres[:, None] == self.large).all(-1).any(1).mean()
        # Anywhere is seldom in an organ of a thousand voxels.
        assert share == pytest.approx(organ_prob, abs=0.08)

    @pytest.mark.parametrize("points", [None, [], [none], [none, none]], ids=["absent", "empty", "one", "two"])
    def test_without_organs_the_patch_lies_anywhere(self, points):
        transform = RandOrganPatchd("image", 8, organ_prob=1.0).set_random_state(0)
        starts = []
        for _ in range(50):
            transform({"image": FakeVolume(self.size), **({} if points is None else {"organ_points": points})})
            starts.append(transform.crop_start)
        assert np.std(starts) > 15

    def test_an_organ_at_the_border_is_in_the_patch(self):
        corner = np.array([[0, 0, 0]])
        label = torch.zeros(1, *VOLUME)
        label[0, 0, 0, 0] = 1
        for seed in range(20):
            case = torch.cat([torch.zeros(1, *VOLUME), label])
            sample, transform = cut(case, seed, [corner], organ_prob=1.0, scale_range=(1.0, 1.0))
            assert (transform.crop_start == 0).all()
            assert sample["label"].sum() == 1

    def test_in_a_volume_smaller_than_the_crop(self):
        points = [np.argwhere(np.ones((6, 40, 3)))]
        for seed in range(20):
            sample, transform = cut(torch.ones(2, 6, 40, 3), seed, points, organ_prob=1.0)
            assert sample["label"].any()
            assert (transform.crop_start <= np.maximum(0, np.array([6, 40, 3]) - transform.crop_size)).all()


class TestFlip:
    def flips(self, flip_prob, draws=300) -> np.ndarray:
        transform = RandOrganPatchd("image", 8, flip_prob=flip_prob).set_random_state(0)
        found = []
        for _ in range(draws):
            transform({"image": FakeVolume((30, 30, 30))})
            found.append(transform.flip)
        return np.array(found)

    def test_one_probability_for_all_axes(self):
        flips = self.flips(0.5)
        np.testing.assert_allclose(flips.mean(0), 0.5, atol=0.1)
        assert np.abs(np.corrcoef(flips.T) - np.eye(3)).max() < 0.25

    def test_one_for_each_axis(self):
        np.testing.assert_allclose(self.flips((0.0, 1.0, 0.3)).mean(0), [0, 1, 0.3], atol=0.1)
        assert not self.flips((0.0, 1.0, 0.3))[:, 0].any()

    def test_an_axis_that_is_never_flipped_keeps_its_direction(self):
        """Left stays left: along x the ramp rises in every patch, along y both ways occur."""
        directions = {0: set(), 1: set()}
        for axis, found in directions.items():
            coordinate = ramp()[axis : axis + 1]
            for seed in range(20):
                sample, _ = cut(torch.cat([coordinate, coordinate]), seed, flip_prob=(0.0, 0.5, 0.5))
                for value in sample.values():
                    lines = value[0].movedim(axis, 0)
                    found.add(float(torch.sign(lines[-1] - lines[0]).mean()))
        assert directions == {0: {1.0}, 1: {1.0, -1.0}}


class TestSplitCase:
    def test_image_and_label_are_whole(self):
        case = make_case()
        stored = blosc2.asarray(case.numpy().astype(np.float16))
        sample = SplitCased("image")({"image": stored, "organ_points": [], "annotated": 1})
        assert set(sample) == {"image", "label", "annotated"}
        for name, channel in (("image", 0), ("label", 1)):
            assert sample[name].dtype == torch.float32
            torch.testing.assert_close(sample[name], case[channel : channel + 1].half().float(), atol=0, rtol=0)
