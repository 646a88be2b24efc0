"""Volumes whose views can be checked by hand."""

from __future__ import annotations

import numpy as np
import torch

VOLUME = (60, 52, 30)


def coordinate_ramp(size: tuple = VOLUME) -> torch.Tensor:
    """A volume whose three channels are the voxel's own coordinates."""
    return torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij"))


def extents(affines: torch.Tensor, view_size: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edges (V, 3) in voxels of the volume, from the affines by hand."""
    affines = affines.double().numpy()
    corners = [affines @ [*corner, 1] for corner in ([-0.5] * 3, np.array(view_size) - 0.5)]
    return np.min(corners, 0)[:, :3], np.max(corners, 0)[:, :3]


class FakeVolume:
    """Large and without memory: every crop is zeros."""

    def __init__(self, size: tuple) -> None:
        self.shape = (1, *size)

    def __getitem__(self, key: tuple) -> np.ndarray:
        return np.zeros([1, *(s.stop - s.start for s in key[1:])], dtype=np.float16)
