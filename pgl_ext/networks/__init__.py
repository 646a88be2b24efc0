"""Networks: the encoder, the heads on it, and the segmentation network."""

from pgl_ext.networks.dynunet import DynUNet
from pgl_ext.networks.heads import ConvHead
from pgl_ext.networks.mednext import MedNeXt
from pgl_ext.networks.resenc import ResidualEncoderUNet
from pgl_ext.networks.resnet import ResNetEncoder
from pgl_ext.networks.segmentation import SegmentationNet
from pgl_ext.networks.segresnet import SegResNet
from pgl_ext.networks.segresnet_ds import SegResNetDS
from pgl_ext.networks.swinunetr import SwinUNETR
from pgl_ext.networks.unet import UNet

__all__ = [
    "ConvHead",
    "DynUNet",
    "MedNeXt",
    "ResNetEncoder",
    "ResidualEncoderUNet",
    "SegResNet",
    "SegResNetDS",
    "SegmentationNet",
    "SwinUNETR",
    "UNet",
]
