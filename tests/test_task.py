import itertools

import numpy as np
import pytest
import torch
from monai.networks.utils import one_hot

from pgl_ext.task import SegmentationTask

ORGANS = {"spleen": 3, "kidneys": [1, 5], "liver": [300]}
KIDNEY = {"kidney": [1, 2], "tumour": [2]}
SHAPE = (4, 5, 6)


def random_labels(task: SegmentationTask, *batch: int) -> torch.Tensor:
    labels = np.random.default_rng(0).choice(task.values, size=(*batch, 1, *SHAPE))
    return torch.as_tensor(labels, dtype=torch.float32)


def random_scores(task: SegmentationTask, *batch: int) -> torch.Tensor:
    return torch.randn(*batch, task.out_channels, *SHAPE, generator=torch.Generator().manual_seed(0))


MULTI_CLASS = SegmentationTask(ORGANS, background_values=[0, 7])
MULTI_LABEL = SegmentationTask(KIDNEY, multi_label=True)


def test_attributes():
    assert MULTI_CLASS.names == ("spleen", "kidneys", "liver")
    assert MULTI_CLASS.out_channels == 4
    assert MULTI_CLASS.values == (0, 1, 3, 5, 7, 300)
    assert (MULTI_LABEL.names, MULTI_LABEL.out_channels, MULTI_LABEL.values) == (("kidney", "tumour"), 2, (0, 1, 2))
    assert SegmentationTask({"spleen": 1}, multi_label=True).out_channels == 1


@pytest.mark.parametrize("task", [MULTI_CLASS, MULTI_LABEL])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_masks_of_labels(task, batch):
    labels = random_labels(task, *batch)
    masks = task.masks_of_labels(labels)
    assert masks.shape == (*batch, len(task.names), *SHAPE)
    assert masks.dtype == torch.bool
    for channel, values in enumerate(task.organs.values()):
        expected = np.isin(labels.numpy(), values)[..., 0, :, :, :]
        np.testing.assert_array_equal(masks[..., channel, :, :, :], expected)


def test_masks_of_labels_of_every_type_that_files_and_cache_have():
    labels = random_labels(MULTI_CLASS)
    for dtype in (torch.float16, torch.int16, torch.int64):
        assert torch.equal(MULTI_CLASS.masks_of_labels(labels.to(dtype)), MULTI_CLASS.masks_of_labels(labels))


def test_masks_of_labels_leave_the_labels_as_they_are():
    labels = random_labels(MULTI_CLASS)
    before = labels.clone()
    MULTI_CLASS.masks_of_labels(labels)
    assert torch.equal(labels, before)


def test_targets_of_classes_are_one_hot():
    labels = random_labels(MULTI_CLASS, 2)
    classes = torch.zeros_like(labels)
    for number, values in enumerate(MULTI_CLASS.organs.values(), start=1):
        classes[torch.isin(labels, torch.tensor(values, dtype=labels.dtype))] = number
    assert torch.equal(MULTI_CLASS.targets(labels), one_hot(classes, 4))


def test_targets_of_overlapping_organs_are_their_masks():
    labels = random_labels(MULTI_LABEL, 2)
    assert torch.equal(MULTI_LABEL.targets(labels), MULTI_LABEL.masks_of_labels(labels).float())


@pytest.mark.parametrize("task", [MULTI_CLASS, MULTI_LABEL])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_masks_of_the_network_s_output(task, batch):
    logits = random_scores(task, *batch)
    probabilities = task.probabilities(logits)
    assert probabilities.shape == logits.shape
    assert ((probabilities > 0) & (probabilities < 1)).all()
    masks = task.masks(logits)
    assert torch.equal(masks, task.masks_of_probabilities(probabilities))
    assert masks.dtype == torch.bool
    scores = logits.numpy()
    if task.multi_label:
        np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-scores)), rtol=1e-5)
        np.testing.assert_array_equal(masks, scores > 0)
    else:
        torch.testing.assert_close(probabilities.sum(-4), torch.ones(*batch, *SHAPE))
        best = scores.argmax(-4)
        np.testing.assert_array_equal(masks, np.stack([best == number for number in (1, 2, 3)], axis=-4))


