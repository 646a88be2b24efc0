"""Networks: the encoder, the heads on it, and the segmentation network."""

from pgl_ext.networks.dynunet import DynUNet
from pgl_ext.networks.heads import ConvHead
from pgl_ext.networks.resnet import ResNetEncoder
from pgl_ext.networks.segmentation import SegmentationNet
from pgl_ext.networks.segresnet import SegResNet

__all__ = ["ConvHead", "DynUNet", "ResNetEncoder", "SegResNet", "SegmentationNet"]
