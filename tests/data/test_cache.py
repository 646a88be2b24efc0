import functools
import hashlib
import importlib
import json
import operator
import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import Compose, ConcatItemsd, Lambdad, NormalizeIntensityd, RandFlipd

from pgl_ext import transforms
from pgl_ext.data.cache import VolumeCache
from pgl_ext.data.datalist import item_name
from pgl_ext.data.prepare import resolve_bad
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.phantom import LABELS, generate_case
from pgl_ext.transforms import LoadVolumed
from pgl_ext.transforms.checks import BadVolumeError, BadVolumesError
from pgl_ext.transforms.volumes import Preprocessing

SHAPE = (70, 66, 20)


def preprocessing(low: float = -1024, pixdim: tuple | None = None) -> Preprocessing:
    return transforms.preprocessing("image", spacing=pixdim, hu_window=(low, 325))


def only(*steps: Callable) -> Preprocessing:
    return Preprocessing(steps, {})


def save(path: Path, array: np.ndarray | None = None, affine: np.ndarray | None = None) -> dict:
    if array is None:
        array = np.random.default_rng(len(path.name)).normal(0, 300, SHAPE)
    affine = np.diag([-1.0, 2, 3, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), affine), path)
    return {"image": str(path)}


def cached_files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


class CountingLoad(LoadVolumed):
    calls = 0

    def __call__(self, data):
        type(self).calls += 1
        return super().__call__(data)


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(CountingLoad, "calls", 0)
    return only(CountingLoad("image"), NormalizeIntensityd("image"))


# ---- What is stored


def test_stored_volume_is_the_preprocessed_one(tmp_path):
    item = save(tmp_path / "a.nii.gz")
    cache = VolumeCache(tmp_path / "cache", preprocessing(pixdim=(2, 2, 2)))
    expected = preprocessing(pixdim=(2, 2, 2))(dict(item))["image"]
    stored = cache.open(item)
    assert stored.shape == tuple(expected.shape)
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored[:], expected.numpy().astype(np.float16))
    np.testing.assert_allclose(stored.vlmeta["affine"], expected.affine.numpy())
    assert stored.vlmeta["source"] == item["image"]
    assert cache.nbytes(item) == 2 * expected.numel()


def test_crops_equal_slices_of_the_whole(tmp_path):
    item = save(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(0, 300, (130, 90, 70)))
    cache = VolumeCache(tmp_path / "cache", preprocessing())
    whole = preprocessing()(dict(item))["image"].numpy()
    rng = np.random.default_rng(0)
    volume = cache.open(item)
    for _ in range(20):
        low = rng.integers(0, np.array(whole.shape[1:]) - 1)
        high = rng.integers(low + 1, np.array(whole.shape[1:]) + 1)
        crop = (slice(None), *map(slice, low, high))
        np.testing.assert_allclose(volume[crop], whole[crop], rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 3), (64, 64, 64), (65, 3, 200)])
def test_any_volume_size(tmp_path, shape):
    item = save(tmp_path / "a.nii", np.random.default_rng(0).normal(size=shape))
    volume = VolumeCache(tmp_path / "cache", only(LoadVolumed("image"))).open(item)
    np.testing.assert_array_equal(volume[0], nibabel.load(item["image"]).get_fdata().astype(np.float16))


def test_dicom_series_of_one_folder_have_files_of_their_own(tmp_path):
    pytest.importorskip("itk")
    sitk = pytest.importorskip("SimpleITK")
    folder = tmp_path / "case"
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    arrays = {uid: np.random.default_rng(i).integers(0, 99, (4, 5, 6)) for i, uid in enumerate(["1.2.3", "1.2.4"])}
    for uid, array in arrays.items():
        for z in range(6):
            image = sitk.GetImageFromArray(array[:, :, z].T[None].astype(np.int16))
            for tag, value in {"0020|000d": "1", "0020|000e": uid, "0020|0032": f"0\\0\\{z}"}.items():
                image.SetMetaData(tag, value)
            image.SetMetaData("0020|0037", "1\\0\\0\\0\\1\\0")
            writer.SetFileName(str(folder / f"{uid}_{z}.dcm"))
            writer.Execute(image)
    cache = VolumeCache(tmp_path / "cache", only(LoadVolumed("image")))
    items = [{"image": str(folder), "series_uid": uid} for uid in arrays]
    assert cache.prepare(items) == {}
    for item in items:
        volume = cache.open(item)
        np.testing.assert_array_equal(volume[0], arrays[item["series_uid"]])
        assert volume.vlmeta["source"] == item_name(item)
    before = cache.key(items[0])
    os.utime(folder / "1.2.3_4.dcm", ns=(0, 0))
    assert cache.key(items[0]) != before