@pytest.mark.parametrize("task", [MULTI_CLASS, MULTI_LABEL])
def test_the_network_that_outputs_the_targets_is_right(task):
    labels = random_labels(task, 2)
    assert torch.equal(task.masks(task.targets(labels) * 20 - 10), task.masks_of_labels(labels))


@pytest.mark.parametrize(
    "organs",
    [ORGANS, KIDNEY, {"tumour": [2], "kidney": [1, 2]}, {"a": [4, 3], "b": [2, 3, 4, 9], "c": [9, 8, 1], "d": 9}],
)
def test_label_maps_of_masks_show_the_same_organs(organs):
    """Also where a tumour is named before the organ that it lies in."""
    task = SegmentationTask(organs, multi_label=True)
    written = torch.tensor([0, *task.label_values], dtype=torch.float32).reshape(1, -1, 1, 1)
    masks = task.masks_of_labels(written)
    assert torch.equal(task.masks_of_labels(task.labels_of_masks(masks)), masks)
    assert all(value in values for value, values in zip(task.label_values, task.organs.values(), strict=True))


def test_label_maps_of_classes_have_the_files_values():
    labels = random_labels(MULTI_CLASS, 2)
    written = MULTI_CLASS.labels_of_masks(MULTI_CLASS.masks_of_labels(labels))
    assert written.dtype == torch.int16
    expected = np.select([labels == 3, np.isin(labels, [1, 5]), labels == 300], [3, 1, 300])
    np.testing.assert_array_equal(written, expected)


def test_label_maps_of_overlapping_masks():
    assert MULTI_LABEL.label_values == (1, 2)
    masks = torch.tensor(list(itertools.product([False, True], repeat=2))).T.reshape(2, 4, 1, 1)
    labels = MULTI_LABEL.labels_of_masks(masks)
    assert labels.flatten().tolist() == [0, 2, 1, 2]  # a tumour beside every kidney is shown, too
    assert labels.dtype == torch.uint8


def test_channels_of_names():
    assert MULTI_CLASS.channels_of(["liver", "spleen", "heart"]) == [True, False, True]
    assert MULTI_CLASS.channels_of([]) == [False] * 3


@pytest.mark.parametrize("task", [MULTI_CLASS, MULTI_LABEL])
def test_a_task_is_built_again_from_its_description(task):
    again = SegmentationTask(**task.description())
    assert vars(again) == vars(task)
    assert list(again.organs) == list(task.organs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"organs": {}}, "no organs"),
        ({"organs": [1, 2]}, r"by name.*got \[1, 2\]"),
        ({"organs": {"liver": []}}, r"'liver' must be whole numbers from 0, got \[\]"),
        ({"organs": {"liver": None}}, "'liver'.*got None"),
        ({"organs": {"liver": "1"}}, "'liver'.*got '1'"),
        ({"organs": {"liver": [1.5]}}, "'liver'.*1.5"),
        ({"organs": {"liver": [-1]}}, "'liver'.*-1"),
        ({"organs": {"liver": [float("nan")]}}, "'liver'.*nan"),
        ({"organs": {"liver": 1}, "background_values": []}, r"'background'.*got \[\]"),
        ({"organs": {"liver": 0}}, r"\[0\] belong to an organ and to background_values"),
        ({"organs": KIDNEY}, r"share the label values \[2\]: overlapping organs need multi_label = true"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SegmentationTask(**arguments)


class TestIgnore:
    def test_the_value_is_one_that_files_may_hold_and_belongs_to_nothing(self):
        task = SegmentationTask({"liver": [1]}, ignore_label=9)
        assert task.values == (0, 1, 9)
        assert task.description()["ignore_label"] == 9
        labels = torch.tensor([0, 1, 9, 1]).view(1, 1, 1, 4)
        assert task.masks_of_labels(labels).flatten().tolist() == [False, True, False, True]
        masks = torch.ones(1, 1, 1, 4, dtype=torch.bool)
        assert task.without_ignored(masks, labels).flatten().tolist() == [True, True, False, True]
        assert task.known_voxels(labels[..., :2]) is None

    @pytest.mark.parametrize("value", [0, 1, -1, 2.5])
    def test_values_that_mean_something_else(self, value):
        with pytest.raises(ValueError, match="ignore_label"):
            SegmentationTask({"liver": [1]}, ignore_label=value)
