"""PCRLv2: restoration and comparison of views at several scales (Zhou et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pgl_ext.methods.base import Method, check_two_views, feature_std
from pgl_ext.networks.base import FeatureNetwork
from pgl_ext.networks.heads import MLPHead
from pgl_ext.networks.resnet import initialise_convolutions
from pgl_ext.networks.segmentation import ASPP, PlainDecoder
from pgl_ext.transforms.deformations import rescale_to_unit

__all__ = ["PCRLv2"]

# Projections z and predictions p of views, each (B, V, C).
_Embedding = tuple[torch.Tensor, torch.Tensor]


class PCRLv2(Method):
    """Restores a view at every level of a decoder without skips, and compares views at these levels.

    Each decoder level gives a projection z (global average pool, batch norm), a prediction p (a perceptron with 2 C
    hidden channels on z) and a restoration (1x1x1 convolution, sigmoid, up-sampled to the view). With

    ``S(a, b) = -(cos(p_a, stop_gradient(z_b)) + cos(p_b, stop_gradient(z_a))) / 2``

    at a level that is drawn anew for every call, the loss of views 1 and 2 and the local views l is

    ``MSE(restored_1, target_1) + S(1, 2) + beta MSE(restored_1[k], target_1) + mean_l (S(1, l) + S(2, l)) / 2``

    The first restoration is that of the finest level, k is a level drawn for every sample, and beta falls from 1 to 0
    during training, as (1 + cos(pi progress)) / 2. Weights are shared; nothing follows by momentum.

    Levels are drawn from PyTorch's default generator on the CPU. In evaluation all levels count alike, which is what
    training's loss is on average.

    After "A Unified Visual Information Preservation Framework for Self-supervised Pre-training in Medical Image
    Analysis" (Zhou et al. 2023), on this project's encoder and decoder. Ours: targets are rescaled to [0, 1] by each
    view's own smallest and largest value, since volumes come standardised; the finest level's restoration is the
    network's output; batch norm stores the statistics of global views alone, since a mixture with those of the much
    smaller local ones would fit neither; and k is drawn per sample, not with the level of S(1, 2): the gradient of a
    level that no sample draws is 0, and LARS would take a whole step along the decay of its weights.

    Args:
        encoder: the network whose encoder is pre-trained.
        aspp_channels: channels of the pyramid pooling.
        decoder_channels: channels of the decoder's three levels, coarse to fine.

    Attributes:
        progress: share of the training that is done, in [0, 1]; set by ``handlers.TrainingProgress``.
    """

    logged = ("restoration_loss", "global_loss", "middle_loss", "local_loss", "beta")

    def __init__(
        self, encoder: FeatureNetwork, aspp_channels: int = 256, decoder_channels: Sequence[int] = (256, 128, 32)
    ) -> None:
        super().__init__()
        # The coarsest levels that double the resolution, one for each of the decoder's.
        finer = [i for i, (a, b) in enumerate(pairwise(encoder.level_strides)) if a != b][::-1]
        if len(finer) < len(decoder_channels):
            raise ValueError(
                f"decoder_channels {tuple(decoder_channels)} asks for {len(decoder_channels)} levels, but the network "
                f"has {len(finer)} finer ones than its deepest: give fewer."
            )
        self.finer_levels = finer[: len(decoder_channels)]
        self.encoder = encoder
        encoder.train_encoder_alone()
        self.aspp = ASPP(encoder.level_channels[-1], aspp_channels)
        self.decoder = PlainDecoder(aspp_channels, decoder_channels)
        self.projections = nn.ModuleList(nn.BatchNorm1d(c) for c in decoder_channels)
        self.predictors = nn.ModuleList(MLPHead(c, 2 * c, c) for c in decoder_channels)
        self.restorations = nn.ModuleList(nn.Conv3d(c, encoder.arguments["in_channels"], 1) for c in decoder_channels)
        self.register_buffer("progress", torch.zeros(()))
        self.feature_channels = decoder_channels[-1]
        for module in (self.aspp, self.decoder, self.restorations):
            initialise_convolutions(module)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Compute the loss, in [-2, 4].

        Args:
            batch: ``views`` (B, 2, C, X, Y, Z), ``local_views`` (B, L, C, x, y, z) and optionally ``targets``, the
                views before their intensities were changed; without them the views themselves are restored.

        Returns:
            ``loss``, its terms ``restoration_loss``, ``global_loss``, ``middle_loss`` and ``local_loss``, the weight
            ``beta``, and ``feature_std``: of the global views' projections at the finest level (healthy is about 1 /
            sqrt(decoder_channels[-1])). Batch norm is their last step, so that only a complete collapse would show. In
            evaluation ``local_loss`` is larger: local views pass through the statistics of global ones.

        Raises:
            ValueError: where there are not two views, or no local ones.
        """
        views, local_views = batch["views"], batch.get("local_views")
        check_two_views(self, views)
        if local_views is None or local_views.ndim != 6:
            raise ValueError(
                "PCRLv2 needs local_views (B, L, C, x, y, z) in a batch, got "
                f"{None if local_views is None else tuple(local_views.shape)}: cut views with "
                "pgl_ext.transforms.RandGlobalLocalViewsd."
            )
        maps, embedded = self._encode(views)
        with _running_statistics_kept(self):
            _, local = self._encode(local_views)
        target, *_ = rescale_to_unit(batch.get("targets", views)[:, 0].float())
        errors = []
        for head, level in zip(self.restorations, maps, strict=True):
            restored = F.interpolate(head(level[::2]).float().sigmoid(), size=views.shape[3:], mode="trilinear")
            errors.append((restored - target).square().flatten(1).mean(dim=1))
        errors = torch.stack(errors, dim=1)
        with torch.autocast(views.device.type, enabled=False):
            pair = torch.stack([_similarities(level, level)[0, 1] for level in embedded])
            with_local = torch.stack([_similarities(*levels) for levels in zip(embedded, local, strict=True)], dim=-1)
            # One call for the pair, one for each global view with each local one.
            weights = self._level_weights(1 + with_local[..., 0].numel()).to(pair)
            beta = (1 + torch.cos(math.pi * self.progress)) / 2
            terms = {
                "restoration_loss": errors[:, -1].mean(),
                "global_loss": weights[0] @ pair,
                "middle_loss": (self._level_weights(len(errors)).to(errors) * errors).sum(dim=1).mean(),
                "local_loss": (weights[1:] * with_local.flatten(0, 1)).sum(dim=1).mean(),
            }
            loss = terms["restoration_loss"] + terms["global_loss"] + beta * terms["middle_loss"] + terms["local_loss"]
        logged = {name: term.detach() for name, term in terms.items()}
        finest, _ = embedded[-1]
        return {"loss": loss, **logged, "beta": beta, "feature_std": feature_std(finest.flatten(0, 1))}

    def decoder_state(self) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.state_dict().items() if key.startswith(("aspp.", "decoder."))}

    def _encode(self, views: torch.Tensor) -> tuple[list[torch.Tensor], list[_Embedding]]:
        """Maps (B V, channels, ...) and embeddings of views (B, V, C, X, Y, Z), level by level, coarse to fine."""
        features = self.encoder.features(views.flatten(0, 1))
        maps = self.decoder(self.aspp(features[-1]), [features[level].shape[2:] for level in self.finer_levels])
        embedded = []
        # Half precision would not tell nearly parallel vectors apart; the heads are tiny.
        with torch.autocast(views.device.type, enabled=False):
            for level, projection, predictor in zip(maps, self.projections, self.predictors, strict=True):
                projected = projection(level.mean(dim=(2, 3, 4), dtype=torch.float32))
                embedded.append(tuple(x.unflatten(0, views.shape[:2]) for x in (projected, predictor(projected))))
        return maps, embedded

    def _level_weights(self, calls: int) -> torch.Tensor:
        """Weight of each level in each call of S, or each sample, (calls, levels).

        Weights and not indices: DistributedDataParallel wants a gradient of every parameter in every step.
        """
        levels = len(self.projections)
        if not self.training:
            return torch.full((calls, levels), 1 / levels)
        return F.one_hot(torch.randint(levels, (calls,)), levels)


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keep batch norm from storing the statistics that it uses in training."""
    momenta = {norm: norm.momentum for norm in module.modules() if isinstance(norm, _BatchNorm)}
    for norm in momenta:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def _similarities(first: _Embedding, second: _Embedding) -> torch.Tensor:
    """S of each view of the first with each of the second, mean over the batch: (V, W) in [-1, 1]."""
    (z_a, p_a), (z_b, p_b) = ([F.normalize(x, dim=-1, eps=1e-6) for x in views] for views in (first, second))
    cosines = torch.einsum("bvc,bwc->bvw", p_a, z_b.detach()) + torch.einsum("bvc,bwc->bvw", z_a.detach(), p_b)
    return -cosines.mean(dim=0) / 2
