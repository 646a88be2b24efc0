"""PGL's aligned local consistency together with masked restoration."""

from __future__ import annotations

from typing import Any

import torch

from pgl_ext.losses import MaskedRestorationLoss, NTXentLoss
from pgl_ext.methods.base import check_two_views, feature_std, hide
from pgl_ext.methods.pgl import PGL
from pgl_ext.networks.base import SegmentationNetwork

__all__ = ["PGLMAE"]


class PGLMAE(PGL):
    """Two masked views are restored, and their features agree where both show the same place.

    ``loss = restoration_weight * restoration + consistency_weight * consistency + contrast_weight * contrast``

    - ``restoration``: mean squared error of the hidden voxels, as in :class:`~pgl_ext.methods.MAE`;
    - ``consistency``: PGL's loss, in [0, 8]; the online network sees the masked views, the target network whole ones;
    - ``contrast``: NT-Xent of the views' pooled features, if it has a weight.

    The combination is that of Consistent View Alignment (2025), on PGL's exact alignment, whose views may also be
    flipped against each other.

    Args:
        network: the segmentation network, with as many channels of output as of input.
        restoration_weight: see above.
        consistency_weight: see above.
        contrast_weight: see above.
        temperature: of the contrast.
        kwargs: further arguments of :class:`~pgl_ext.methods.PGL`.
    """

    pretrains_decoder = True

    def __init__(
        self,
        network: SegmentationNetwork,
        restoration_weight: float = 5.0,
        consistency_weight: float = 1.0,
        contrast_weight: float = 0.0,
        temperature: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        network.requires_grad_(True)
        self.weights = {"restoration_loss": restoration_weight, "consistency_loss": consistency_weight}
        if contrast_weight:
            self.weights["contrast_loss"] = contrast_weight
        self.logged = tuple(self.weights)
        self.restoration = MaskedRestorationLoss()
        self.contrast = NTXentLoss(temperature)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            batch: ``views`` (B, 2, C, X, Y, Z), ``affines`` (B, 2, 4, 4) and ``mask`` (B, 2, 1, X, Y, Z).

        Returns:
            ``loss``, its parts in ``logged``, and ``feature_std`` of the online projections.

        Raises:
            ValueError: where there are not two views, or no mask.
        """
        check_two_views(self, batch["views"])
        views, masked, hidden = hide(self, batch)
        features, restored = self.encoder.features_and_logits(masked)
        consistency, projected = self.consistency(features[-1], batch)
        parts = {"restoration_loss": self.restoration(restored, views, hidden), "consistency_loss": consistency}
        if "contrast_loss" in self.weights:
            pooled = features[-1].mean(dim=(2, 3, 4))
            parts["contrast_loss"] = self.contrast(pooled[0::2], pooled[1::2])
        loss = sum(self.weights[name] * part for name, part in parts.items())
        logged = {name: part.detach() for name, part in parts.items()}
        return {"loss": loss, **logged, "feature_std": feature_std(projected)}