# ---- Labelled cases


def labelled_preprocessing(pixdim: tuple | None = None, a_min: float = -1024) -> Preprocessing:
    keys = ["image", "label"]
    task = SegmentationTask({name: [value] for value, name in enumerate(LABELS) if value})
    return transforms.preprocessing(keys, pixdim, (a_min, 325), task, extra=[ConcatItemsd(keys, name="image", dim=0)])


def save_case(folder: Path, orientation: str = "LPS", rotation: float = 0) -> dict:
    """A phantom, turned about z by so many degrees."""
    image, label, affine = generate_case(1, (48, 44, 30), orientation=orientation)
    angle = np.deg2rad(rotation)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    item = {"image": str(folder / "image.nii.gz"), "label": str(folder / "label.nii.gz")}
    nibabel.save(nibabel.Nifti1Image(image, turn @ affine), item["image"])
    nibabel.save(nibabel.Nifti1Image(label, turn @ affine), item["label"])
    return item


def nearest_on_grid(path: str, shape: tuple, affine: np.ndarray) -> np.ndarray:
    """A label map on a grid, made with SimpleITK from the grid's affine alone."""
    sitk = pytest.importorskip("SimpleITK")
    affine = np.diag([-1, -1, 1, 1]) @ affine  # ITK's axes are LPS
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    resample = sitk.ResampleImageFilter()
    resample.SetSize([int(n) for n in shape])
    resample.SetOutputSpacing(spacing.tolist())
    resample.SetOutputOrigin(affine[:3, 3].tolist())
    resample.SetOutputDirection((affine[:3, :3] / spacing).ravel().tolist())
    resample.SetInterpolator(sitk.sitkNearestNeighbor)
    return sitk.GetArrayFromImage(resample.Execute(sitk.ReadImage(path))).transpose(2, 1, 0)


@pytest.mark.parametrize("orientation", ["RAS", "LPS"])
@pytest.mark.parametrize("rotation", [0, 15])
@pytest.mark.parametrize("pixdim", [None, (6.3, 7.1, 5.2), (16, 15, 17)])
def test_label_values_lie_where_the_image_shows_the_organ(tmp_path, orientation, rotation, pixdim):
    item = save_case(tmp_path, orientation, rotation)
    cache = VolumeCache(tmp_path / "cache", labelled_preprocessing(pixdim))
    assert cache.prepare([item]) == {}
    volume = cache.open(item)
    affine = np.array(volume.vlmeta["affine"])
    image, label = volume[:]
    expected = nearest_on_grid(item["label"], volume.shape[1:], affine)
    # The edge, where the grids end, is filled in differently; ties may be broken either way.
    core = (slice(1, -1),) * 3
    assert np.mean(label[core] != expected[core]) < 1e-3
    assert set(np.unique(label)) <= set(range(len(LABELS)))
    # The image is where the label map is: the lungs are its darkest organ.
    assert image[label == LABELS.index("lungs")].mean() < image[label == LABELS.index("liver")].mean() - 1


def test_rebuilt_when_the_label_map_changes(tmp_path):
    item = save_case(tmp_path)
    cache = VolumeCache(tmp_path / "cache", labelled_preprocessing())
    before = cache.open(item)[:]
    label = nibabel.load(item["label"])
    changed = np.where(np.asarray(label.dataobj) == 4, 5, np.asarray(label.dataobj)).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(changed, label.affine), item["label"])
    assert cache.prepare([item]) == {}
    after = cache.open(item)[:]
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1], np.where(before[1] == 4, 5, before[1]))
    assert len(cached_files(cache.cache_dir)) == 1
    key = cache.key(item)
    os.utime(item["label"], ns=(0, 1))
    assert cache.key(item) != key


def test_image_with_and_without_label_map_have_files_of_their_own(tmp_path):
    item = save_case(tmp_path)
    other = {**item, "label": str(tmp_path / "other.nii.gz")}
    Path(other["label"]).write_bytes(Path(item["label"]).read_bytes())
    cache = VolumeCache(tmp_path / "cache", labelled_preprocessing())
    assert cache.prepare([item]) == cache.prepare([other]) == {}
    unlabelled = VolumeCache(tmp_path / "cache", preprocessing())
    assert unlabelled.prepare([{"image": item["image"]}]) == {}
    assert len(cached_files(tmp_path / "cache")) == 3


