import blosc2
import numpy as np
import pytest
import torch
from made_volumes import VOLUME, FakeVolume, coordinate_ramp, extents
from monai.data import MetaTensor
from monai.transforms import Compose, Flip, Resize, SpatialCrop

from pgl_ext.geometry import overlap_extent
from pgl_ext.transforms.views import RandOverlappingViewsd

VIEW = (24, 20, 12)


def cut(volume, seed: int = 0, view_size: tuple = VIEW, **kwargs) -> dict:
    return RandOverlappingViewsd("image", view_size, **kwargs).set_random_state(seed)({"image": volume})


class TestContract:
    @pytest.mark.parametrize(
        ("channels", "view_size", "expected"),
        [(1, VIEW, VIEW), (2, [16, 16, 8], (16, 16, 8)), (1, 16, (16, 16, 16)), (3, (7, 9, 5), (7, 9, 5))],
    )
    def test_shapes(self, channels, view_size, expected):
        sample = cut(torch.rand(channels, *VOLUME), view_size=view_size)
        assert sample["views"].shape == (2, channels, *expected)
        assert sample["affines"].shape == (2, 4, 4)
        for name in ("views", "affines"):
            assert type(sample[name]) is torch.Tensor
            assert sample[name].dtype == torch.float32
            assert sample[name].is_contiguous()
        assert (sample["affines"][:, 3] == torch.tensor([0.0, 0, 0, 1])).all()

    def test_other_entries_and_input_stay(self):
        volume = torch.rand(1, *VOLUME)
        data = {"image": volume, "name": "a"}
        before = volume.clone()
        sample = RandOverlappingViewsd("image", VIEW)(data)
        assert sample["image"] is volume
        assert sample["name"] == "a"
        assert set(data) == {"image", "name"}
        assert torch.equal(volume, before)


class TestRandomness:
    @pytest.mark.parametrize("volume_size", [(200, 200, 150), (40, 32, 18), (34, 120, 17)], ids=str)
    def test_overlap_and_crop_size(self, volume_size):
        volume, view_size = FakeVolume(volume_size), VIEW
        transform = RandOverlappingViewsd("image", view_size).set_random_state(0)
        overlaps = []
        for _ in range(200):
            affines = transform({"image": volume})["affines"]
            lower, upper = extents(affines, view_size)
            size = upper - lower
            # Whole voxels, by rounding.
            assert (size > 1.1 * np.array(view_size) - 0.501).all()
            assert (size < 1.4 * np.array(view_size) + 0.501).all()
            # Inside the volume: it is larger than any crop.
            assert (lower > -0.5 - 1e-3).all()
            assert (upper < np.array(volume_size) - 0.5 + 1e-3).all()
            shared = np.minimum(*upper) - np.maximum(*lower)
            assert (shared > 0).all()
            overlaps.append(shared.prod() / size.prod(1).max())
            # What the aligner derives from the same affines.
            torch.testing.assert_close(
                torch.stack(overlap_extent(affines[None], view_size))[:, 0],
                torch.from_numpy(np.stack([lower.max(0), upper.min(0)])).float(),
                atol=1e-3,
                rtol=0,
            )
        assert min(overlaps) >= 0.1 - 1e-4
        assert np.std(overlaps) > 0.05

    @pytest.mark.parametrize("min_overlap", [0.01, 0.3, 0.45])
    def test_min_overlap(self, min_overlap):
        transform = RandOverlappingViewsd("image", VIEW, min_overlap=min_overlap).set_random_state(1)
        for _ in range(100):
            lower, upper = extents(transform({"image": FakeVolume((200, 200, 100))})["affines"], VIEW)
            shared = np.minimum(*upper) - np.maximum(*lower)
            assert shared.prod() / (upper - lower).prod(1).max() >= min_overlap - 1e-4

    def test_crops_reach_every_part_of_the_volume(self):
        transform = RandOverlappingViewsd("image", (16, 16, 8)).set_random_state(0)
        seen = np.zeros((64, 64, 32), dtype=int)
        for _ in range(200):
            transform({"image": FakeVolume(seen.shape)})
            for start, size in zip(transform.crop_start, transform.crop_size, strict=True):
                seen[tuple(slice(a, a + c) for a, c in zip(start, size, strict=True))] += 1
        for axis in range(3):
            assert seen.any(tuple(a for a in range(3) if a != axis)).all()

    def test_the_second_crop_lies_on_either_side_of_the_first(self):
        transform = RandOverlappingViewsd("image", (16, 16, 8), scale_range=(1.0, 1.0)).set_random_state(0)
        shifts = []
        for _ in range(300):
            transform({"image": FakeVolume((200, 200, 150))})
            shifts.append(transform.crop_start[1] - transform.crop_start[0])
        # Binomial: three standard deviations of 300 draws are 0.087.
        np.testing.assert_allclose((np.array(shifts) > 0).mean(0), 0.5, atol=0.1)
        np.testing.assert_allclose((np.array(shifts) < 0).mean(0), 0.5, atol=0.1)

    def test_flip_frequency(self):
        transform = RandOverlappingViewsd("image", (8, 8, 8)).set_random_state(0)
        flips = np.stack(
            [
                np.diagonal(transform({"image": FakeVolume((30, 30, 30))})["affines"], axis1=1, axis2=2)[:, :3] < 0
                for _ in range(300)
            ]
        )
        np.testing.assert_allclose(flips.mean(0), 0.5, atol=0.12)
        # Each axis and view by itself.
        correlation = np.corrcoef(flips.reshape(300, 6).T)
        assert np.abs(correlation - np.eye(6)).max() < 0.25


