from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from made_weights import as_trained, small_network
from torch import nn

from pgl_ext.engines import TrainerEvents
from pgl_ext.segmentation.average import WeightAverage
from pgl_ext.weights import load_pretrained


class Walk(nn.Module):
    """A weight that is the number of the step, and a buffer of twice that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("twice", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))


def run(network: Walk, average: WeightAverage, steps: range) -> None:
    def step(engine: Engine, _) -> None:
        with torch.no_grad():
            number = next(numbers)
            network.weight.fill_(number)
            network.twice.fill_(2 * number)
            network.count.fill_(number)
        engine.fire_event(TrainerEvents.OPTIMIZER_STEP_COMPLETED)

    numbers = iter(steps)
    engine = Engine(step)
    engine.register_events(*TrainerEvents)
    average.attach(engine)
    engine.run([0] * len(steps))


def expected(decay: float, steps: range) -> float:
    value = None
    for n, weight in enumerate(steps):
        d = min(decay, (1 + n) / (10 + n))
        value = float(weight) if value is None else d * value + (1 - d) * weight
    return value


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_is_the_exponential_average_of_what_the_weights_were(decay):
    network = Walk()
    average = WeightAverage(network, decay)
    run(network, average, range(1, 30))
    value = expected(decay, range(1, 30))
    assert average.network.weight.tolist() == pytest.approx([value] * 3, rel=1e-5)
    assert average.network.twice.tolist() == pytest.approx([2 * value] * 3, rel=1e-5)
    assert int(average.network.count) == 29
    assert network.weight.tolist() == [29.0] * 3


def test_of_a_network_that_checks_what_is_loaded_goes_on_after_a_resume():
    """As in fine-tuning: a copy of the network checks what it is given too, under the names that it has there."""
    average, other = (WeightAverage(load_pretrained(small_network("dynunet")), 0.9) for _ in range(2))
    as_trained(average.network)
    other.load_state_dict(average.state_dict())
    for key, value in average.network.state_dict().items():
        assert torch.equal(other.network.state_dict()[key], value), key


def test_goes_on_after_a_resume():
    network, other = Walk(), Walk()
    average = WeightAverage(network, 0.9)
    run(network, average, range(1, 10))
    resumed = WeightAverage(other, 0.9)
    resumed.load_state_dict(average.state_dict())
    run(other, resumed, range(10, 20))
    run(network, average, range(10, 20))
    assert torch.equal(resumed.network.weight, average.network.weight)


def test_without_a_decay_it_is_the_network():
    network = Walk()
    average = WeightAverage(network)
    assert average.network is network
    assert average.state_dict() == {}
    average.load_state_dict({})
    run(network, average, range(1, 3))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2])
def test_a_decay_that_cannot_be(decay):
    with pytest.raises(ValueError, match=r"average_decay must be in \[0, 1\)"):
        WeightAverage(Walk(), decay)