def test_the_key_of_an_item_without_label_map(tmp_path):
    """Made from path, series, size and time, and the version of the format: 2, since files have checksums."""
    path = tmp_path / "a.nii"
    path.write_bytes(b"x")
    cache = VolumeCache(tmp_path / "cache", only(LoadVolumed("image")))
    state = [("a.nii", 1, path.stat().st_mtime_ns)]
    parts = json.dumps([2, cache.digest, str(path), "1.2", state])
    item = {"image": str(path), "series_uid": "1.2"}
    assert cache.key(item) == hashlib.sha256(parts.encode()).hexdigest()
    assert cache.path(item).name.startswith(hashlib.sha256(f"{path}\x001.2".encode()).hexdigest()[:16] + "-")


def test_bad_label_maps_are_listed_with_the_bad_images(tmp_path):
    good, *items = [save_case(folder) for folder in made_folders(tmp_path, 6)]
    Path(items[0]["label"]).unlink()
    Path(items[1]["label"]).write_bytes(b"x")
    Path(items[2]["image"]).unlink()
    save_label(items[3], np.zeros)
    nibabel.save(nibabel.Nifti1Image(np.full((9, 9, 9), 50, np.int16), np.eye(4)), items[4]["image"])
    bad = VolumeCache(tmp_path / "cache", labelled_preprocessing()).prepare([good, *items])
    assert set(bad) == {item_name(item) for item in items}
    expected = [
        f"{items[0]['label']} does not exist",
        f"Cannot read {items[1]['label']}",
        f"{items[2]['image']} does not exist",
        f"{items[3]['label']} is empty",
        f"{items[4]['image']} is constant",
    ]
    for item, message in zip(items, expected, strict=True):
        assert message in bad[item_name(item)]


def test_image_that_clipping_makes_constant_is_bad_for_all_its_label_map(tmp_path):
    item = save_case(tmp_path)
    bad = VolumeCache(tmp_path / "cache", labelled_preprocessing(a_min=324.99)).prepare([item])
    assert bad == {}
    image = nibabel.load(item["image"])
    voxels = np.asarray(image.dataobj)
    nibabel.save(nibabel.Nifti1Image(np.minimum(voxels, 300), image.affine), item["image"])
    bad = VolumeCache(tmp_path / "cache", labelled_preprocessing(a_min=324.99)).prepare([item])
    assert "constant" in bad[item_name(item)]


def test_label_map_of_one_value_is_good(tmp_path):
    item = save_case(tmp_path)
    save_label(item, np.ones)
    assert VolumeCache(tmp_path / "cache", labelled_preprocessing()).prepare([item]) == {}


def made_folders(root: Path, count: int) -> list[Path]:
    folders = [root / f"case{number}" for number in range(count)]
    for folder in folders:
        folder.mkdir()
    return folders


def save_label(item: dict, fill: Callable) -> None:
    image = nibabel.load(item["image"])
    nibabel.save(nibabel.Nifti1Image(fill(image.shape, np.uint8), image.affine), item["label"])


# ---- When it is rebuilt


def test_second_start_reads_no_source(tmp_path, counted):
    items = [save(tmp_path / f"{i}.nii") for i in range(3)]
    for _ in range(2):
        cache = VolumeCache(tmp_path / "cache", counted)
        assert cache.prepare(items) == {}
        cache.open(items[0])
    assert CountingLoad.calls == 3


def test_rebuilt_when_the_source_changes(tmp_path, counted):
    items = [save(tmp_path / "a.nii"), save(tmp_path / "other.nii")]
    cache = VolumeCache(tmp_path / "cache", counted)
    cache.prepare(items)
    before, files = cache.open(items[0])[:], cached_files(cache.cache_dir)
    save(tmp_path / "a.nii", np.random.default_rng(99).normal(size=SHAPE))
    assert cache.prepare(items) == {}
    assert CountingLoad.calls == 3
    assert not np.array_equal(cache.open(items[0])[:], before)
    # The outdated file is gone, the other volume's is untouched.
    assert len(cached_files(cache.cache_dir)) == 2
    assert len(set(cached_files(cache.cache_dir)) & set(files)) == 1


