import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_volumes import FakeVolume, coordinate_ramp, extents
from monai.bundle import ConfigParser
from programs import CONFIGS

from pgl_ext.transforms import RandGlobalLocalViewsd, RandOverlappingViewsd

VIEW = (24, 20, 12)
VOLUME = (60, 52, 30)


def make(seed: int = 0, **settings) -> RandGlobalLocalViewsd:
    settings = {"view_size": VIEW, "local_size": (8, 8, 6), **settings}
    return RandGlobalLocalViewsd("image", **settings).set_random_state(seed)


class TestContract:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, (6, 2, 8, 8, 6)),
            ({"local_size": 16}, (6, 2, 16, 16, 16)),
            ({"num_local": 1, "local_size": (5, 7, 3)}, (1, 2, 5, 7, 3)),
        ],
    )
    def test_shapes(self, settings, expected):
        sample = make(**settings)({"image": torch.rand(2, *VOLUME)})
        assert sample["views"].shape == (2, 2, *VIEW)
        assert sample["affines"].shape == (2, 4, 4)
        assert sample["local_views"].shape == expected
        assert type(sample["local_views"]) is torch.Tensor
        assert sample["local_views"].dtype == torch.float32

    def test_defaults_are_six_crops_of_16(self):
        transform = RandGlobalLocalViewsd("image", VIEW)
        assert (transform.num_local, transform.local_size) == (6, (16, 16, 16))

    @pytest.mark.parametrize("seed", range(3))
    def test_global_views_are_those_without_local_ones(self, seed):
        data = {"image": torch.rand(1, *VOLUME)}
        plain = RandOverlappingViewsd("image", VIEW).set_random_state(seed)(data)
        sample = make(seed)(data)
        assert torch.equal(sample["views"], plain["views"])
        assert torch.equal(sample["affines"], plain["affines"])


class TestPlaces:
    @pytest.mark.parametrize("volume_size", [(200, 200, 150), (40, 32, 18), (34, 120, 7), (12, 9, 5), (1, 1, 1)])
    def test_centres_lie_in_the_union_and_in_the_volume(self, volume_size):
        transform = make(local_scale_range=(0.5, 2.0))
        for _ in range(100):
            lower, upper = extents(transform({"image": FakeVolume(volume_size)})["affines"], VIEW)
            # Edges: voxel i covers [i - 0.5, i + 0.5].
            centres = transform.local_start - 0.5 + transform.local_crop_size / 2
            assert (centres >= np.maximum(lower.min(0), -0.5) - 1e-3).all()
            assert (centres <= np.minimum(upper.max(0), np.array(volume_size) - 0.5) + 1e-3).all()

    def test_they_lie_anywhere_in_it(self):
        transform, places = make(), []
        for _ in range(200):
            lower, upper = extents(transform({"image": FakeVolume((200, 200, 150))})["affines"], VIEW)
            centres = transform.local_start - 0.5 + transform.local_crop_size / 2
            places.append((centres - lower.min(0)) / (upper.max(0) - lower.min(0)))
        places = np.concatenate(places)
        np.testing.assert_allclose(places.mean(0), 0.5, atol=0.03)
        np.testing.assert_allclose(places.std(0), 12**-0.5, atol=0.02)
        assert np.abs(np.corrcoef(places.T) - np.eye(3)).max() < 0.1

    def test_sizes(self):
        transform = make(local_scale_range=(0.5, 2.0))
        sizes = []
        for _ in range(100):
            transform({"image": FakeVolume((200, 200, 150))})
            sizes.append(transform.local_crop_size)
        sizes = np.concatenate(sizes)
        np.testing.assert_array_equal(sizes.min(0), [4, 4, 3])
        np.testing.assert_array_equal(sizes.max(0), [16, 16, 12])

    def test_flips(self):
        transform = make()
        flips = []
        for _ in range(100):
            transform({"image": FakeVolume(VOLUME)})
            flips.append(transform.local_flip)
        np.testing.assert_allclose(np.mean(flips, axis=(0, 1)), 0.5, atol=0.08)
        for prob in (0, 1):
            transform = make(flip_prob=prob)
            transform({"image": FakeVolume(VOLUME)})
            assert (transform.local_flip == prob).all()


