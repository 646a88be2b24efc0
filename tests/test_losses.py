import numpy as np
import pytest
import torch

from pgl_ext.losses import LocalConsistencyLoss

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
