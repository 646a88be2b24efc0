import math

import numpy as np
import pytest
import torch
from method_checks import nt_xent

from pgl_ext.losses import LocalConsistencyLoss, NTXentLoss, VoxelContrastLoss

SHAPES = [(2, 8, 6, 6, 2), (1, 3, 1, 1, 1), (4, 16), (2, 5, 7)]
loss = LocalConsistencyLoss()


def pair(shape: tuple, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator).to(dtype).unbind(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_mean_of_two_minus_two_cosines(shape):
    prediction, target = pair(shape)
    p, t = (np.moveaxis(x.numpy().astype(np.float64), 1, -1).reshape(-1, shape[1]) for x in (prediction, target))
    cosine = (p * t).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(t, axis=-1)
    assert float(loss(prediction, target)) == pytest.approx((2 - 2 * cosine).mean(), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_range_and_symmetry(seed):
    prediction, target = pair((2, 4, 3, 3, 2), seed)
    value = loss(prediction, target)
    assert value.ndim == 0
    assert 0 <= value <= 4
    torch.testing.assert_close(loss(target, prediction), value)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (7.5, 0.0), (-1.0, 4.0), (-0.01, 4.0)])
def test_same_and_opposite_directions(factor, expected):
    prediction, _ = pair((2, 8, 3, 3, 2))
    assert float(loss(prediction, factor * prediction)) == pytest.approx(expected, abs=1e-5)


def test_orthogonal_is_two():
    assert float(loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))) == pytest.approx(2)


def test_invariant_to_positive_scaling_of_each_feature():
    prediction, target = pair((2, 8, 3, 3, 2))
    scale = torch.rand(2, 1, 3, 3, 2) + 0.1
    torch.testing.assert_close(loss(prediction * scale, target * 5), loss(prediction, target))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-12, 1e6])
def test_constant_features_are_finite(value):
    prediction = torch.full((2, 4, 3, 3, 2), value, requires_grad=True)
    result = loss(prediction, torch.zeros_like(prediction))
    result.backward()
    assert torch.isfinite(result)
    assert torch.isfinite(prediction.grad).all()


def test_no_gradient_to_target():
    prediction, target = (x.clone().requires_grad_() for x in pair((2, 8, 3, 3, 2)))
    loss(prediction, target).backward()
    assert target.grad is None
    assert prediction.grad.abs().sum() > 0


