import itertools
import math
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import Compose, ConcatItemsd, Lambdad, SelectItemsd
from torch.utils.data import DataLoader, Dataset

from pgl_ext.data import dataset as module
from pgl_ext.data.cache import VolumeCache
from pgl_ext.data.cache_file import CacheReadError
from pgl_ext.data.dataset import CaseDataset, EpochBatchSampler, VolumeDataset
from pgl_ext.data.loader import TrainingLoader
from pgl_ext.errors import transform_error
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms import LoadVolumed, NameToIndexd, RandOrganPatchd, RandOverlappingViewsd, SplitCased
from pgl_ext.transforms.volumes import Preprocessing


def transform() -> Compose:
    return Compose([RandOverlappingViewsd("image", (16, 16, 8)), SelectItemsd(["views", "affines"])])


def same(first: dict, second: dict) -> bool:
    return set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in ("views", "affines"))


@pytest.fixture
def forked(monkeypatch) -> None:
    """Loading processes would be forked, whatever this Python's default is."""
    monkeypatch.setattr(module, "workers_are_forked", lambda: True)


class TestVolumeDataset:
    def make(self, volumes, cache, **settings) -> VolumeDataset:
        return VolumeDataset(volumes, cache, transform(), **{"seed": 3, "memory_limit_gib": 1, **settings})

    def test_a_sample_depends_on_seed_epoch_and_index_alone(self, volumes, cache):
        keys = [(epoch, index) for epoch in range(2) for index in range(7)]
        straight = dict(zip(keys, map(self.make(volumes, cache).__getitem__, keys), strict=True))
        shuffled = self.make(volumes, cache)
        assert all(same(shuffled[key], straight[key]) for key in [*keys[::-2], *keys[::3]])
        # Another epoch, another draw of the same volume (index 5 is volume 0 again), another seed.
        different = [straight[0, 0], straight[1, 0], straight[0, 5], self.make(volumes, cache, seed=4)[0, 0]]
        assert not any(same(a, b) for a, b in itertools.combinations(different, 2))

    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_change_nothing(self, volumes, cache, workers):
        sampler = EpochBatchSampler(len(volumes), 2, max_epochs=2, patches_per_volume=2)
        loaded = [
            list(DataLoader(self.make(volumes, cache, memory_limit_gib=limit), batch_sampler=sampler, num_workers=n))
            for n, limit in ((0, 1), (workers, 0))
        ]
        assert len(loaded[0]) == 10
        for first, second in zip(*loaded, strict=True):
            assert torch.equal(first["views"], second["views"])
            assert torch.equal(first["affines"], second["affines"])
        assert first["views"].shape == (2, 2, 1, 16, 16, 8)
        assert first["affines"].shape == (2, 2, 4, 4)

    def test_index_modulo_length_is_the_volume(self, volumes, cache):
        seen = []

        class Spy(RandOverlappingViewsd):
            def __call__(self, data):
                seen.append(float(np.asarray(data["image"][:]).astype(np.float64).sum()))
                return super().__call__(data)

        dataset = VolumeDataset(volumes, cache, Spy("image", (16, 16, 8)), memory_limit_gib=0)
        for index in range(7):
            dataset[0, index]
        assert seen[:5] == [float(cache.open(item)[:].astype(np.float64).sum()) for item in volumes]
        assert seen[5:] == seen[:2]

    def test_batches_carry_the_source_where_the_transform_keeps_it(self, volumes, cache):
        data = [{**item, "task": name} for item, name in zip(volumes, ["neck", "liver", "neck", "colon"], strict=False)]
        steps = [
            RandOverlappingViewsd("image", (16, 16, 8)),
            SelectItemsd(["views", "task"]),
            NameToIndexd("task", ["colon", "liver", "neck"]),
        ]
        dataset = VolumeDataset(data, cache, Compose(steps), seed=3, memory_limit_gib=0)
        batch = next(iter(DataLoader(dataset, batch_sampler=[[(0, 3), (0, 0), (1, 1), (2, 2)]])))
        assert batch["task"].dtype == torch.int64
        assert batch["task"].tolist() == [0, 2, 1, 2]
        # Where it is not kept, samples are those of scans of unknown source.
        assert same(self.make(data, cache)[0, 1], self.make(volumes, cache)[0, 1])

    def test_a_plain_index_is_epoch_0(self, volumes, cache):
        dataset = self.make(volumes, cache)
        assert len(dataset) == 5
        assert same(dataset[2], dataset[0, 2])

    @pytest.mark.usefixtures("forked")
    def test_memory_holds_what_fits(self, volumes, cache, monkeypatch):
        bytes_each = cache.nbytes(volumes[0])
        dataset = self.make(volumes, cache, memory_limit_gib=2.5 * bytes_each / 2**30)
        opened = []
        original = cache.open
        monkeypatch.setattr(cache, "open", lambda item: opened.append(item["image"]) or original(item))
        from_memory = self.make(volumes, cache)
        opened.clear()
        assert all(same(dataset[0, index], from_memory[0, index]) for index in range(5))
        assert opened == [item["image"] for item in volumes[2:]]

    @pytest.mark.usefixtures("forked")
    @pytest.mark.parametrize(("processes", "held"), [(1, 4), (2, 2)])
    def test_by_default_half_of_the_free_memory_is_shared_by_the_processes(
        self, volumes, cache, monkeypatch, processes, held
    ):
        free = 8.5 * cache.nbytes(volumes[0])
        monkeypatch.setattr(module, "available_memory", lambda: free)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        dataset = VolumeDataset(volumes, cache, transform())
        opened = []
        original = cache.open
        monkeypatch.setattr(cache, "open", lambda item: opened.append(item["image"]) or original(item))
        for index in range(5):
            dataset[0, index]
        assert len(opened) == 5 - held


