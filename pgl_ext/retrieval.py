"""Correspondence retrieval: a label-free measure of how well features tell places apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pgl_ext.aligner import PriorGuidedAligner

__all__ = ["correspondence_retrieval"]


def correspondence_retrieval(
    features: torch.Tensor, affines: torch.Tensor, view_size: Sequence[int], aligner: PriorGuidedAligner | None = None
) -> torch.Tensor:
    """For each aligned cell of view 1, is its nearest neighbour among view 2's aligned cells the true one?

    Nearest by cosine similarity, among the cells of the same pair. Chance is 1 / (number of cells).

    Args:
        features: encoder features of two views, (B, 2, C, x, y, z).
        affines: (B, 2, 4, 4), view voxel index to source voxel index.
        view_size: (X, Y, Z) in voxels.
        aligner: default: exact alignment on the feature map's own grid.

    Returns:
        top-1 accuracy per pair, (B,).
    """
    aligner = aligner or PriorGuidedAligner()
    cells = F.normalize(aligner(features.float(), affines, view_size).flatten(3), dim=2, eps=1e-6)
    similarity = torch.einsum("bci,bcj->bij", cells[:, 0], cells[:, 1])
    truth = torch.arange(similarity.shape[1], device=similarity.device)
    return (similarity.argmax(dim=2) == truth).float().mean(dim=1)