def test_gradient_is_orthogonal_to_the_features():
    prediction, target = pair((2, 8, 3, 3, 2))
    prediction = prediction.clone().requires_grad_()
    loss(prediction, target).backward()
    torch.testing.assert_close((prediction.grad * prediction).sum(1), torch.zeros(2, 3, 3, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    prediction, target = pair((2, 256, 3, 3, 2), dtype=dtype)
    # The squares of 256 such channels overflow float16.
    result = loss(prediction * 100, target * 100)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, loss((prediction * 100).float(), (target * 100).float()))


def test_autocast_does_not_change_it():
    prediction, target = pair((2, 64, 3, 3, 2))
    with torch.autocast("cpu", torch.bfloat16):
        result = loss(prediction, target)
    torch.testing.assert_close(result, loss(prediction, target))


def test_shape_mismatch():
    with pytest.raises(ValueError, match=r"\(2, 8, 6, 6, 2\) and \(2, 8, 6, 6, 1\)"):
        loss(torch.zeros(2, 8, 6, 6, 2), torch.zeros(2, 8, 6, 6, 1))


class TestNTXentLoss:
    @pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
    @pytest.mark.parametrize("shape", [(2, 3), (5, 16), (64, 8)])
    def test_is_the_formula(self, shape, temperature):
        first, second = pair(shape)
        value = NTXentLoss(temperature)(first, second)
        assert value.ndim == 0
        assert float(value) == pytest.approx(nt_xent(first, second, temperature), rel=1e-5)

    @pytest.mark.parametrize("temperature", [0.1, 1.0])
    @pytest.mark.parametrize("count", [2, 7])
    def test_identical_partners_among_orthogonal_others(self, count, temperature):
        features = torch.eye(count, 9)
        expected = math.log(1 + (2 * count - 2) * math.exp(-1 / temperature))
        assert float(NTXentLoss(temperature)(features, 3 * features)) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("count", [2, 7])
    def test_features_that_are_all_the_same_are_a_guess(self, count):
        features = torch.ones(count, 9)
        assert float(NTXentLoss()(features, features)) == pytest.approx(math.log(2 * count - 1), rel=1e-5)

    @pytest.mark.parametrize("seed", range(4))
    def test_range(self, seed):
        first, second = pair((6, 2), seed)
        for other in (second, first, -first):
            assert 0 <= float(NTXentLoss(0.2)(first, other)) <= math.log(1 + 10 * math.exp(2 / 0.2))

    def test_a_single_pair_has_no_others(self):
        first, second = (x.clone().requires_grad_() for x in pair((1, 8)))
        value = NTXentLoss()(first, second)
        value.backward()
        assert value == 0
        assert (first.grad == 0).all()

    def test_symmetric_in_the_views_and_in_the_order_of_samples(self):
        first, second = pair((6, 8))
        value, order = NTXentLoss()(first, second), torch.tensor([3, 1, 5, 0, 2, 4])
        torch.testing.assert_close(NTXentLoss()(second, first), value)
        torch.testing.assert_close(NTXentLoss()(first[order], second[order]), value)
        assert abs(float(NTXentLoss()(first, second[order]) - value)) > 0.1

    def test_invariant_to_positive_scaling_of_each_feature(self):
        first, second = pair((6, 8))
        torch.testing.assert_close(
            NTXentLoss()(first * (torch.rand(6, 1) + 0.1), 5 * second), NTXentLoss()(first, second)
        )

    def test_gradient_reaches_both_views(self):
        first, second = (x.clone().requires_grad_() for x in pair((4, 8)))
        NTXentLoss()(first, second).backward()
        assert (first.grad.abs().sum(1) > 0).all()
        assert (second.grad.abs().sum(1) > 0).all()

    @pytest.mark.parametrize("value", [0.0, 1.0, 1e6])
    def test_constant_features_are_finite(self, value):
        first = torch.full((3, 4), value, requires_grad=True)
        result = NTXentLoss()(first, torch.zeros(3, 4))
        result.backward()
        assert torch.isfinite(result)
        assert torch.isfinite(first.grad).all()

    def test_half_precision_is_computed_in_float32(self):
        first, second = (100 * x for x in pair((8, 256), dtype=torch.float16))
        with torch.autocast("cpu", torch.bfloat16):
            result = NTXentLoss()(first, second)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, NTXentLoss()(first.float(), second.float()))

    @pytest.mark.parametrize("temperature", [0, -0.1])
    def test_temperature_must_be_positive(self, temperature):
        with pytest.raises(ValueError, match=f"must be positive, got {temperature}"):
            NTXentLoss(temperature)

    def test_shape_mismatch(self):
        with pytest.raises(ValueError, match=r"\(4, 8\) and \(3, 8\)"):
            NTXentLoss()(torch.zeros(4, 8), torch.zeros(3, 8))


class TestVoxelContrastLoss:
    def test_every_cell_of_the_batch_is_a_sample(self):
        first, second = pair((2, 5, 3, 2, 2))
        cells = [torch.stack([x[b, :, i, j, k] for b in range(2) for i in range(3) for j in range(2) for k in range(2)])
                 for x in (first, second)]  # fmt: skip
        assert cells[0].shape == (24, 5)
        assert float(VoxelContrastLoss(0.1)(first, second)) == pytest.approx(nt_xent(*cells, 0.1), rel=1e-5)

    def test_the_positive_is_the_same_cell_of_the_same_sample(self):
        features = torch.eye(12).view(2, 6, 12).movedim(2, 1).reshape(2, 12, 3, 2, 1)
        aligned = float(VoxelContrastLoss()(features, features))
        assert aligned == pytest.approx(math.log(1 + 22 * math.exp(-10)), rel=1e-4)
        for other in (features.flip(2), features.flip(3), features.flip(0)):
            assert float(VoxelContrastLoss()(features, other)) > 5

    def test_shape_mismatch_of_as_many_cells(self):
        with pytest.raises(ValueError, match=r"\(2, 8, 4, 3, 2\) and \(2, 8, 3, 4, 2\)"):
            VoxelContrastLoss()(torch.zeros(2, 8, 4, 3, 2), torch.zeros(2, 8, 3, 4, 2))
