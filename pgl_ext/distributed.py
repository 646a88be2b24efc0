"""The processes of a distributed run."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["rank_and_world_size"]


def rank_and_world_size() -> tuple[int, int]:
    """This process' number among the processes of a distributed run and how many there are; (0, 1) otherwise."""
    distributed = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
