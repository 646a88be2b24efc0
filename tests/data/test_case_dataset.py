import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import Compose, ConcatItemsd
from torch.utils.data import DataLoader

from pgl_ext.data.cache import VolumeCache
from pgl_ext.data.dataset import CaseDataset, EpochBatchSampler
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms import LoadVolumed, RandOrganPatchd, SplitCased

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
    preprocessing = Compose([LoadVolumed(keys), ConcatItemsd(keys, "image")])

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