class TestStartMethods:
    """Of loading processes; tests of whole programs start them."""

    @pytest.fixture(params=["spawn", "forkserver"])
    def method(self, request, monkeypatch) -> None:
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: request.param)

    @pytest.mark.usefixtures("method")
    def test_no_volumes_are_sent_to_processes_that_are_not_forked(self, volumes, cache):
        dataset = VolumeDataset(volumes, cache, transform(), memory_limit_gib=1)
        assert len(pickle.dumps(dataset)) < cache.nbytes(volumes[0])
        assert same(pickle.loads(pickle.dumps(dataset))[1, 3], dataset[1, 3])

    def test_the_default_is_not_settled_by_asking(self, volumes, cache, monkeypatch):
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: None if allow_none else "asked")
        for methods, held in ((["fork", "spawn"], 5), (["forkserver", "spawn", "fork"], 0)):
            monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda methods=methods: methods)
            assert len(VolumeDataset(volumes, cache, transform(), memory_limit_gib=1)._in_memory) == held

    @pytest.mark.usefixtures("method")
    def test_a_lambda_is_refused_with_what_to_do(self, volumes, cache):
        dataset = VolumeDataset(volumes, cache, Compose([Lambdad("image", lambda image: image)]))
        sampler = EpochBatchSampler(len(volumes), 2, max_epochs=1)
        with pytest.raises(ValueError, match="a function that can be imported, or set --num_workers 0"):
            TrainingLoader(dataset, sampler, num_workers=1)
        TrainingLoader(dataset, sampler, num_workers=0)


