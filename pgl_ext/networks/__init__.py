"""Networks: the encoder and the heads on it."""

from pgl_ext.networks.encoder import ResNetEncoder
from pgl_ext.networks.heads import ConvHead

__all__ = ["ConvHead", "ResNetEncoder"]
