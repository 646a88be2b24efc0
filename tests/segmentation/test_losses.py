from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss
from torch import nn

from pgl_ext.segmentation.losses import DiceCrossEntropyLoss, SegmentationLoss
from pgl_ext.task import SegmentationTask

ORGANS = {"liver": [1], "spleen": [3], "kidneys": [4, 5]}
MULTI_CLASS = SegmentationTask(ORGANS, background_values=[0, 2])
MULTI_LABEL = SegmentationTask(ORGANS, background_values=[0, 2], multi_label=True)
OVERLAPPING = SegmentationTask({"kidney": [1, 2], "tumour": [2]}, multi_label=True)
PATCH = (8, 7, 6)


def segmentation_batch(task: SegmentationTask, size: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, task.out_channels, *PATCH, generator=generator)
    values = torch.tensor(task.values)
    return logits, values[torch.randint(0, len(values), (size, 1, *PATCH), generator=generator)].float()


def masks(labels: torch.Tensor, *values: int) -> torch.Tensor:
    return torch.isin(labels, torch.tensor(values, dtype=labels.dtype)).float()


class TestDiceCrossEntropyLoss:
    @pytest.mark.parametrize("batch", [True, False])
    def test_classes_are_those_of_stock_monai(self, batch):
        logits, labels = segmentation_batch(MULTI_CLASS)
        target = MULTI_CLASS.targets(labels)
        stock = DiceCELoss(softmax=True, include_background=False, batch=batch)
        value = DiceCrossEntropyLoss(False, batch=batch)(logits, target)
        torch.testing.assert_close(value, stock(logits, target))

    def test_a_single_binary_decision_is_that_of_stock_monai(self):
        task = SegmentationTask({"spleen": [1]}, multi_label=True)
        logits, labels = segmentation_batch(task)
        stock = DiceCELoss(sigmoid=True, batch=True)
        torch.testing.assert_close(DiceCrossEntropyLoss(True, batch=True)(logits, labels), stock(logits, labels))

    def test_several_binary_decisions_by_hand(self):
        """Each channel by itself. MONAI's own loss would have them compete in a softmax."""
        logits, labels = segmentation_batch(OVERLAPPING)
        target = OVERLAPPING.targets(labels).double()
        p = torch.sigmoid(logits.double())
        entropy = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
        dims = (0, 2, 3, 4)
        dice = 2 * (p * target).sum(dims) / (p.sum(dims) + target.sum(dims))
        expected = entropy + (1 - dice).mean()
        value = DiceCrossEntropyLoss(True, batch=True)(logits, OVERLAPPING.targets(labels))
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
        stock = DiceCELoss(sigmoid=True, batch=True)(logits, OVERLAPPING.targets(labels))
        assert abs(float(stock) - float(expected)) > 0.1

    def test_channels_of_a_multi_label_task_do_not_touch_each_other(self):
        logits, labels = segmentation_batch(OVERLAPPING)
        target = OVERLAPPING.targets(labels)
        gradients = []
        for shift in (0.0, 5.0):
            x = logits.clone()
            x[:, 1] += shift
            x.requires_grad_()
            DiceCrossEntropyLoss(True, batch=True)(x, target).backward()
            gradients.append(x.grad[:, 0])
        torch.testing.assert_close(*gradients)


