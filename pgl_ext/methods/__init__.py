"""Self-supervised methods, one file each."""

from pgl_ext.methods.base import Method, feature_std
from pgl_ext.methods.pgl import PGL

__all__ = ["PGL", "Method", "feature_std"]