def test_rebuilt_when_only_the_time_of_the_source_changes(tmp_path, counted):
    item = save(tmp_path / "a.nii")
    cache = VolumeCache(tmp_path / "cache", counted)
    cache.prepare([item])
    os.utime(item["image"], ns=(0, 1))
    cache.prepare([item])
    assert CountingLoad.calls == 2


@pytest.mark.parametrize(
    ("header", "line", "voxels"),
    [
        ("a.mhd", "ElementDataFile = other name.zraw", "other name.zraw"),
        ("a.mhd", "ElementDataFile = LIST", "a_2.raw"),
        ("a.nhdr", "data file: ./b.raw.gz", "b.raw.gz"),
        ("a.nhdr", "DataFile: b.raw", "b.raw"),
        ("a.mhd", "no voxels", "a.raw"),
    ],
)
def test_rebuilt_when_voxels_beside_a_header_change(tmp_path, header, line, voxels):
    cache = VolumeCache(tmp_path / "cache", only(LoadVolumed("image")))
    (tmp_path / header).write_text(f"Other = 1\n{line}\nlast: 2\n")
    (tmp_path / voxels).write_text("voxels")
    before = cache.key({"image": str(tmp_path / header)})
    (tmp_path / voxels).write_text("other voxels")
    assert cache.key({"image": str(tmp_path / header)}) != before


def test_rebuilt_when_the_preprocessing_changes(tmp_path):
    item = save(tmp_path / "a.nii")
    first = VolumeCache(tmp_path / "cache", preprocessing(low=-1024))
    second = VolumeCache(tmp_path / "cache", preprocessing(low=-100))
    assert first.key(item) != second.key(item)
    a, b = first.open(item)[:], second.open(item)[:]
    assert not np.array_equal(a, b)