class TestVoxels:
    @pytest.mark.parametrize("seed", range(8))
    def test_ramp_shows_its_affine(self, seed):
        sample = cut(coordinate_ramp(), seed)
        index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in VIEW), indexing="ij")).float()
        for view, affine in zip(sample["views"], sample["affines"], strict=True):
            expected = torch.einsum("ij,jxyz->ixyz", affine[:3, :3], index) + affine[:3, 3, None, None, None]
            # Crops are larger than the view, so that no border value is repeated.
            torch.testing.assert_close(view, expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("scale_range", [(1.1, 1.4), (0.6, 0.75), (1.0, 1.0)], ids=str)
    def test_equals_stock_monai(self, seed, scale_range):
        volume = torch.randn(2, *VOLUME, generator=torch.Generator().manual_seed(seed))
        transform = RandOverlappingViewsd("image", VIEW, scale_range).set_random_state(seed)
        sample = transform({"image": volume})
        for v in range(2):
            start, size = transform.crop_start[v], transform.crop_size[v]
            axes = np.flatnonzero(transform.flip[v]).tolist()
            expected = Compose(
                [
                    SpatialCrop(roi_start=start, roi_end=start + size),
                    Resize(VIEW, mode="trilinear"),
                    *([Flip(axes)] if axes else []),
                ]
            )(MetaTensor(volume, affine=torch.eye(4)))
            torch.testing.assert_close(sample["views"][v], expected.as_tensor(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(sample["affines"][v], expected.affine.float(), atol=1e-4, rtol=1e-6)

    @pytest.mark.parametrize("size", [(10, 52, 30), (60, 52, 3), (12, 9, 5), (1, 1, 1), (25, 21, 13), VIEW], ids=str)
    def test_volumes_smaller_than_the_crop(self, size):
        ramp = coordinate_ramp(size) + 100
        for seed in range(10):
            transform = RandOverlappingViewsd("image", VIEW).set_random_state(seed)
            sample = transform({"image": ramp})
            index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in VIEW), indexing="ij")).float()
            # The whole volume in reach of the crop is read: a crop hangs over it by no more than it must.
            for a, c in zip(transform.crop_start, transform.crop_size, strict=True):
                covered = np.minimum(a + c, size) - np.maximum(a, 0)
                assert (covered == np.minimum(c, size)).all()
            for view, affine in zip(sample["views"], sample["affines"], strict=True):
                source = torch.einsum("ij,jxyz->ixyz", affine[:3, :3], index) + affine[:3, 3, None, None, None]
                limit = torch.tensor(size).view(3, 1, 1, 1) - 1
                inside = ((source >= -1e-4) & (source <= limit + 1e-4)).all(0)
                torch.testing.assert_close(view[:, inside], source[:, inside] + 100, atol=1e-3, rtol=0)
                # A voxel or more beyond the volume there is padding only: the smallest value of the crop's channel.
                outside = ((source < -1 - 1e-4) | (source > limit + 1 + 1e-4)).any(0)
                if outside.any() and inside.any():
                    for channel in view:
                        values = channel[outside]
                        assert (values >= 100 - 1e-3).all()
                        assert float(values.max() - values.min()) < 1e-3
                        assert float(values.mean()) <= float(channel.min()) + 1e-3

    def test_padding_is_the_smallest_value(self):
        volume = torch.full((1, 6, 60, 60), 3.0)
        volume[:, 3] = -2.0
        sample = cut(volume, view_size=(24, 24, 24), flip_prob=0)
        assert float(sample["views"].min()) == pytest.approx(-2)
        torch.testing.assert_close(sample["views"][:, :, 0], torch.full((2, 1, 24, 24), -2.0))
        torch.testing.assert_close(sample["views"][:, :, -1], torch.full((2, 1, 24, 24), -2.0))

    @pytest.mark.parametrize(
        "convert",
        [
            lambda v: v,
            lambda v: MetaTensor(v, affine=torch.eye(4)),
            lambda v: v.numpy(),
            lambda v: np.asfortranarray(v.numpy()),
            lambda v: v.numpy()[:, ::-1].copy()[:, ::-1],
            lambda v: blosc2.asarray(v.numpy()),
            lambda v: v.half(),
            lambda v: v.numpy().astype(np.float16),
            lambda v: blosc2.asarray(v.numpy().astype(np.float16)),
            lambda v: v.short(),
            lambda v: v.numpy().astype(np.uint8),
        ],
        ids=[
            *("tensor", "MetaTensor", "numpy", "Fortran order", "reversed", "blosc2", "half tensor"),
            *("float16", "blosc2 float16", "int16", "uint8"),
        ],
    )
    def test_array_types(self, convert):
        # Integers that every type holds exactly.
        volume = torch.randint(0, 200, (2, *VOLUME)).float()
        expected, sample = cut(volume, 5), cut(convert(volume), 5)
        torch.testing.assert_close(sample["views"], expected["views"], atol=1e-4, rtol=1e-5)
        assert torch.equal(sample["affines"], expected["affines"])
        assert type(sample["views"]) is torch.Tensor

    @pytest.mark.filterwarnings("error")
    def test_memory_map(self, tmp_path):
        volume = np.random.default_rng(0).random((1, *VOLUME), dtype=np.float32)
        np.save(tmp_path / "volume.npy", volume)
        sample = cut(np.load(tmp_path / "volume.npy", mmap_mode="r"))
        assert torch.equal(sample["views"], cut(volume)["views"])

    def test_only_the_crops_are_read(self):
        class Recording(FakeVolume):
            voxels = 0

            def __getitem__(self, key):
                crop = super().__getitem__(key)
                self.voxels += crop.size
                return crop

        volume = Recording((200, 200, 100))
        cut(volume)
        assert volume.voxels <= 2 * np.prod(np.round(np.array(VIEW) * 1.4))


