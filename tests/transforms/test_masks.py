import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch.utils.data import default_collate

from pgl_ext.task import SegmentationTask
from pgl_ext.transforms import NameToIndexd
from pgl_ext.transforms.masks import LabelMapd, OrganMasksd

TASK = SegmentationTask({"liver": [1], "kidneys": [2, 3]})


def test_names_are_numbered_in_the_order_given():
    transform = NameToIndexd(["task", "group"], ["b", "a", 3])
    samples = [{"task": task, "group": "a", "image": "x"} for task in ("a", "b", 3, "3")]
    numbered = [transform(sample) for sample in samples]
    assert [sample["task"] for sample in numbered] == [1, 0, 2, 2]
    assert all(sample["group"] == 1 and sample["image"] == "x" for sample in numbered)
    assert samples[0]["task"] == "a"
    assert str(default_collate(numbered)["task"].dtype) == "torch.int64"


def test_another_name():
    with pytest.raises(ValueError, match=r"task 'c' is not among the names \['a', 'b'\]"):
        NameToIndexd("task", ["a", "b"])({"task": "c"})


class TestOrganMasks:
    @pytest.mark.parametrize("task", [TASK, SegmentationTask({"a": [1, 2], "b": [2]}, [0, 3], multi_label=True)])
    def test_prediction_and_label_become_masks(self, task):
        logits = torch.randn(task.out_channels, 5, 4, 3)
        label = torch.randint(0, 4, (1, 5, 4, 3)).float()
        data = {"pred": logits, "label": label, "image": 1}
        result = OrganMasksd(task)(data)
        for key in ("pred", "label"):
            assert result[key].shape == (2, 5, 4, 3)
            assert result[key].dtype == torch.bool
        organs = [[1], [2, 3]] if task is TASK else [[1, 2], [2]]
        assert torch.equal(result["label"], torch.cat([torch.isin(label, torch.tensor(v)) for v in organs]))
        expected = logits.argmax(0) if task is TASK else None
        for index in range(2):
            mask = expected == index + 1 if task is TASK else torch.sigmoid(logits[index]) > 0.5
            assert torch.equal(result["pred"][index], mask)
        assert result["image"] == 1
        assert data["pred"] is logits


@pytest.mark.parametrize("multi_label", [True, False])
def test_masks_become_a_label_map_with_the_values_of_files(multi_label):
    """Where organs overlap, that of the one of fewer values, or else of the later one."""
    task = SegmentationTask({"liver": [2], "kidney": [5, 6], "tumour": [7]}, multi_label=multi_label)
    masks = np.random.default_rng(0).random((3, 5, 4, 3)) < 0.4
    if not multi_label:
        masks &= np.cumsum(masks, axis=0) == 1
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0]))
    data = {"pred": MetaTensor(masks, affine=affine), "other": 1}
    result = LabelMapd("pred", task)(data)
    liver, kidney, tumour = masks
    assert np.array_equal(result["pred"].numpy()[0], np.select([tumour, liver, kidney], [7, 2, 5], 0))
    assert torch.equal(result["pred"].affine.float(), affine)
    assert result["organs"] is data["pred"]
    assert result["other"] == 1


@pytest.mark.parametrize("multi_label", [False, True])
def test_voxels_to_ignore_are_in_no_mask(multi_label):
    task = SegmentationTask({"a": [1], "b": [2]}, multi_label=multi_label, ignore_label=9)
    logits = torch.randn(task.out_channels, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (1, 4, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    whole = OrganMasksd(task)({"pred": logits, "label": labels})
    labels = labels.clone()
    labels[:, 2:] = 9
    result = OrganMasksd(task)({"pred": logits, "label": labels})
    for key in ("pred", "label"):
        assert torch.equal(result[key][:, :2], whole[key][:, :2])
        assert not result[key][:, 2:].any()
        assert whole[key][:, 2:].any()