def test_two_preprocessings_in_turn_read_the_source_once_each(tmp_path, counted):
    item = save(tmp_path / "a.nii")
    other = only(CountingLoad("image"), NormalizeIntensityd("image", subtrahend=1, divisor=2))
    other.digest = "another"
    for _ in range(2):
        for each in (counted, other):
            cache = VolumeCache(tmp_path / "cache", each)
            cache.prepare([item])
            np.testing.assert_array_equal(cache.open(item)[:], each(dict(item))["image"].numpy().astype(np.float16))
            CountingLoad.calls -= 1
    assert CountingLoad.calls == 2
    # A source that changes takes only the file of the same preprocessing with it.
    save(tmp_path / "a.nii", np.random.default_rng(99).normal(size=SHAPE))
    VolumeCache(tmp_path / "cache", counted).prepare([item])
    assert len(cached_files(tmp_path / "cache")) == 2


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:50], lambda b: b[: len(b) // 2], lambda b: b"x" * 5000])
def test_damaged_file_is_rebuilt(tmp_path, damage):
    item = save(tmp_path / "a.nii")
    cache = VolumeCache(tmp_path / "cache", preprocessing())
    whole = cache.open(item)[:]
    path = cache.path(item)
    path.write_bytes(damage(path.read_bytes()))
    np.testing.assert_array_equal(cache.open(item)[:], whole)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.prepare([item]) == {}
    np.testing.assert_array_equal(cache.open(item)[:], whole)


def test_one_flipped_bit_changes_nothing(tmp_path):
    """Wherever it is in the file: it is noticed and the file made anew, or what is read does not depend on it."""
    item = save(tmp_path / "a.nii", np.random.default_rng(0).normal(0, 300, (70, 40, 66)))
    made = VolumeCache(tmp_path / "cache", preprocessing())
    whole, path = made.open(item)[:], made.path(item)
    content = path.read_bytes()
    crop = np.s_[:, 60:69, 3:30, 1:65]
    generator = np.random.default_rng(1)
    remade = 0
    for place in [
        *range(0, 200, 3),
        *generator.integers(0, len(content), 40),
        *range(len(content) - 200, len(content), 5),
    ]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        cache = VolumeCache(tmp_path / "cache", preprocessing())
        np.testing.assert_array_equal(cache.open(item)[crop], whole[crop])
        np.testing.assert_array_equal(cache.open(item)[:], whole)
        remade += path.read_bytes() != bytes(damaged)
    assert remade > 40


def test_only_the_chunks_of_a_crop_are_looked_at(tmp_path, monkeypatch):
    item = save(tmp_path / "a.nii", np.random.default_rng(0).normal(size=(130, 90, 70)))
    cache = VolumeCache(tmp_path / "cache", only(LoadVolumed("image")))
    cache.prepare([item])
    looked = []
    monkeypatch.setattr("zlib.crc32", lambda content, original=zlib.crc32: looked.append(1) or original(content))
    for place, chunks in [
        (np.s_[:, 0:64, 0:64, 0:64], 1),
        (np.s_[0, 63:65, 10:20, 10:20], 1),  # and one that is known already
        (np.s_[:, 64:128, 64:90, 0:70], 2),
        (np.s_[:, 5:5], 0),
        (np.s_[:], 12 - 4),
        (np.s_[:], 0),
    ]:
        looked.clear()
        cache.open(item)[place]
        assert len(looked) == chunks, place


def test_a_lost_scan_that_is_cached_is_used(tmp_path, caplog):
    items = [save(tmp_path / f"{number}.nii") for number in range(2)]
    before = VolumeCache(tmp_path / "cache", preprocessing())
    before.prepare(items[:1])
    voxels = before.open(items[0])[:]
    for item in items:
        os.unlink(item["image"])
    cache = VolumeCache(tmp_path / "cache", preprocessing())
    assert cache.prepare(items).keys() == {item_name(items[1])}
    assert f"{items[0]['image']} does not exist" in caplog.text
    np.testing.assert_array_equal(cache.open(items[0])[:], voxels)


def test_the_folder_is_listed_once(tmp_path, monkeypatch):
    items = [save(tmp_path / f"{number}.nii") for number in range(8)]
    cache = VolumeCache(tmp_path / "cache", preprocessing())
    listed = []
    monkeypatch.setattr("os.scandir", lambda path, original=os.scandir: listed.append(str(path)) or original(path))
    cache.prepare(items)
    assert listed == [str(tmp_path / "cache")]


def test_half_written_files_of_killed_processes_are_removed(tmp_path):
    cache = VolumeCache(tmp_path / "cache", preprocessing())
    old, new = cache.cache_dir / "tmp-1.b2nd", cache.cache_dir / "tmp-2.b2nd"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    cache.prepare([])
    assert cached_files(cache.cache_dir) == [new]


# ---- Bad volumes


def bad_items(folder: Path) -> dict[str, str]:
    """Bad volumes of every kind: what their reason must say, by path."""
    values = np.random.default_rng(0).normal(0, 300, SHAPE)
    nan, inf = values.copy(), values.copy()
    nan[:2, 0, 0], inf[0, 0, 0] = np.nan, np.inf
    reasons = {
        save(folder / "nan.nii", nan)["image"]: "2 NaN",
        save(folder / "inf.nii", inf)["image"]: "1 infinite",
        save(folder / "constant.nii", np.full(SHAPE, 7))["image"]: "constant: all 92400 voxels are 7",
        save(folder / "below.nii", values - 9000)["image"]: "constant",  # by the clipping
        save(folder / "4d.nii", np.stack([values] * 2, -1))["image"]: "(70, 66, 20, 2)",
        save(folder / "truncated.nii.gz")["image"]: "Cannot read",
        str(folder / "garbage.nii"): "Cannot read",
        str(folder / "missing.nii"): "missing.nii",
        str(folder / "picture.png"): "unsupported type",
    }
    truncated = folder / "truncated.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:1000])
    (folder / "garbage.nii").write_bytes(b"garbage" * 100)
    (folder / "picture.png").write_bytes(b"x")
    return reasons


def test_what_looks_like_a_label_map_is_said_at_every_start(tmp_path, caplog):
    masks = np.random.default_rng(0).integers(0, 2, (2, 12, 12, 12))
    items = [save(tmp_path / f"{n}.nii", mask) for n, mask in enumerate(masks)] + [save(tmp_path / "scan.nii")]
    for _ in range(3):
        caplog.clear()
        cache = VolumeCache(tmp_path / "cache", transforms.preprocessing("image", hu_window=(-1024, 325)))
        assert cache.prepare(items) == {}
        for item in items:
            assert (f"{item['image']} looks like a label map" in caplog.text) == ("scan" not in item["image"])


@pytest.mark.parametrize("settings", [{"spacing": (500, 500, 500)}, {"hu_window": (5000, 6000)}])
def test_what_settings_make_of_a_good_volume_is_not_laid_on_the_file(tmp_path, settings):
    item = save(tmp_path / "scan.nii")
    bad = VolumeCache(tmp_path / "cache", transforms.preprocessing("image", **settings)).prepare([item])
    assert "scan.nii, after preprocessing (hu_window, spacing), is constant" in bad[item["image"]]


def test_all_bad_volumes_are_found_and_listed_at_once(tmp_path, caplog):
    reasons = bad_items(tmp_path)
    items = [save(tmp_path / "good.nii"), *({"image": path} for path in reasons), save(tmp_path / "better.nii")]
    cache = VolumeCache(tmp_path / "cache", preprocessing())
    bad = cache.prepare(items)
    assert set(bad) == set(reasons)
    assert all(reasons[name] in reason for name, reason in bad.items())
    assert not any("\n" in reason for reason in bad.values())
    assert "Transform input info" not in caplog.text
    assert len(cached_files(cache.cache_dir)) == 2

    with pytest.raises(BadVolumesError) as error:
        resolve_bad(bad, items)
    assert all(name in str(error.value) and reason in str(error.value) for name, reason in bad.items())

    report = tmp_path / "out" / "bad_files.txt"
    good = resolve_bad(bad, items, skip_bad_files=True, report_path=report)
    assert good == [items[0], items[-1]]
    assert dict(line.split("\t") for line in report.read_text().splitlines()) == bad


def test_opening_a_bad_volume_raises(tmp_path):
    cache = VolumeCache(tmp_path / "cache", preprocessing())
    with pytest.raises(BadVolumeError, match="constant"):
        cache.open(save(tmp_path / "a.nii", np.zeros(SHAPE)))
    (tmp_path / "b.nii").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"b\.nii"):
        cache.open({"image": str(tmp_path / "b.nii")})