class TestAblations:
    def test_without_crop_and_scale_both_views_are_the_same_crop(self):
        for seed in range(10):
            sample = cut(coordinate_ramp(), seed, scale_range=(1, 1), min_overlap=1, flip_prob=0)
            assert torch.equal(sample["views"][0], sample["views"][1])
            assert torch.equal(sample["affines"][0], sample["affines"][1])
            assert torch.equal(torch.diagonal(sample["affines"][0]), torch.ones(4))

    def test_without_crop_and_scale_flips_remain(self):
        sample = cut(coordinate_ramp(), 1, scale_range=(1, 1), min_overlap=1, flip_prob=0.5)
        lower, upper = extents(sample["affines"], VIEW)
        np.testing.assert_array_equal(lower[0], lower[1])
        np.testing.assert_array_equal(upper[0], upper[1])

    @pytest.mark.parametrize(("flip_prob", "flipped"), [(0, False), (1, True)])
    def test_flip_prob(self, flip_prob, flipped):
        for seed in range(10):
            scale = torch.diagonal(cut(coordinate_ramp(), seed, flip_prob=flip_prob)["affines"], dim1=1, dim2=2)
            assert ((scale[:, :3] < 0) == flipped).all()


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"scale_range": (1.4, 1.1)}, r"two increasing positive factors, got \(1.4, 1.1\)"),
            ({"scale_range": (0, 1)}, "increasing positive"),
            ({"scale_range": (1.0,)}, "scale_range"),
            ({"min_overlap": 0}, r"min_overlap must lie in \(0, 0.485\]"),
            ({"min_overlap": 0.5}, r"for scale_range \(1.1, 1.4\).*got 0.5"),
            ({"min_overlap": 1.1, "scale_range": (1, 1)}, "got 1.1"),
            ({"flip_prob": 1.5}, r"flip_prob must lie in \[0, 1\], got 1.5"),
            ({"flip_prob": -0.1}, "got -0.1"),
            ({"keys": ["image", "label"]}, "views are cut from one volume"),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            RandOverlappingViewsd(**{"keys": "image", "view_size": VIEW, **kwargs})

    @pytest.mark.parametrize("view_size", [(16, 16), (0, 16, 16), (16, -1, 16)], ids=str)
    def test_view_size(self, view_size):
        with pytest.raises(ValueError, match=r"positive|length 3"):
            RandOverlappingViewsd("image", view_size)

    @pytest.mark.parametrize("shape", [(16, 16, 16), (1, 1, 16, 16, 16)], ids=str)
    def test_volume_shape(self, shape):
        with pytest.raises(ValueError, match=r"expected a volume \(C, X, Y, Z\), got shape"):
            cut(torch.zeros(shape))

    def test_missing_key(self):
        with pytest.raises(KeyError, match="image"):
            RandOverlappingViewsd("image", VIEW)({"other": torch.zeros(1, 8, 8, 8)})
