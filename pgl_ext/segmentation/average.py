"""A running average of the weights, which is validated and kept instead of the last ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ignite.engine import Engine
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pgl_ext.engines import TrainerEvents

__all__ = ["WeightAverage"]


class WeightAverage:
    """Exponential moving average of a network's weights and buffers over optimiser steps.

    After step n: ``average <- d average + (1 - d) weights`` with ``d = min(decay, (1 + n) / (10 + n))``, so that the
    weights of the beginning are soon forgotten.

    Args:
        network: what is trained, not its distributed wrapper.
        decay: d in the long run, in [0, 1); 0.99 averages over about a hundred steps. None: no average.

    Raises:
        ValueError: the decay is out of range.
    """

    def __init__(self, network: nn.Module, decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f'average_decay must be in [0, 1), got {decay}: set --average_decay "\\$None" for none.')
        self._network = network
        self._average = None
        if decay is not None:
            self._average = AveragedModel(
                network,
                avg_fn=lambda average, weights, n: (
                    torch.lerp(weights, average, min(decay, (1 + int(n)) / (10 + int(n))))
                    if average.is_floating_point()
                    else weights
                ),
                use_buffers=True,
            )

    @property
    def network(self) -> nn.Module:
        """The network with averaged weights; without a decay the network itself."""
        return self._network if self._average is None else self._average.module

    def attach(self, engine: Engine) -> None:
        if self._average is not None:
            engine.add_event_handler(TrainerEvents.OPTIMIZER_STEP_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        self._average.update_parameters(self._network)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {} if self._average is None else self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        if self._average is not None:
            self._average.load_state_dict(state)