def test_values_too_large_for_float16(tmp_path):
    item = save(tmp_path / "a.nii", np.arange(8).reshape(2, 2, 2) * 1e4)
    bad = VolumeCache(tmp_path / "cache", only(LoadVolumed("image"))).prepare([item])
    assert "70000 after preprocessing, too large for float16" in bad[item_name(item)]


class Raise:
    """A transform with a fault in it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, image: object) -> None:
        raise self.error


class TwoArguments(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


# Not ``TypeError`` alone: whatever a transform may raise, what counts is that it is not about the file.
FAULTS = [
    ImportError("pip install itk"),
    MemoryError("of a transform"),
    TypeError("of a transform"),
    ValueError("of a transform"),
    OSError("of a transform"),
    TwoArguments("of a", "transform"),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_any_other_error_is_not_the_volume_s_fault(tmp_path, error, caplog):
    cache = VolumeCache(tmp_path / "cache", only(LoadVolumed("image"), Lambdad("image", Raise(error))))
    items = [save(tmp_path / "a.nii")]
    for prepare in (lambda: cache.prepare(items), lambda: cache.open(items[0])):
        caplog.clear()
        with pytest.raises(type(error)) as caught:
            prepare()
        assert caught.value is error
        assert f"preparing {items[0]['image']} failed" in caplog.text


@pytest.mark.parametrize("error", [BadVolumeError("too small"), FileNotFoundError("no atlas")])
def test_errors_about_the_file_are(tmp_path, error):
    cache = VolumeCache(tmp_path / "cache", only(LoadVolumed("image"), Lambdad("image", Raise(error))))
    item = save(tmp_path / "a.nii")
    assert cache.prepare([item]) == {item["image"]: str(error)}


def test_a_result_that_is_no_volume_is_not_the_volume_s_fault(tmp_path):
    cache = VolumeCache(tmp_path / "cache", only(LoadVolumed("image"), Lambdad("image", operator.itemgetter(0))))
    with pytest.raises(ValueError, match=r"a\.nii: preprocessing gave shape \(70, 66, 20\), need \(C, X, Y, Z\)"):
        cache.prepare([save(tmp_path / "a.nii")])


def test_a_full_disk_is_not_the_volume_s_fault(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    cache = VolumeCache(tmp_path / "cache", preprocessing())
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"Cannot write the cache file .*No space left"):
        cache.prepare([save(tmp_path / "a.nii")])
    assert cached_files(cache.cache_dir) == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"preprocessing": only(LoadVolumed("image"), Compose([RandFlipd("image")]))}, "not be random.*RandFlipd"),
        ({"preprocessing": only(LoadVolumed("image")), "num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"preprocessing": Compose([LoadVolumed("image")])}, r"no digest.*pgl_ext\.transforms\.preprocessing"),
    ],
)
def test_bad_arguments(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        VolumeCache(tmp_path / "cache", **kwargs)


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Set another cache_dir"):
        VolumeCache(tmp_path / "file" / "cache", only(LoadVolumed("image")))


# ---- Processes


@pytest.mark.slow
def test_worker_processes_give_the_same_as_none(tmp_path):
    bad = save(tmp_path / "bad.nii", np.zeros(SHAPE))
    items = [save(tmp_path / "a.nii"), bad, save(tmp_path / "bcd.nii")]
    alone = VolumeCache(tmp_path / "alone", preprocessing())
    pooled = VolumeCache(tmp_path / "pooled", preprocessing(), num_workers=1)
    assert pooled.prepare(items) == alone.prepare(items)
    for item in items[::2]:
        # Not bit for bit: the number of threads changes the order in which torch sums up mean and deviation.
        np.testing.assert_allclose(pooled.open(item)[:], alone.open(item)[:], rtol=2**-10, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_preparing_leaves_the_random_state_as_it_was(tmp_path, num_workers):
    """A training gives the same whether its volumes were cached before or not."""
    before = torch.get_rng_state()
    VolumeCache(tmp_path / "cache", preprocessing(), num_workers=num_workers).prepare([save(tmp_path / "a.nii")])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_of_a_worker_process_stops(tmp_path):
    fault = Lambdad("image", functools.partial(operator.add, "text"))
    cache = VolumeCache(tmp_path / "cache", only(LoadVolumed("image"), fault), num_workers=1)
    with pytest.raises(TypeError, match=r'^can only concatenate str .not "MetaTensor". to str$'):
        cache.prepare([save(tmp_path / "a.nii"), save(tmp_path / "b.nii")])


FAULTY = """
class Held(Exception):
    def __init__(self, reason):
        super().__init__(reason)
        self.callback = lambda: None

