"""Small things that many tests build: an encoder, a batch of view pairs, a cache of volumes."""

import locale
from collections.abc import Callable, Iterator

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import NormalizeIntensityd

from pgl_ext.data.cache import VolumeCache
from pgl_ext.methods import PGL
from pgl_ext.networks import ResNetEncoder
from pgl_ext.tools.phantom import generate_case
from pgl_ext.transforms import LoadVolumed, RandOverlappingViewsd
from pgl_ext.transforms.volumes import Preprocessing

# In operations this small, threads cost more than they do; on cores that are busy, fifty times more.
torch.set_num_threads(1)

VIEW_SIZE = (32, 32, 16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole programs first: of several processes, none is to start with one of these when others end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def same_locale() -> Iterator[None]:
    """SimpleITK, which writes DICOM in tests, leaves the C locale behind, and with it text files read as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def make_encoder() -> Callable[..., ResNetEncoder]:
    """Builds an encoder of 0.25 million parameters; the same seed gives the same weights."""

    def make(seed: int = 0) -> ResNetEncoder:
        torch.manual_seed(seed)
        return ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.125)

    return make


@pytest.fixture
def make_pgl(make_encoder) -> Callable[..., PGL]:
    """Builds a small PGL; the same seed gives the same weights."""

    def make(seed: int = 0, **settings) -> PGL:
        return PGL(make_encoder(seed), **{"hidden_channels": 32, "out_channels": 16, **settings})

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict]:
    """Cuts a batch of view pairs from random smooth volumes."""

    def make(size: int = 3, seed: int = 0, **settings) -> dict:
        transform = RandOverlappingViewsd("image", VIEW_SIZE, **settings).set_random_state(seed)
        coarse = torch.randn(size, 1, 7, 7, 4, generator=torch.Generator().manual_seed(seed))
        volumes = torch.nn.functional.interpolate(coarse, size=(50, 50, 26), mode="trilinear")
        samples = [transform({"image": volume}) for volume in volumes]
        return {key: torch.stack([sample[key] for sample in samples]) for key in ("views", "affines")}

    return make


@pytest.fixture
def phantom_batch() -> dict:
    """Six view pairs, three from each of two phantoms."""
    transform = RandOverlappingViewsd("image", VIEW_SIZE).set_random_state(0)
    normalise = NormalizeIntensityd("image")
    samples = []
    for seed in range(2):
        image, _, _ = generate_case(seed, (64, 64, 32), "RAS")
        volume = normalise({"image": np.clip(image, -1024, 325).astype(np.float32)[None]})
        samples += [transform(volume) for _ in range(3)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in ("views", "affines")}


@pytest.fixture
def volumes(tmp_path) -> list[dict]:
    """Items of five small NIfTI files."""
    folder = tmp_path / "volumes"
    folder.mkdir()
    items = []
    for number in range(5):
        voxels = np.random.default_rng(number).normal(size=(40, 38, 20)).astype(np.float32)
        path = folder / f"scan{number}.nii"
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
        items.append({"image": str(path)})
    return items


@pytest.fixture
def cache(tmp_path) -> VolumeCache:
    return VolumeCache(tmp_path / "cache", Preprocessing([LoadVolumed("image"), NormalizeIntensityd("image")], {}))
