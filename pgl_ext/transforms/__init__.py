"""Transforms: preparing scans, overlapping views, patches with labels, intensity augmentations of whole batches."""

from pgl_ext.transforms.deformations import RandBezierIntensity, RandDeformedCopyd, RandLocalShuffle, RandPaint
from pgl_ext.transforms.intensity import (
    BatchIntensityd,
    RandBatchBlur,
    RandBatchBrightness,
    RandBatchGamma,
    RandBatchNoise,
    RandBatchPatchSwap,
)
from pgl_ext.transforms.load import LoadVolumed
from pgl_ext.transforms.masking import RandBlockMaskd
from pgl_ext.transforms.masks import NameToIndexd, SplitCased
from pgl_ext.transforms.patches import RandOrganPatchd
from pgl_ext.transforms.views import RandGlobalLocalViewsd, RandOverlappingViewsd
from pgl_ext.transforms.volumes import VolumeSpacingd, loading, preprocessing

__all__ = [
    "BatchIntensityd",
    "LoadVolumed",
    "NameToIndexd",
    "RandBatchBlur",
    "RandBatchBrightness",
    "RandBatchGamma",
    "RandBatchNoise",
    "RandBatchPatchSwap",
    "RandBezierIntensity",
    "RandBlockMaskd",
    "RandDeformedCopyd",
    "RandGlobalLocalViewsd",
    "RandLocalShuffle",
    "RandOrganPatchd",
    "RandOverlappingViewsd",
    "RandPaint",
    "SplitCased",
    "VolumeSpacingd",
    "loading",
    "preprocessing",
]
