import pytest
import torch

from pgl_ext.evaluation.probes.voxels import sample_voxels
from pgl_ext.task import SegmentationTask

ORGANS = SegmentationTask({"liver": [1], "spleen": [2, 3]})
TUMOUR = SegmentationTask({"kidney": [1, 2], "tumour": [2]}, multi_label=True)


def label_map(size: int = 20) -> torch.Tensor:
    """Mostly background, 200 voxels of 1, 20 of 2 and 20 of 3."""
    labels = torch.zeros(size**3)
    labels[:240] = torch.tensor([1.0] * 200 + [2.0] * 20 + [3.0] * 20)
    return labels[torch.randperm(size**3, generator=torch.Generator().manual_seed(0))].view(1, size, size, size)


def draw(labels: torch.Tensor, task: SegmentationTask, seed: int = 0, annotated=None):
    return sample_voxels(labels, task, 50, 300, torch.Generator().manual_seed(seed), annotated)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        # by value: voxels drawn
        (ORGANS, {0: 300, 1: 50, (2, 3): 40}),
        (TUMOUR, {(0, 3): 300, 1: 50, 2: 20}),
    ],
)
def test_strata_are_drawn_in_the_numbers_asked_for(task, expected):
    labels = label_map()
    drawn = draw(labels, task)
    values = labels[0][tuple(drawn.voxels.T)]
    assert len(torch.unique(drawn.voxels, dim=0)) == len(drawn.voxels) == sum(expected.values())
    for value, number in expected.items():
        inside = torch.isin(values, torch.tensor(value, dtype=torch.float32))
        assert int(inside.sum()) == number
        total = torch.isin(labels, torch.tensor(value, dtype=torch.float32)).sum()
        assert float(drawn.counts[inside].sum()) == pytest.approx(float(total))
        assert float(drawn.balance[inside].sum()) == pytest.approx(1)
    assert torch.equal(drawn.targets, task.targets(values.view(1, -1, 1, 1)).flatten(1).T)
    assert bool(drawn.known.all())


def test_more_organs_than_an_integer_has_bits():
    """Each of 105 with 60 voxels, and one that holds the last three of them."""
    organs = {f"organ {value}": [value] for value in range(1, 106)}
    task = SegmentationTask({**organs, "several": [103, 104, 105]}, multi_label=True)
    labels = torch.zeros(20**3)
    labels[: 105 * 60] = torch.arange(1.0, 106.0).repeat(60)
    labels = labels.view(1, 20, 20, 20)
    drawn = draw(labels, task)
    values = labels[0][tuple(drawn.voxels.T)]
    assert [int((values == value).sum()) for value in range(106)] == [300] + [50] * 105
    assert drawn.counts[values > 0].tolist() == pytest.approx([60 / 50] * 105 * 50)
    assert torch.equal(drawn.targets.T.bool(), task.masks_of_labels(values.view(1, -1, 1, 1)).flatten(1))


def test_a_case_without_background():
    drawn = draw(torch.ones(1, 8, 8, 8), ORGANS)
    assert len(drawn.voxels) == 50
    assert drawn.targets[:, 1].all()


def test_the_same_seed_draws_the_same_voxels():
    first, again, other = (draw(label_map(), ORGANS, seed).voxels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_organ_that_is_not_annotated_makes_no_stratum():
    labels = label_map()
    drawn = draw(labels, TUMOUR, annotated=torch.tensor([True, False]))
    assert drawn.known.tolist() == [True, False]
    assert len(drawn.voxels) == 350
    assert draw(labels, TUMOUR, annotated=torch.tensor([False, False])).known.tolist() == [False, False]


def test_a_multi_class_task_needs_all_organs_annotated():
    with pytest.raises(ValueError, match="set multi_label to true"):
        draw(label_map(), ORGANS, annotated=torch.tensor([True, False]))


def test_a_case_without_organs_has_voxels_of_the_background():
    drawn = draw(torch.zeros(1, 8, 8, 8), ORGANS)
    assert len(drawn.voxels) == 300
    assert float(drawn.counts.sum()) == pytest.approx(8**3)
