"""The 3D ResNet encoder: MONAI's ResNet with a chosen stride, returning its feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets.resnet import ResNet, get_inplanes
from monai.utils import ensure_tuple_rep

from pgl_ext.networks.base import FeatureNetwork

__all__ = ["ResNetEncoder", "initialise_convolutions"]


class ResNetEncoder(FeatureNetwork, ResNet):
    """3D ResNet that returns its feature maps, finest first, with MONAI ResNet's parameter names.

    The default is the PGL paper's 3D ResNet-50 (blocks 3-4-6-3, 46,155,072 parameters). Its state dict loads with
    ``strict=True`` into ``monai.networks.nets.resnet50(spatial_dims=3, n_input_channels=1, feed_forward=False,
    shortcut_type="B", bias_downsample=False)``. Stem stride (2, 2, 1), max-pooling, stage strides 1, 2, 2 and a last
    stage that is dilated by 2 instead of strided give the output stride (16, 16, 8).

    Args:
        layers: residual blocks of the four stages.
        block: ``"bottleneck"`` or ``"basic"``.
        widen_factor: multiplies the channels of every stage.
        in_channels: channels of the input.
        stem_stride: stride of the first convolution, per axis.
        last_stage_stride: 2, or 1 to keep the resolution of stage 3 and dilate stage 4 by 2.

    Attributes:
        stride: output stride of the deepest feature map, per axis, in voxels.
        channels: channels of each level of the pyramid (stem, stage 1, ..., stage 4).

    Example:
        >>> encoder = ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.25)
        >>> [tuple(f.shape[1:]) for f in encoder(torch.rand(1, 1, 32, 32, 16))]
        [(16, 16, 16, 16), (16, 8, 8, 8), (32, 4, 4, 4), (64, 2, 2, 2), (128, 2, 2, 2)]
    """

    family = "resnet"
    # Files of encoders name tensors as the segmentation network does.
    key_prefix = "encoder."

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        block: str = "bottleneck",
        widen_factor: float = 1.0,
        in_channels: int = 1,
        stem_stride: Sequence[int] | int = (2, 2, 1),
        last_stage_stride: int = 1,
    ) -> None:
        if len(layers) != 4:
            raise ValueError(f"layers must give the blocks of four stages, got {tuple(layers)}.")
        if last_stage_stride not in (1, 2):
            raise ValueError(f"last_stage_stride must be 1 or 2, got {last_stage_stride}.")
        stem_stride = ensure_tuple_rep(stem_stride, 3)
        super().__init__(
            block=block,
            layers=list(layers),
            block_inplanes=get_inplanes(),
            spatial_dims=3,
            n_input_channels=in_channels,
            conv1_t_stride=stem_stride,
            widen_factor=widen_factor,
            feed_forward=False,
            shortcut_type="B",
            bias_downsample=False,
        )
        # MONAI's normal initialisation, by outputs, gives the first convolution a quarter of this norm: one learning
        # rate would then turn that layer far faster than all others.
        initialise_convolutions(self)
        # Neither has parameters: the state dict stays MONAI's.
        del self.avgpool
        del self.fc
        if last_stage_stride == 1:
            _dilate(self.layer4)
        self.arguments = {
            "layers": list(layers),
            "block": block,
            "widen_factor": widen_factor,
            "in_channels": in_channels,
            "stem_stride": list(stem_stride),
            "last_stage_stride": last_stage_stride,
        }
        width = [int(planes * widen_factor) for planes in get_inplanes()]
        expansion = self.layer1[0].expansion
        factors = (1, 2, 4, 8, 8 * last_stage_stride)
        self.channels = (width[0], *(planes * expansion for planes in width))
        self.level_channels = self.channels
        self.level_strides = tuple(tuple(s * f for s in stem_stride) for f in factors)
        self.centres = ((0.0, 0.0, 0.0),) * 5
        self.stride = self.level_strides[-1]
        self.encoder_parts = [name for name, _ in self.named_children()]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See :meth:`features`."""
        return self.features(x)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of the stem and stages 1 to 4, finest first, of (B, in_channels, X, Y, Z) of any size."""
        stem = self.act(self.bn1(self.conv1(x)))
        stage1 = self.layer1(self.maxpool(stem))
        stage2 = self.layer2(stage1)
        stage3 = self.layer3(stage2)
        stage4 = self.layer4(stage3)
        return [stem, stage1, stage2, stage3, stage4]


def initialise_convolutions(module: torch.nn.Module) -> None:
    """Initialise convolutions Kaiming-uniformly, as in the paper's comparison, and their biases with 0."""
    for part in module.modules():
        if isinstance(part, (torch.nn.Conv3d, torch.nn.ConvTranspose3d)):
            torch.nn.init.kaiming_uniform_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                torch.nn.init.zeros_(part.bias)


def _dilate(stage: torch.nn.Sequential) -> None:
    """Trade the stage's stride for dilation 2 (MONAI's ResNet has no argument for it)."""
    for module in stage.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.stride = (1, 1, 1)
            if module.kernel_size == (3, 3, 3):
                module.dilation = module.padding = (2, 2, 2)