class TestVolumesThatVanish:
    @pytest.fixture(autouse=True)
    def _no_pause(self, monkeypatch):
        self.pauses = []
        monkeypatch.setattr(module.time, "sleep", self.pauses.append)

    @pytest.fixture
    def dataset(self, volumes, cache) -> VolumeDataset:
        cache.prepare(volumes)
        return VolumeDataset(volumes, cache, transform(), memory_limit_gib=0)

    def vanish(self, item, cache, source: bool = True) -> None:
        cache.path(item).unlink()
        if source:
            Path(item["image"]).unlink()

    def test_a_lost_cache_file_is_made_again(self, dataset, cache):
        expected = dataset[0, 1]
        self.vanish(dataset.data[1], cache, source=False)
        sample = dataset[0, 1]
        assert same(sample, expected)
        assert sample["read_errors"] == 0
        assert self.pauses == []

    def test_a_moment_without_the_file_system_costs_nothing(self, dataset, cache, monkeypatch):
        expected = dataset[0, 1]
        opened = cache.open

        class ShortRead:
            """A read that ends too early, of a file that cannot be made anew."""

            shape, dtype, ndim = opened(dataset.data[1]).shape, np.float16, 4

            def __getitem__(self, place):
                raise CacheReadError("Error while getting the buffer")

        failures = iter([OSError("stale handle"), ShortRead()])

        def fail_twice(item):
            failure = next(failures, None)
            if isinstance(failure, OSError):
                raise failure
            return failure or opened(item)

        monkeypatch.setattr(cache, "open", fail_twice)
        sample = dataset[0, 1]
        assert same(sample, expected)
        assert sample["read_errors"] == 0
        assert len(self.pauses) == 2

    @pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[: len(content) // 2]])
    def test_a_cache_file_that_is_cut_off_is_made_again(self, dataset, cache, damage):
        expected = dataset[0, 1]
        path = cache.path(dataset.data[1])
        path.write_bytes(damage(path.read_bytes()))
        sample = dataset[0, 1]
        assert same(sample, expected)
        assert sample["read_errors"] == 0
        assert self.pauses == []

    def test_a_cache_file_with_damaged_blocks_is_made_again(self, dataset, cache):
        expected = dataset[0, 1]
        self.spoil(cache.path(dataset.data[1]))
        fresh = VolumeDataset(dataset.data, VolumeCache(cache.cache_dir, cache.preprocessing), transform(), 0, 0)
        assert same(fresh[0, 1], expected)
        assert self.pauses == []

    def test_without_its_source_it_is_retried_skipped_and_counted(self, dataset, cache, caplog):
        cache.prepare(dataset.data)
        self.spoil(cache.path(dataset.data[1]))
        Path(dataset.data[1]["image"]).unlink()
        sample = dataset[0, 1]
        assert sample["read_errors"] == 1
        assert len(self.pauses) == 2
        assert f"skipped {dataset.data[1]['image']}: " in caplog.text
        assert "does not exist or holds no files" in caplog.text

    @pytest.mark.usefixtures("forked")
    def test_without_its_source_it_is_not_held_in_memory(self, dataset, cache, caplog):
        cache.prepare(dataset.data)
        self.spoil(cache.path(dataset.data[1]))
        Path(dataset.data[1]["image"]).unlink()
        held = VolumeDataset(dataset.data, cache, transform(), memory_limit_gib=1)
        assert f"not held in memory, {dataset.data[1]['image']}: " in caplog.text
        assert "does not exist or holds no files" in caplog.text
        assert [held[0, index]["read_errors"] for index in range(5)] == [0, 1, 0, 0, 0]
        assert len(self.pauses) == 2

    @staticmethod
    def spoil(path: Path) -> None:
        content = path.read_bytes()
        quarter = len(content) // 4
        path.write_bytes(content[:quarter] + b"\xff" * (len(content) - 2 * quarter) + content[-quarter:])
        with pytest.raises(RuntimeError):
            blosc2.open(str(path))[:]

    def test_a_lost_cache_file_of_a_scan_that_is_bad_by_now(self, dataset, cache):
        self.vanish(dataset.data[1], cache, source=False)
        Path(dataset.data[1]["image"]).write_bytes(b"no volume")
        cache._paths.clear()
        assert dataset[0, 1]["read_errors"] == 1

    def test_a_lost_volume_is_retried_skipped_and_counted(self, dataset, cache, caplog):
        for index in (1, 2):
            self.vanish(dataset.data[index], cache)
        sample = dataset[0, 1]
        assert sample["read_errors"] == 2
        assert len(self.pauses) == 4
        assert all(f"skipped {dataset.data[index]['image']}" in caplog.text for index in (1, 2))
        assert sample["views"].shape == (2, 1, 16, 16, 8)
        # The views that the seed draws in the next volume.
        replacement = VolumeDataset(dataset.data[3:4], cache, transform(), memory_limit_gib=0)
        assert same(sample, replacement[0, 1])
        assert dataset[0, 3]["read_errors"] == 0

    def test_volumes_after_the_last_are_the_first(self, dataset, cache):
        self.vanish(dataset.data[4], cache)
        assert dataset[0, 4]["read_errors"] == 1

    def test_a_batch_carries_the_counts(self, dataset, cache):
        self.vanish(dataset.data[1], cache)
        loader = DataLoader(dataset, batch_sampler=[[(0, 0), (0, 1), (0, 2)]])
        assert next(iter(loader))["read_errors"].tolist() == [0, 1, 0]

    def test_an_error_where_none_is_left(self, dataset, cache):
        for item in dataset.data:
            self.vanish(item, cache)
        with pytest.raises(OSError, match="none of the 5 volumes could be read") as error:
            dataset[0, 0]
        assert str(cache.cache_dir) in str(error.value)

    def test_a_lost_folder(self, dataset, cache):
        shutil.rmtree(cache.cache_dir)
        shutil.rmtree(Path(dataset.data[0]["image"]).parent)
        with pytest.raises(OSError, match="none of the 5 volumes"):
            dataset[0, 0]


class Fail:
    """A random transform with a fault in it."""

    def __init__(self, error: type[Exception] = TypeError) -> None:
        self.error = error

    def set_random_state(self, seed: int) -> "Fail":
        return self

    def __call__(self, data: dict) -> dict:
        raise self.error("of a transform")


def assert_stops(load: Callable, error: type[Exception] = TypeError) -> None:
    """MONAI's ``Compose`` and PyTorch's loader wrap what is raised in words of their own."""
    with pytest.raises((error, RuntimeError)) as caught:
        load()
    cause = transform_error(caught.value)
    assert isinstance(cause, error) or error.__name__ in str(cause)
    assert "of a transform" in str(cause)


@pytest.mark.parametrize("memory_limit_gib", [0, 1])
class TestErrorsOfTransforms:
    """They are bugs: whoever trained on would train on other data than was asked for."""

    @pytest.fixture(autouse=True)
    def _no_pause(self, monkeypatch):
        monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("tried again"))

    @pytest.mark.parametrize("error", [TypeError, ValueError, IndexError, RuntimeError, OSError, MemoryError])
    @pytest.mark.parametrize("composed", [False, True])
    def test_stop_the_run(self, volumes, cache, memory_limit_gib, error, composed):
        step = Compose([*transform().transforms, Fail(error)]) if composed else Fail(error)
        dataset = VolumeDataset(volumes, cache, step, memory_limit_gib=memory_limit_gib)
        assert_stops(lambda: dataset[0, 1], error)

    def test_stop_a_training_loader(self, volumes, cache, memory_limit_gib):
        dataset = VolumeDataset(volumes, cache, Compose([Fail()]), memory_limit_gib=memory_limit_gib)
        assert_stops(lambda: next(iter(TrainingLoader(dataset, EpochBatchSampler(5, 2, 1), num_workers=0))))

    def test_stop_a_validation(self, volumes, cache, memory_limit_gib):
        dataset = VolumeDataset(volumes, cache, Compose([Fail()]), memory_limit_gib=memory_limit_gib)
        assert_stops(lambda: next(iter(DataLoader(dataset, sampler=range(10), batch_size=2))))
        assert_stops(lambda: list(dataset))

    def test_what_is_asked_of_the_array_in_error(self, volumes, cache, memory_limit_gib):
        """The library of arrays on disk has an error of its own for that."""
        step = Compose([Lambdad("image", lambda image: image["views"])])
        dataset = VolumeDataset(volumes, cache, step, memory_limit_gib=memory_limit_gib)
        with pytest.raises(RuntimeError) as caught:
            dataset[0, 1]
        assert isinstance(transform_error(caught.value), (IndexError, ValueError))

    def test_in_preparing_a_volume_whose_cache_file_is_lost(self, volumes, tmp_path, memory_limit_gib):
        cache = VolumeCache(tmp_path / "cache", Preprocessing([LoadVolumed("image")], {}))
        cache.prepare(volumes)
        dataset = VolumeDataset(volumes, cache, transform(), memory_limit_gib=0)
        cache.preprocessing = Fail()
        cache.path(volumes[1]).unlink()
        assert_stops(lambda: dataset[0, 1])


