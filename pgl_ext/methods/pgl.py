"""PGL: prior-guided local self-supervised learning (Xie et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pgl_ext.aligner import PriorGuidedAligner
from pgl_ext.methods.online_target import OnlineTargetMethod
from pgl_ext.networks.base import FeatureNetwork
from pgl_ext.networks.heads import ConvHead

__all__ = ["PGL"]


class PGL(OnlineTargetMethod):
    """Local consistency of two views, aligned through the known crop, scale and flip.

    The online path (encoder, projector, aligner, predictor) predicts the target path's aligned features of the other
    view, cell by cell (equation 9); the loss lies in [0, 8].

    The paper's ablations (section 5.3) are settings of the views (see ``transforms.RandOverlappingViewsd``): w/o F is
    ``flip_prob=0``, w/o CS is ``scale_range=(1, 1)`` with ``min_overlap=1``, w/o F&CS is both. Without CS there is no
    CSAlign either: with ``alignment="paper"`` and ``sampling_ratio=1`` the aligner then is ``torch.flip`` alone.

    Args:
        encoder: the network whose encoder is pre-trained.
        hidden_channels: channels inside projector and predictor.
        out_channels: channels of the features that are compared.
        alignment: ``"exact"``, ``"inside"`` or ``"paper"``, see ``PriorGuidedAligner``.
        output_size: cells of the aligned grid; default: the feature map's own size.
        sampling_ratio: sample points per cell and axis.
    """

    def __init__(
        self,
        encoder: FeatureNetwork,
        hidden_channels: int = 4096,
        out_channels: int = 256,
        alignment: str = "exact",
        output_size: Sequence[int] | None = None,
        sampling_ratio: int = 2,
    ) -> None:
        projector = ConvHead(encoder.level_channels[-1], hidden_channels, out_channels)
        predictor = ConvHead(out_channels, hidden_channels, out_channels)
        super().__init__(encoder, projector, predictor, out_channels)
        self.aligner = PriorGuidedAligner(output_size, alignment, sampling_ratio, encoder.centres[-1])

    def match(self, projected: torch.Tensor, batch: dict) -> torch.Tensor:
        """Align the views' features (2 B, C, x, y, z) through ``affines`` (B, 2, 4, 4)."""
        affines, view_size = batch["affines"], tuple(batch["views"].shape[3:])
        return self.aligner(projected.unflatten(0, affines.shape[:2]), affines, view_size).flatten(0, 1)