class TestVoxels:
    @pytest.mark.parametrize("size", [VOLUME, (12, 52, 5), (60, 9, 30), (1, 1, 1)], ids=str)
    @pytest.mark.parametrize("seed", range(4))
    def test_are_the_crops_padded_resized_and_flipped(self, size, seed):
        volume = torch.randn(2, *size, generator=torch.Generator().manual_seed(seed))
        transform = make(seed)
        sample = transform({"image": volume})
        for number, view in enumerate(sample["local_views"]):
            start, stop = (
                transform.local_start[number],
                transform.local_start[number] + transform.local_crop_size[number],
            )
            inside = volume[(slice(None), *(slice(max(a, 0), max(b, 0)) for a, b in zip(start, stop, strict=True)))]
            width = [(max(-a, 0), max(b - n, 0)) for a, b, n in zip(start, stop, size, strict=True)]
            padded = [np.pad(channel, width, constant_values=channel.min()) for channel in inside.numpy()]
            crop = torch.from_numpy(np.stack(padded))
            expected = F.interpolate(crop[None], (8, 8, 6), mode="trilinear")[0]
            expected = expected.flip((np.flatnonzero(transform.local_flip[number]) + 1).tolist())
            torch.testing.assert_close(view, expected, atol=1e-5, rtol=1e-5)

    def test_only_the_crops_are_read(self):
        class Recording(FakeVolume):
            voxels = 0

            def __getitem__(self, key):
                crop = super().__getitem__(key)
                self.voxels += crop.size
                return crop

        volume, transform = Recording((200, 200, 100)), make()
        transform({"image": volume})
        assert volume.voxels <= transform.crop_size.prod(1).sum() + transform.local_crop_size.prod(1).sum()

    def test_show_the_anatomy_of_the_global_views(self):
        """Most of what local views show lies within a global view, most of the time."""
        transform, shares = make(local_scale_range=(1, 1)), []
        for _ in range(50):
            sample = transform({"image": coordinate_ramp((80, 80, 60))})
            lower, upper = extents(sample["affines"], VIEW)
            places = sample["local_views"].flatten(2).mT.reshape(-1, 1, 3).numpy()
            shares.append(((places >= lower) & (places <= upper)).all(-1).any(-1).mean())
        assert np.mean(shares) > 0.5


class TestIntersectionOverUnion:
    """At least 0.3, as PCRLv2 wants it, with the overlay's ``min_overlap``."""

    @pytest.fixture
    def settings(self) -> dict:
        config = ConfigParser.load_config_files([str(CONFIGS / name) for name in ("train.json", "methods/pcrlv2.yaml")])
        return {key: config[key] for key in ("min_overlap", "scale_range")}

    def draw(self, volume_size: tuple, **settings) -> tuple[np.ndarray, np.ndarray]:
        """Intersection over union of the global crops, and how far apart their centres are, of many draws."""
        transform, values, distances = make(**settings), [], []
        for _ in range(1000):
            transform.randomize(volume_size)
            start, stop = transform.crop_start, transform.crop_start + transform.crop_size
            shared = np.maximum(stop.min(0) - start.max(0), 0).prod()
            values.append(shared / (transform.crop_size.prod(1).sum() - shared))
            distances.append(np.abs(np.diff(start + stop, axis=0) / 2).max())
        return np.array(values), np.array(distances)

    @pytest.mark.parametrize("view_size", [(96, 96, 16), (48, 48, 32), (32, 32, 16)], ids=str)
    def test_in_a_large_volume(self, settings, view_size):
        values, distances = self.draw((300, 300, 120), view_size=view_size, **settings)
        assert values.min() >= 0.3
        assert values.min() < 0.32
        assert (distances <= 0.5).sum() < 5, "concentric crops are the last resort"

    @pytest.mark.parametrize("volume_size", [(60, 60, 40), (40, 120, 20), (33, 20, 9)], ids=str)
    def test_in_a_small_volume(self, settings, volume_size):
        values, _ = self.draw(volume_size, view_size=(48, 48, 32), **settings)
        assert values.min() >= 0.3

    def test_the_bound_is_tight(self, settings):
        share = settings["min_overlap"]
        assert 0.3 <= share / (2 - share) < 0.3005


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_size": (8, 8)}, "length 3"),
        ({"local_size": (8, 0, 8)}, r"local_size must be positive, got \(8, 0, 8\)"),
        (
            {"local_scale_range": (2.0, 0.5)},
            r"local_scale_range must be two increasing positive factors, got \(2.0, 0.5",
        ),
        ({"local_scale_range": (0, 1)}, "local_scale_range"),
        ({"num_local": 0}, "num_local must be at least 1, got 0"),
        ({"min_overlap": 0.5}, "min_overlap must lie in"),
        ({"view_size": (0, 8, 8)}, r"view_size must be positive, got \(0, 8, 8\)"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
