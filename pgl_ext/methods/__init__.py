"""Self-supervised methods, one file each."""

from pgl_ext.methods.base import Method, feature_std
from pgl_ext.methods.byol import BYOL
from pgl_ext.methods.hssl import HSSL
from pgl_ext.methods.mae import MAE
from pgl_ext.methods.models_genesis import ModelsGenesis
from pgl_ext.methods.pcrlv2 import PCRLv2
from pgl_ext.methods.pgl import PGL
from pgl_ext.methods.pgl_mae import PGLMAE

__all__ = ["BYOL", "HSSL", "MAE", "PGL", "PGLMAE", "Method", "ModelsGenesis", "PCRLv2", "feature_std"]