class TestSegmentationLoss:
    def test_multi_class_equals_stock_monai_on_the_one_hot(self):
        logits, labels = segmentation_batch(MULTI_CLASS)
        organs = [masks(labels, 1), masks(labels, 3), masks(labels, 4, 5)]
        one_hot = torch.cat([masks(labels, 0, 2), *organs], dim=1)
        assert (one_hot.sum(1) == 1).all()
        stock = DiceCELoss(softmax=True, include_background=False, batch=True)
        value = SegmentationLoss(MULTI_CLASS)(logits, {"label": labels})
        torch.testing.assert_close(value, stock(logits, one_hot))

    def test_overlapping_organs(self):
        logits, labels = segmentation_batch(OVERLAPPING)
        target = torch.cat([masks(labels, 1, 2), masks(labels, 2)], dim=1)
        assert (target.sum(1) == 2).any()
        expected = DiceLoss(sigmoid=True, batch=True)(logits, target) + nn.BCEWithLogitsLoss()(logits, target)
        torch.testing.assert_close(SegmentationLoss(OVERLAPPING)(logits, {"label": labels}), expected)

    def test_a_perfect_prediction_costs_nothing(self):
        for task in (MULTI_CLASS, MULTI_LABEL, OVERLAPPING):
            _, labels = segmentation_batch(task)
            logits = 40 * task.targets(labels) - 20
            assert float(SegmentationLoss(task)(logits, {"label": labels})) < 1e-5
            assert float(SegmentationLoss(task)(-logits, {"label": labels})) > 10

    def test_deep_supervision_is_a_weighted_mean_of_its_levels(self):
        task = SegmentationTask({"a": [1], "b": [2]})
        loss = SegmentationLoss(task)
        levels = [torch.randn(2, 3, 4, 4, 4) for _ in range(3)]
        batch = {"label": torch.randint(0, 3, (2, 1, 4, 4, 4)).float()}
        expected = sum(w * float(loss(level, batch)) for w, level in zip((4 / 7, 2 / 7, 1 / 7), levels, strict=True))
        assert float(loss(torch.stack(levels, dim=1), batch)) == pytest.approx(expected, rel=1e-6)

    def test_another_loss(self):
        logits, labels = segmentation_batch(MULTI_LABEL)
        annotated = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0]]).bool()
        loss = SegmentationLoss(MULTI_LABEL, nn.MSELoss())
        squares = (logits - MULTI_LABEL.targets(labels)).square().mean((2, 3, 4))
        assert float(loss(logits, {"label": labels})) == pytest.approx(float(squares.mean()))
        expected = (squares[[0, 1], 0].mean() + squares[[1, 2], 1].mean()) / 3
        assert float(loss(logits, {"label": labels, "annotated": annotated})) == pytest.approx(float(expected))

    @pytest.mark.parametrize("task", [MULTI_CLASS, MULTI_LABEL], ids=["multi-class", "multi-label"])
    def test_all_annotated_is_as_without_the_entry(self, task):
        logits, labels = segmentation_batch(task)
        loss = SegmentationLoss(task)
        annotated = torch.ones(3, 3, dtype=torch.bool)
        assert loss(logits, {"label": labels, "annotated": annotated}) == loss(logits, {"label": labels})

    def test_an_organ_that_is_not_annotated_gets_no_gradient(self):
        logits, labels = segmentation_batch(MULTI_LABEL)
        logits.requires_grad_()
        annotated = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0]]).bool()
        SegmentationLoss(MULTI_LABEL)(logits, {"label": labels, "annotated": annotated}).backward()
        reached = logits.grad.abs().sum((2, 3, 4)) > 0
        assert torch.equal(reached, annotated)

    def test_its_logits_and_labels_do_not_count(self):
        logits, labels = segmentation_batch(MULTI_LABEL)
        annotated = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1]]).bool()
        loss = SegmentationLoss(MULTI_LABEL)
        results = []
        for change_logits, new_label in ((0.0, 3.0), (50.0, 3.0), (-50.0, 0.0), (7.0, 2.0)):
            x, y = logits.clone(), labels.clone()
            x[1, 1] += change_logits
            y[1][y[1] == 3] = new_label
            x.requires_grad_()
            value = loss(x, {"label": y, "annotated": annotated})
            value.backward()
            results.append((value.detach(), x.grad))
        for value, gradient in results[1:]:
            assert value == results[0][0]
            assert torch.equal(gradient, results[0][1])

    def test_is_the_mean_over_organs_of_losses_over_their_samples(self):
        logits, labels = segmentation_batch(MULTI_LABEL)
        annotated = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0]]).bool()
        value = SegmentationLoss(MULTI_LABEL)(logits, {"label": labels, "annotated": annotated})
        expected = 0.0
        for channel, values in enumerate(ORGANS.values()):
            x, y = logits[annotated[:, channel], channel], masks(labels, *values)[annotated[:, channel], 0]
            if len(x):
                expected += float(DiceLoss(sigmoid=True, batch=True)(x[:, None], y[:, None]))
                expected += float(nn.functional.binary_cross_entropy_with_logits(x, y))
        assert float(value) == pytest.approx(expected / 3, rel=1e-5)

    @staticmethod
    def gradient(logits, labels, annotated) -> torch.Tensor:
        logits = logits.clone().requires_grad_()
        batch = {"label": labels, "annotated": torch.tensor(annotated).bool()}
        SegmentationLoss(MULTI_LABEL)(logits, batch).backward()
        return logits.grad

    @pytest.mark.parametrize("others", [[[1, 1], [1, 1], [1, 1]], [[0, 1], [1, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]])
    def test_gradient_of_an_organ_whatever_else_is_annotated(self, others):
        logits, labels = segmentation_batch(MULTI_LABEL)
        for own in ([1, 1, 1], [1, 0, 1], [0, 1, 0]):
            expected = self.gradient(logits, labels, [[o, 1, 0] for o in own])[:, 0]
            found = self.gradient(logits, labels, [[o, *other] for o, other in zip(own, others, strict=True)])[:, 0]
            torch.testing.assert_close(found, expected)

    def test_gradient_of_an_organ_is_that_of_a_batch_of_the_samples_where_it_is_annotated(self):
        logits, labels = segmentation_batch(MULTI_LABEL)
        annotated = [[1, 0, 1], [1, 1, 0], [1, 0, 0]]
        found = self.gradient(logits, labels, annotated)
        for organ in range(3):
            some = [sample for sample in range(3) if annotated[sample][organ]]
            alone = self.gradient(logits[some], labels[some], [[1, 1, 1]] * len(some))
            torch.testing.assert_close(found[some, organ], alone[:, organ])

    def test_without_any_annotation_there_is_nothing_to_learn(self):
        logits, labels = segmentation_batch(MULTI_LABEL)
        assert not self.gradient(logits, labels, [[0, 0, 0]] * 3).any()

    def test_not_annotated_and_multi_class(self):
        logits, labels = segmentation_batch(MULTI_CLASS)
        annotated = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
        with pytest.raises(ValueError, match="set multi_label to true, or leave that organ or those cases out"):
            SegmentationLoss(MULTI_CLASS)(logits, {"label": labels, "annotated": annotated})


IGNORING = [SegmentationTask(ORGANS, [0, 2], multi_label, ignore_label=9) for multi_label in (False, True)]


class TestVoxelsToIgnore:
    @pytest.mark.parametrize("task", IGNORING)
    def test_the_loss_is_that_of_the_others_by_hand(self, task):
        """Dice over the batch and cross-entropy, in double precision, of the voxels whose label is not 9."""
        logits, labels = segmentation_batch(task)
        known = (labels != 9)[:, 0]
        z, t = (v.double().movedim(1, 0)[:, known] for v in (logits, task.targets(labels)))
        p = z.sigmoid() if task.multi_label else z.softmax(0)
        entropy = -(t * p.log() + (1 - t) * (1 - p).log()).mean() if task.multi_label else -(t * p.log()).sum(0).mean()
        p, t = (p, t) if task.multi_label else (p[1:], t[1:])
        expected = entropy + (1 - 2 * (p * t).sum(1) / (p.sum(1) + t.sum(1))).mean()
        assert float(SegmentationLoss(task)(logits, {"label": labels})) == pytest.approx(float(expected), rel=1e-5)

    @pytest.mark.parametrize("task", IGNORING)
    def test_what_the_network_says_there_has_no_effect(self, task):
        logits, labels = segmentation_batch(task)
        deep = torch.stack([logits, logits.flip(1)], dim=1).requires_grad_()
        annotated = torch.tensor([[True, True, True], [True, False, True], [True, True, True]])
        batch = {"label": labels, **({"annotated": annotated} if task.multi_label else {})}
        SegmentationLoss(task)(deep, batch).backward()
        ignored = (labels == 9)[:, None].expand_as(deep)
        assert ignored.any()
        assert (deep.grad[ignored] == 0).all()
        assert (deep.grad[~ignored] != 0).any()

    @pytest.mark.parametrize("task", IGNORING)
    def test_nothing_is_known(self, task):
        logits = torch.randn(2, task.out_channels, 4, 4, 4, requires_grad=True)
        loss = SegmentationLoss(task)(logits, {"label": torch.full((2, 1, 4, 4, 4), 9.0)})
        loss.backward()
        assert float(loss) == 0
        assert (logits.grad == 0).all()