def fail(image):
    raise Held("of a transform")
"""


@pytest.mark.slow
def test_an_error_that_a_worker_process_cannot_send_stops_too(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    fault = Lambdad("image", importlib.import_module("faulty").fail)
    cache = VolumeCache(tmp_path / "cache", only(LoadVolumed("image"), fault), num_workers=1)
    with pytest.raises(RuntimeError, match="Held: of a transform"):
        cache.prepare([save(tmp_path / "a.nii")])


def test_preprocessing_that_cannot_be_sent_runs_in_this_process(tmp_path, caplog):
    item = save(tmp_path / "a.nii")
    transform = only(LoadVolumed("image"), Lambdad("image", lambda x: x + 1))
    assert VolumeCache(tmp_path / "cache", transform, num_workers=2).prepare([item]) == {}
    assert "cannot be sent" in caplog.text


def test_cache_works_after_pickling(tmp_path):
    item = save(tmp_path / "a.nii")
    cache = VolumeCache(tmp_path / "cache", preprocessing())
    copied = pickle.loads(pickle.dumps(cache))
    assert copied.key(item) == cache.key(item)
    np.testing.assert_array_equal(copied.open(item)[:], cache.open(item)[:])


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_cache import VolumeCache, preprocessing
cache = VolumeCache({folder!r}, preprocessing())
items = [{{"image": path}} for path in {paths!r}]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    for item in items:
        cache._write(item)
        assert cache.open(item)[:].std() > 0.9
print(cache.prepare(items), cache.digest)
"""


@pytest.mark.slow
def test_two_processes_with_different_hash_seeds_share_a_cache(tmp_path):
    items = [save(tmp_path / f"{i}.nii") for i in range(3)]
    paths = [item["image"] for item in items]
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "cache"), paths=paths)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            # One thread as here: sums of other threads differ in the last digit.
            env={**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    # Both begin when both are there; of one that ends before there is nothing to read.
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    outputs = [run.communicate()[0] for run in runs]
    assert outputs == [f"{{}} {preprocessing().digest}\n"] * 2
    assert len(cached_files(tmp_path / "cache")) == 3
    cache = VolumeCache(tmp_path / "cache", preprocessing())
    for item in items:
        np.testing.assert_array_equal(cache.open(item)[:], preprocessing()(item)["image"].numpy().astype(np.float16))
