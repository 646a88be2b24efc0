"""What every random transform promises: the seed decides, the input stays, probability 0 does nothing."""

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from monai.transforms import Compose, Randomizable

from pgl_ext.transforms import (
    BatchIntensityd,
    RandBatchBlur,
    RandBatchBrightness,
    RandBatchGamma,
    RandBatchNoise,
    RandBatchPatchSwap,
    RandBezierIntensity,
    RandBlockMaskd,
    RandDeformedCopyd,
    RandGlobalLocalViewsd,
    RandLocalShuffle,
    RandOrganPatchd,
    RandOverlappingViewsd,
    RandPaint,
)

SIZE = (32, 24, 16)


class Case(NamedTuple):
    """A transform that always does something, and what it is given."""

    make: Callable
    data: object
    probability: str | None = None  # argument that makes it do nothing where it is 0

    def __str__(self) -> str:
        return type(self.make()).__name__


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


POINTS = [np.array([[3, 4, 5], [20, 10, 8]]), np.array([[30, 20, 10]])]
VOLUME = {"image": _random(1, 50, 40, 30), "name": "a"}
CASE = {"image": torch.cat([_random(1, 50, 40, 30), torch.ones(1, 50, 40, 30)]), "organ_points": POINTS, "name": "a"}
CASES = [
    Case(lambda **settings: RandOverlappingViewsd("image", (16, 16, 8), **settings), VOLUME),
    Case(lambda **settings: RandGlobalLocalViewsd("image", (16, 16, 8), **settings), VOLUME),
    Case(lambda **settings: RandOrganPatchd("image", (16, 16, 8), **settings), CASE),
    *(
        Case(lambda kind=kind, **settings: kind(**{"prob": 1.0, **settings}), _random(4, 1, *SIZE), "prob")
        for kind in (RandBatchNoise, RandBatchBlur, RandBatchBrightness, RandBatchGamma, RandBatchPatchSwap)
    ),
    *(
        Case(lambda kind=kind, **settings: kind(**{"prob": 1.0, **settings}), _random(2, *SIZE), "prob")
        for kind in (RandLocalShuffle, RandBezierIntensity, RandPaint)
    ),
    Case(lambda: RandBlockMaskd("views"), {"views": _random(2, 1, *SIZE)}),
    Case(
        lambda: BatchIntensityd("views", [RandBatchNoise(1.0), RandBatchGamma(1.0)]), {"views": _random(2, 2, 1, *SIZE)}
    ),
    Case(
        lambda: RandDeformedCopyd("views", [RandBezierIntensity(1.0), RandPaint(1.0)]), {"views": _random(2, 1, *SIZE)}
    ),
]

every_transform = pytest.mark.parametrize("case", CASES, ids=str)
with_a_probability = pytest.mark.parametrize("case", [case for case in CASES if case.probability], ids=str)


def apply(case: Case, transform: Randomizable, seed: int | None = None) -> list[torch.Tensor]:
    """The tensors that a transform makes of a copy of its data."""
    if seed is not None:
        transform.set_random_state(seed)
    result = transform(deepcopy(case.data))
    return [value for value in result.values() if torch.is_tensor(value)] if isinstance(result, dict) else [result]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_transform
def test_the_seed_decides(case):
    first, again, other = (apply(case, case.make(), seed) for seed in (3, 3, 4))
    assert equal(first, again)
    assert not equal(first, other)


@every_transform
def test_the_state_goes_on(case):
    transform = case.make()
    first, second = apply(case, transform, seed=3), apply(case, transform)
    assert not equal(first, second)
    assert equal(apply(case, transform, seed=3), first)
    assert equal(apply(case, transform), second)


@every_transform
def test_is_a_monai_random_transform(case):
    transform = case.make()
    assert isinstance(transform, Randomizable)
    assert transform.set_random_state(0) is transform
    pipeline = Compose([transform], map_items=False)
    assert equal(apply(case, pipeline, seed=5), apply(case, pipeline, seed=5))


@every_transform
def test_the_input_and_other_entries_stay(case):
    data = deepcopy(case.data)
    result = case.make().set_random_state(0)(data)
    if isinstance(data, dict):
        assert data.keys() == case.data.keys()
        assert all(torch.equal(data[key], case.data[key]) for key in data if torch.is_tensor(data[key]))
        assert result.get("name") == data.get("name")
    else:
        assert torch.equal(data, case.data)


@with_a_probability
def test_nothing_happens_where_the_probability_is_zero(case):
    transform = case.make(**{case.probability: 0.0})
    for seed in range(5):
        assert equal(apply(case, transform, seed), [case.data])


@with_a_probability
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_probability_that_is_none(case, value):
    with pytest.raises(ValueError, match=rf"{case.probability} must lie in \[0, 1\], got {value}"):
        case.make(**{case.probability: value})
