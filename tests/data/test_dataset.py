import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import Compose, SelectItemsd
from torch.utils.data import DataLoader

from pgl_ext.data import dataset as module
from pgl_ext.data.dataset import EpochBatchSampler, VolumeDataset
from pgl_ext.data.prepare import prepare_volumes
from pgl_ext.transforms import NameToIndexd, RandOverlappingViewsd
from pgl_ext.transforms.checks import BadVolumesError


def transform() -> Compose:
    return Compose([RandOverlappingViewsd("image", (16, 16, 8)), SelectItemsd(["views", "affines"])])


def same(first: dict, second: dict) -> bool:
    return set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in ("views", "affines"))


class TestPrepareVolumes:
    def test_from_a_folder(self, volumes, cache):
        parts = prepare_volumes(cache, str(Path(volumes[0]["image"]).parent), validation_fraction=0.4)
        assert set(parts) == {"training", "validation"}
        assert [len(parts["training"]), len(parts["validation"])] == [3, 2]
        assert sorted(i["image"] for part in parts.values() for i in part) == [i["image"] for i in volumes]
        assert len(list(cache.cache_dir.glob("*.b2nd"))) == 5

    def test_from_a_data_list(self, volumes, cache, tmp_path):
        data_list = tmp_path / "list.json"
        names = [Path(item["image"]).name for item in volumes[:3]]
        data_list.write_text(json.dumps({"pretraining": [{"image": f"volumes/{name}"} for name in names]}))
        parts = prepare_volumes(cache, str(tmp_path), str(data_list), data_list_key="pretraining")
        assert len(parts["training"]) == 2
        assert len(parts["validation"]) == 1

    def test_from_several_data_lists(self, volumes, cache, tmp_path):
        lists = []
        for name, items in (("liver", volumes[:2]), ("neck", volumes[2:])):
            lists.append(tmp_path / f"{name}.json")
            lists[-1].write_text(json.dumps({"name": name, "training": [item["image"] for item in items]}))
        parts = prepare_volumes(cache, None, [str(path) for path in lists], source_fields=["task"])
        tasks = {item["image"]: item["task"] for part in parts.values() for item in part}
        assert tasks == {item["image"]: "liver" if index < 2 else "neck" for index, item in enumerate(volumes)}

    def test_scans_of_unknown_source_are_named_before_any_is_prepared(self, volumes, cache):
        with pytest.raises(ValueError, match="5 of 5 scans have no 'group'"):
            prepare_volumes(cache, str(Path(volumes[0]["image"]).parent), source_fields=["group"])
        assert not list(cache.cache_dir.glob("*.b2nd"))

    def test_the_seed_chooses_what_is_held_out(self, volumes, cache):
        folder = str(Path(volumes[0]["image"]).parent)
        held_out = [prepare_volumes(cache, folder, seed=seed)["validation"] for seed in [*range(6), 0]]
        assert held_out[0] == held_out[-1]
        assert len({part[0]["image"] for part in held_out}) > 1

    def test_all_bad_files_are_named_at_once(self, volumes, cache):
        self.spoil(volumes)
        with pytest.raises(BadVolumesError) as error:
            prepare_volumes(cache, str(Path(volumes[0]["image"]).parent))
        assert "2 of 5" in str(error.value)
        assert all(volumes[i]["image"] in str(error.value) for i in (1, 3))
        assert "skip_bad_files" in str(error.value)

    def test_bad_files_can_be_left_out(self, volumes, cache, tmp_path):
        self.spoil(volumes)
        report = tmp_path / "output" / "skipped_files.txt"
        folder = str(Path(volumes[0]["image"]).parent)
        parts = prepare_volumes(cache, folder, skip_bad_files=True, report_path=str(report))
        assert sorted(i["image"] for part in parts.values() for i in part) == [volumes[i]["image"] for i in (0, 2, 4)]
        assert [line.split("\t")[0] for line in report.read_text().splitlines()] == [
            volumes[i]["image"] for i in (1, 3)
        ]
        # The dataset that follows reads what is left.
        dataset = VolumeDataset(parts["training"], cache, transform())
        assert [dataset[0, index]["read_errors"] for index in range(len(dataset))] == [0, 0]

    @staticmethod
    def spoil(volumes) -> None:
        Path(volumes[1]["image"]).write_bytes(b"no volume")
        content = Path(volumes[3]["image"]).read_bytes()
        Path(volumes[3]["image"]).write_bytes(content[:5000])


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

    @pytest.mark.parametrize(("processes", "held"), [(1, 4), (2, 2)])
    def test_by_default_half_of_the_free_memory_is_shared_by_the_processes(
        self, volumes, cache, monkeypatch, processes, held
    ):
        free = 8.5 * cache.nbytes(volumes[0])
        monkeypatch.setattr(module, "available_memory", lambda: free)
        dataset = VolumeDataset(volumes, cache, transform(), processes=processes)
        opened = []
        original = cache.open
        monkeypatch.setattr(cache, "open", lambda item: opened.append(item["image"]) or original(item))
        for index in range(5):
            dataset[0, index]
        assert len(opened) == 5 - held


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
        failures = iter([OSError("stale handle"), RuntimeError("short read")])
        original = cache.open

        def fail_twice(item):
            error = next(failures, None)
            if error:
                raise error
            return original(item)

        monkeypatch.setattr(cache, "open", fail_twice)
        sample = dataset[0, 1]
        assert same(sample, expected)
        assert sample["read_errors"] == 0
        assert len(self.pauses) == 2

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
