"""Networks: the encoder, the heads on it, and the segmentation network."""

from pgl_ext.networks.heads import ConvHead
from pgl_ext.networks.resnet import ResNetEncoder
from pgl_ext.networks.segmentation import SegmentationNet

__all__ = ["ConvHead", "ResNetEncoder", "SegmentationNet"]
