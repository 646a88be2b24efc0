"""PGL: prior-guided local self-supervised learning (Xie et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from pgl_ext.aligner import PriorGuidedAligner
from pgl_ext.losses import LocalConsistencyLoss
from pgl_ext.methods.base import Method, feature_std
from pgl_ext.networks.heads import ConvHead

__all__ = ["PGL"]


class PGL(Method):
    """Local consistency of two views, aligned through the known crop, scale and flip.

    The online path (encoder, projector, aligner, predictor) predicts the target path's aligned features of the other
    view, cell by cell; the target path follows by an exponential moving average (``handlers.TargetEMA``) and gets no
    gradient. Its batch-norm statistics come from its own forward passes.

    The paper's ablations are settings of the views, and the aligner follows by itself: w/o F is ``flip_prob=0``, w/o CS
    is ``scale_range=(1, 1)`` with ``min_overlap=1`` (see ``transforms.RandOverlappingViewsd``), w/o F&CS is both.

    Args:
        encoder: returns a feature pyramid, finest first, and has ``channels``.
        hidden_channels: channels inside projector and predictor.
        out_channels: channels of the features that are compared.
        alignment: ``"exact"`` or ``"paper"``, see ``PriorGuidedAligner``.
        output_size: cells of the aligned grid; default: the feature map's own size.
        sampling_ratio: sample points per cell and axis.
    """

    def __init__(
        self,
        encoder: nn.Module,
        hidden_channels: int = 4096,
        out_channels: int = 256,
        alignment: str = "exact",
        output_size: Sequence[int] | None = None,
        sampling_ratio: int = 2,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = ConvHead(encoder.channels[-1], hidden_channels, out_channels)
        self.predictor = ConvHead(out_channels, hidden_channels, out_channels)
        self.target_encoder = deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = deepcopy(self.projector).requires_grad_(False)
        self.aligner = PriorGuidedAligner(output_size, alignment, sampling_ratio)
        self.loss = LocalConsistencyLoss()
        self.feature_channels = out_channels

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Compute the symmetric loss (equation 9), in [0, 8].

        Args:
            batch: ``views`` (B, 2, C, X, Y, Z) and ``affines`` (B, 2, 4, 4).

        Returns:
            ``loss`` and ``feature_std`` (of the online projections; healthy is about 1 / sqrt(out_channels)).
        """
        views, affines = batch["views"], batch["affines"]
        if views.ndim != 6 or views.shape[1] != 2:
            raise ValueError(f"PGL compares two views: expected views (B, 2, C, X, Y, Z), got {tuple(views.shape)}.")
        view_size = tuple(views.shape[3:])
        flat = views.flatten(0, 1)
        projected = self.projector(self.encoder(flat)[-1])
        prediction = self.predictor(self._align(projected, affines, view_size)).unflatten(0, views.shape[:2])
        with torch.no_grad():
            target = self.target_projector(self.target_encoder(flat)[-1])
            target = self._align(target, affines, view_size).unflatten(0, views.shape[:2])
        loss = self.loss(prediction[:, 0], target[:, 1]) + self.loss(prediction[:, 1], target[:, 0])
        return {"loss": loss, "feature_std": feature_std(projected)}

    def _align(self, features: torch.Tensor, affines: torch.Tensor, view_size: Sequence[int]) -> torch.Tensor:
        return self.aligner(features.unflatten(0, affines.shape[:2]), affines, view_size).flatten(0, 1)

    def momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.encoder, self.target_encoder
        yield self.projector, self.target_projector