TABLE = [
    # volumes, batch size, patches per volume, processes
    (1, 1, 1, 1),
    (5, 2, 1, 1),
    (5, 4, 3, 2),
    (7, 3, 1, 1),
    (7, 100, 1, 1),
    (10, 4, 1, 2),
    (13, 5, 2, 3),
    (97, 16, 1, 4),
    (129, 128, 1, 8),
    (64, 16, 4, 8),
]


@pytest.mark.parametrize(("volumes", "batch_size", "patches", "world_size"), TABLE)
class TestEpochBatchSampler:
    epochs = 3

    def batches(self, volumes, batch_size, patches, world_size) -> list[list[list[tuple[int, int]]]]:
        """Batches of all steps, by rank."""
        samplers = [
            EpochBatchSampler(volumes, batch_size, self.epochs, patches, seed=5, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        return [list(sampler) for sampler in samplers]

    def test_every_draw_comes_once_per_epoch(self, volumes, batch_size, patches, world_size):
        by_rank = self.batches(volumes, batch_size, patches, world_size)
        drawn = [pair for batches in by_rank for batch in batches for pair in batch]
        assert sorted(drawn) == [(e, i) for e in range(self.epochs) for i in range(volumes * patches)]
        per_volume = np.bincount([i % volumes for e, i in drawn if e == 0], minlength=volumes)
        assert per_volume.tolist() == [patches] * volumes

    def test_steps_are_even_and_not_too_large(self, volumes, batch_size, patches, world_size):
        by_rank = self.batches(volumes, batch_size, patches, world_size)
        steps = math.ceil(volumes * patches / batch_size)
        assert {len(batches) for batches in by_rank} == {self.epochs * steps}
        totals = [sum(map(len, step)) for step in zip(*by_rank, strict=True)]
        assert max(totals) <= batch_size
        assert max(totals) - min(totals) <= 1
        sizes = [[len(batch) for batch in step] for step in zip(*by_rank, strict=True)]
        assert all(min(step) >= 1 and max(step) - min(step) <= 1 for step in sizes)
        # A step never mixes epochs.
        assert all(len({e for batch in step for e, _ in batch}) == 1 for step in zip(*by_rank, strict=True))

    def test_resuming_goes_on_where_the_run_was(self, volumes, batch_size, patches, world_size):
        straight = self.batches(volumes, batch_size, patches, world_size)[-1]
        sampler = EpochBatchSampler(volumes, batch_size, self.epochs, patches, 5, world_size - 1, world_size)
        steps = len(sampler)
        for step in {0, 1, steps - 1, steps, steps + 1, self.epochs * steps - 1, self.epochs * steps}:
            sampler.resume(step, sampler.state_dict())
            assert list(sampler) == straight[step:]


class TestOrder:
    def test_epochs_and_seeds_differ_and_runs_do_not(self):
        first, second, other = (list(EpochBatchSampler(50, 8, 2, seed=seed)) for seed in (0, 0, 1))
        assert first == second
        assert first != other
        orders = [[i for batch in first for e, i in batch if e == epoch] for epoch in range(2)]
        assert orders[0] != orders[1]
        assert orders[0] != sorted(orders[0])

    @pytest.mark.parametrize("volumes", [1, 3, 7])
    def test_steps_per_epoch_do_not_depend_on_the_number_of_volumes(self, volumes):
        sampler = EpochBatchSampler(volumes, 4, 2, patches_per_volume=None, steps_per_epoch=5)
        batches = list(sampler)
        assert len(sampler) == 5
        assert sampler.total_steps == len(batches) == 10
        assert {len(batch) for batch in batches} == {4}
        for epoch in range(2):
            drawn = [index % volumes for batch in batches for e, index in batch if e == epoch]
            counts = [drawn.count(volume) for volume in range(volumes)]
            assert max(counts) - min(counts) <= 1

    def test_length_is_the_steps_of_an_epoch(self):
        sampler = EpochBatchSampler(10, 4, max_epochs=7)
        assert len(sampler) == 3
        assert sampler.draws == 10


class TestSamplerErrors:
    @pytest.mark.parametrize("arguments", [(0, 1, 1, 1), (5, 0, 1, 1), (5, 1, 0, 1), (5, 1, 1, 0)])
    def test_numbers_below_1(self, arguments):
        with pytest.raises(ValueError, match="must be at least 1"):
            EpochBatchSampler(*arguments)

    @pytest.mark.parametrize(("volumes", "batch_size", "world_size"), [(3, 8, 4), (16, 2, 4), (9, 8, 5), (15, 2, 2)])
    def test_processes_without_work(self, volumes, batch_size, world_size):
        with pytest.raises(ValueError, match=f"leave some of {world_size} processes without work"):
            EpochBatchSampler(volumes, batch_size, 1, world_size=world_size)

    @pytest.mark.parametrize(
        "changed", [{"num_volumes": 11}, {"batch_size": 5}, {"seed": 1}, {"patches_per_volume": 2}]
    )
    def test_resuming_with_other_data_or_settings(self, changed):
        settings = {"num_volumes": 10, "batch_size": 4, "max_epochs": 3}
        state = EpochBatchSampler(**settings).state_dict()
        with pytest.raises(ValueError, match="resume with the same data, batch_size, patches_per_volume and seed"):
            EpochBatchSampler(**{**settings, **changed}).resume(2, state)


LOADING = """
import multiprocessing, os, subprocess
from torch.utils.data import Dataset
from pgl_ext.data.dataset import EpochBatchSampler
from pgl_ext.data.loader import TrainingLoader

class Numbers(Dataset):
    def __getitem__(self, key):
        if key[0] == {bad_epoch}:
            raise TypeError("of a transform")
        return {{"epoch": key[0], "process": os.getpid()}}

if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    epochs = []
    for batch in TrainingLoader(Numbers(), EpochBatchSampler(4, 2, max_epochs=8), num_workers=1):
        if not epochs:  # a signal that another process sends
            subprocess.run(["kill", "-TERM", str(int(batch["process"][0]))], check=True)
        epochs += batch["epoch"].tolist()
    print(epochs)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
class TestLoadingProcesses:
    @pytest.fixture
    def run(self, tmp_path, method) -> Callable[[int | None], subprocess.CompletedProcess]:
        def call(bad_epoch: int | None) -> subprocess.CompletedProcess:
            script = tmp_path / "loading.py"
            script.write_text(LOADING.format(bad_epoch=bad_epoch, method=method))
            return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)

        return call

    def test_go_on_after_sigterm_to_the_whole_job(self, run):
        done = run(None)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split("\n")[0] == str([epoch for epoch in range(8) for _ in range(4)])

    def test_end_with_the_training_that_an_error_stops(self, run):
        """And not half a minute later, with a message about their end instead of the error."""
        done = run(1)
        assert done.returncode == 1
        assert "TypeError: of a transform" in done.stderr.strip().splitlines()[-1]


# --- labelled cases ---------------------------------------------------------------------------------------------------

SIZE = (40, 38, 20)
TASK = SegmentationTask({"liver": [1], "kidneys": [2, 4], "spleen": [5]}, background_values=[0, 3], multi_label=True)


class Keep:
    """Passes on what the data set gives it."""

    def set_random_state(self, seed):
        return self

    def __call__(self, data):
        return data


def labels_of(number: int) -> np.ndarray:
    labels = np.random.default_rng(number).choice([0, 1, 2, 3, 4], p=[0.6, 0.2, 0.1, 0.05, 0.05], size=SIZE)
    if number == 1:
        # One case has the spleen, in two voxels.
        labels[3, 4, 5] = labels[39, 37, 19] = 5
    return labels.astype(np.uint8)


@pytest.fixture
def cases(tmp_path) -> list[dict]:
    items = []
    for number in range(3):
        voxels = np.random.default_rng(100 + number).normal(size=SIZE).astype(np.float32)
        paths = {name: str(tmp_path / f"{name}{number}.nii") for name in ("image", "label")}
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), paths["image"])
        nibabel.save(nibabel.Nifti1Image(labels_of(number), np.eye(4)), paths["label"])
        items.append(paths)
    return items


@pytest.fixture
def make(tmp_path, cases):
    keys = ["image", "label"]
    preprocessing = Preprocessing([LoadVolumed(keys), ConcatItemsd(keys, "image")], {})

    def build(transform=None, data=None, **settings) -> CaseDataset:
        transform = Compose([RandOrganPatchd("image", (16, 16, 8))]) if transform is None else transform
        cache = VolumeCache(tmp_path / "cache", preprocessing)
        return CaseDataset(cases if data is None else data, cache, transform, TASK, **settings)

    return build


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[key])), key


class TestSamples:
    def test_are_a_function_of_seed_epoch_and_index(self, make):
        first, second = make(), make()
        backwards = {key: second[key] for key in [(1, 4), (0, 4), (0, 1), (1, 0)]}
        for key, sample in backwards.items():
            assert_same(first[key], sample)
        distinct = [first[key]["image"] for key in backwards] + [make(seed=1)[(1, 4)]["image"]]
        assert len({float(image.sum()) for image in distinct}) == len(distinct)

    @pytest.mark.parametrize("memory_limit_gib", [0, None])
    def test_are_the_same_from_memory_and_from_disk(self, make, memory_limit_gib):
        reference, other = make(memory_limit_gib=1), make(memory_limit_gib=memory_limit_gib)
        for index in range(6):
            assert_same(reference[(2, index)], other[(2, index)])

    def test_are_the_same_whatever_the_number_of_workers(self, make):
        epochs = []
        for num_workers in (0, 2):
            sampler = EpochBatchSampler(3, 2, 1, patches_per_volume=2)
            epochs.append(list(DataLoader(make(), batch_sampler=sampler, num_workers=num_workers)))
        assert len(epochs[0]) == 3
        for first, second in zip(*epochs, strict=True):
            assert_same(first, second)

    def test_are_collated_to_batches(self, make):
        batch = next(iter(DataLoader(make(), batch_size=3)))
        assert {key: tuple(value.shape) for key, value in batch.items()} == {
            "image": (3, 1, 16, 16, 8),
            "label": (3, 1, 16, 16, 8),
            "read_errors": (3,),
        }

    def test_whole_cases(self, make, cases):
        dataset = make(Compose([SplitCased("image")]), memory_limit_gib=0)
        for number, sample in enumerate(dataset):
            np.testing.assert_array_equal(sample["label"][0].numpy(), labels_of(number))
            image = nibabel.load(cases[number]["image"]).get_fdata(dtype=np.float32)
            # Cached in half precision.
            np.testing.assert_allclose(sample["image"][0].numpy(), image, rtol=1e-3, atol=1e-4)


class TestOrganPoints:
    @pytest.mark.parametrize("memory_limit_gib", [0, None])
    def test_are_the_voxels_of_the_organs(self, make, memory_limit_gib):
        dataset = make(Keep(), memory_limit_gib=memory_limit_gib)
        for number in range(3):
            points = dataset[number]["organ_points"]
            labels = labels_of(number)
            assert len(points) == len(TASK.names)
            for found, values in zip(points, TASK.organs.values(), strict=True):
                expected = {tuple(place) for place in np.argwhere(np.isin(labels, values))}
                assert {tuple(place) for place in found.tolist()} == expected
                assert found.shape == (len(expected), 3)

    def test_of_large_organs_some_from_all_over(self, tmp_path, make, monkeypatch):
        monkeypatch.setattr("pgl_ext.data.dataset._POINTS_PER_ORGAN", 500)
        points = make(Keep())[0]["organ_points"]
        liver = points[0]
        assert len(liver) == len(np.unique(liver, axis=0)) == 500
        assert (labels_of(0)[tuple(liver.T)] == 1).all()
        np.testing.assert_allclose(liver.mean(0), (np.array(SIZE) - 1) / 2, rtol=0.15)
        # Another process, such as a loader's worker, chooses the same ones.
        for first, second in zip(points, make(Keep())[0]["organ_points"], strict=True):
            np.testing.assert_array_equal(first, second)

    def test_patches_are_centred_on_them(self, make):
        transform = RandOrganPatchd("image", (9, 9, 9), scale_range=(1, 1), organ_prob=1.0, flip_prob=0)
        dataset = make(Compose([transform]))
        seen = set()
        for index in range(1, 90, 3):
            label = dataset[(0, index)]["label"][0]
            # Off its centre only where the crop was shifted into the volume.
            if (transform.crop_start > 0).all() and (transform.crop_start + 9 < SIZE).all():
                seen.add(int(label[4, 4, 4]))
            assert label.any()
        assert seen <= {1, 2, 4, 5}
        assert {1, 2} <= seen


class TestAnnotated:
    def test_says_which_organs_count(self, make, cases):
        annotated = [["liver", "spleen"], None, ["kidneys", "an organ of another task"]]
        data = [c if a is None else {**c, "annotated": a} for c, a in zip(cases, annotated, strict=True)]
        dataset = make(data=data)
        flags = [dataset[index]["annotated"].tolist() for index in range(3)]
        # A case that does not say so has all of them.
        assert flags == [[True, False, True], [True, True, True], [False, True, False]]
        batch = next(iter(DataLoader(dataset, batch_size=3)))
        assert batch["annotated"].shape == (3, 3)
        assert batch["annotated"].dtype == torch.bool

    def test_is_absent_where_no_case_says(self, make):
        assert "annotated" not in make()[0]


@pytest.mark.parametrize("memory_limit_gib", [0, 1])
@pytest.mark.parametrize("step", [RandOrganPatchd("image", (16, 16, 8)), SplitCased("image")])
def test_an_error_of_a_transform_stops_training_and_validation_on_cases(make, memory_limit_gib, step):
    dataset = make(Compose([step, Fail()]), memory_limit_gib=memory_limit_gib)
    assert_stops(lambda: dataset[0, 1])
    assert_stops(lambda: next(iter(DataLoader(dataset, batch_size=1))))


def test_a_case_whose_cache_file_is_damaged_and_label_map_lost_is_skipped(make, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    dataset = make(Compose([SplitCased("image")]), memory_limit_gib=0)
    dataset.cache.prepare(dataset.data)
    TestVolumesThatVanish.spoil(dataset.cache.path(dataset.data[1]))
    Path(dataset.data[1]["label"]).unlink()
    sample = dataset[0, 1]
    assert sample["read_errors"] == 1
    np.testing.assert_array_equal(sample["label"][0].numpy(), labels_of(2))


class NoRoom(Dataset):
    def __getitem__(self, key: tuple) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device")


@pytest.mark.parametrize("workers", [0, 1])
def test_too_little_shared_memory_is_said_with_a_remedy(workers):
    with pytest.raises(MemoryError, match="--shm-size 8g', or set --num_workers 0"):
        next(iter(TrainingLoader(NoRoom(), EpochBatchSampler(4, 2, 1), num_workers=workers)))
