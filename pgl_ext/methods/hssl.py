"""HSSL-style: hierarchical contrast and classification on data of several sources (after Zheng et al. 2021)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from pgl_ext.aligner import PriorGuidedAligner
from pgl_ext.losses import NTXentLoss, VoxelContrastLoss
from pgl_ext.methods.base import Method, check_two_views, feature_std
from pgl_ext.networks.heads import MLPHead
from pgl_ext.networks.resnet import ResNetEncoder
from pgl_ext.networks.segmentation import SegmentationNet

__all__ = ["HSSL"]

logger = logging.getLogger(__name__)


class HSSL(Method, SegmentationNet):
    """Contrast of views and of voxels, and classification of where a scan comes from: an encoder and a decoder.

    HSSL-style: of "Hierarchical Self-Supervised Learning for Medical Image Segmentation Based on Multi-Domain Data
    Aggregation" (Zheng et al. 2021) only the abstract is public, which names an encoder-decoder, scans of several
    challenges, and a contrastive and a classification loss. All beyond that is a choice made here:

    ``loss = image_loss + task_weight * task_loss + group_weight * group_loss + voxel_loss``

    - ``image_loss``: NT-Xent of the views' projections (encoder, global average pool, projector) in a micro-batch;
    - ``task_loss``, ``group_loss``: cross-entropy of a linear classifier on the pooled features, over the source data
      sets, and over the groups that these are merged into ("abdomen CT", "head-and-neck CT");
    - ``voxel_loss``: NT-Xent of the cells of the decoder's output, in which both views are aligned through the known
      crop, scale and flip.

    The decoder's output has as many channels as its finest level.

    Args:
        encoder: of the paper's family; voxels are contrasted in the map before the last convolution and resize.
        tasks: number of source data sets.
        groups: number of groups of them.
        hidden_channels: channels inside the projector.
        out_channels: channels of the image-level features that are contrasted.
        aspp_channels: channels of the pyramid pooling.
        decoder_channels: channels of the decoder's three levels, coarse to fine.
        task_weight: lambda_task.
        group_weight: lambda_group.
        temperature: of both contrasts.
        alignment: ``"exact"``, ``"inside"`` or ``"paper"``, see ``PriorGuidedAligner``.
        output_size: cells per axis of the grid that voxels are contrasted on; default: the size of the deepest map.
    """

    logged = ("image_loss", "task_loss", "group_loss", "voxel_loss")

    def __init__(
        self,
        encoder: ResNetEncoder,
        tasks: int,
        groups: int,
        hidden_channels: int = 4096,
        out_channels: int = 256,
        aspp_channels: int = 256,
        decoder_channels: Sequence[int] = (256, 128, 32),
        task_weight: float = 1.0,
        group_weight: float = 1.0,
        temperature: float = 0.1,
        alignment: str = "exact",
        output_size: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(encoder, ResNetEncoder):
            raise ValueError(
                f"HSSL-style pre-training needs the paper's network, got {type(encoder).__name__}: leave the overlay "
                "networks/*.yaml out, or choose another method."
            )
        super().__init__(
            encoder.conv1.in_channels,
            decoder_channels[-1],
            encoder,
            aspp_channels=aspp_channels,
            decoder_channels=decoder_channels,
        )
        self.projector = MLPHead(encoder.level_channels[-1], hidden_channels, out_channels)
        self.task_classifier = nn.Linear(encoder.level_channels[-1], tasks)
        self.group_classifier = nn.Linear(encoder.level_channels[-1], groups)
        self.weights = dict(zip(self.logged, (1.0, task_weight, group_weight, 1.0), strict=True))
        self.image_contrast = NTXentLoss(temperature)
        self.voxel_contrast = VoxelContrastLoss(temperature)
        self.alignment = alignment
        self.output_size = output_size
        self.feature_channels = out_channels
        for name, classes in (("task", tasks), ("group", groups)):
            if classes < 2:
                logger.warning(
                    "HSSL tells scans apart by their %s, but all are of one: %s_loss stays 0. It is meant for several "
                    "data sets.",
                    name,
                    name,
                )

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            batch: ``views`` (B, 2, C, X, Y, Z), ``affines`` (B, 2, 4, 4), ``task`` and ``group`` (B,) int64.

        Returns:
            ``loss``, its parts in ``logged``, and ``feature_std`` of the projections.

        Raises:
            ValueError: where there are not two views, or a single pair in training, whose views have no others to be
                told from.
        """
        views = batch["views"]
        check_two_views(self, views)
        if self.training and len(views) == 1:
            raise ValueError(
                "HSSL contrasts pairs of views with each other, but a micro-batch has a single pair: choose "
                "--batch_size and --micro_batch_size such that every micro-batch of every process has at least 2."
            )
        stem, stage1, stage2, _, deepest = self.encoder.features(views.flatten(0, 1))
        pooled = deepest.mean(dim=(2, 3, 4))
        projected = self.projector(pooled)
        voxels = self.decoder(self.aspp(deepest), [stage2, stage1, stem]).unflatten(0, (-1, 2))
        aligner = PriorGuidedAligner(self.output_size or deepest.shape[2:], self.alignment)
        parts = {
            "image_loss": self.image_contrast(projected[0::2], projected[1::2]),
            "task_loss": _classification_loss(self.task_classifier(pooled), batch["task"]),
            "group_loss": _classification_loss(self.group_classifier(pooled), batch["group"]),
            "voxel_loss": self.voxel_contrast(*aligner(voxels, batch["affines"], views.shape[3:]).unbind(1)),
        }
        loss = sum(self.weights[name] * part for name, part in parts.items())
        logged = {name: part.detach() for name, part in parts.items()}
        return {"loss": loss, **logged, "feature_std": feature_std(projected)}

    def decoder_state(self) -> dict[str, torch.Tensor]:
        return SegmentationNet.decoder_state(self)


def _classification_loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of both views' logits (2 B, number of classes) with the class of each pair (B,)."""
    return F.cross_entropy(logits.float(), classes.repeat_interleave(2))
