"""Learning rates of fine-tuning."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["fine_tuning_schedule"]


def fine_tuning_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, frozen_steps: int = 0, power: float = 0.9
) -> LambdaLR:
    """Polynomial decay of the learning rate, (1 - k / K)^power, with a frozen encoder for the first steps.

    Args:
        optimizer: its first parameter group is the encoder.
        total_steps: K, in optimiser steps.
        frozen_steps: steps for which the encoder's learning rate is 0. Its batch-norm statistics follow the new data
            from the start.
        power: of the decay; 0 keeps the rate.
    """

    def decay(step: int) -> float:
        return max(0.0, 1 - step / total_steps) ** power

    def encoder_decay(step: int) -> float:
        return 0.0 if step < frozen_steps else decay(step)

    return LambdaLR(optimizer, [encoder_decay] + [decay] * (len(optimizer.param_groups) - 1))
