"""Learning rates of fine-tuning."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["fine_tuning_schedule"]


def fine_tuning_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, frozen_steps: int = 0, power: float = 0.9, warmup_steps: int = 0
) -> LambdaLR:
    """Polynomial decay of the learning rate, (1 - k / K)^power, after a linear warm-up.

    With a frozen encoder for the first steps the decoder goes first, and the encoder has a warm-up of its own.

    Args:
        optimizer: its first parameter group is the encoder.
        total_steps: K, in optimiser steps.
        frozen_steps: steps for which the encoder's learning rate is 0. Its batch-norm statistics follow the new data
            from the start.
        power: of the decay; 0 keeps the rate.
        warmup_steps: over which the rate rises from nearly 0 to that of the decay.
    """

    def rate(step: int, start: int = 0) -> float:
        if step < start:
            return 0.0
        warmup = min(1.0, (step - start + 1) / (warmup_steps + 1))
        return warmup * max(0.0, 1 - step / total_steps) ** power

    def encoder_rate(step: int) -> float:
        return rate(step, frozen_steps)

    return LambdaLR(optimizer, [encoder_rate] + [rate] * (len(optimizer.param_groups) - 1))
