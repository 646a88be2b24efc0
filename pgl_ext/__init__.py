"""PGL for MONAI: prior-guided local self-supervised pre-training for 3D medical segmentation."""

__version__ = "0.1.0"
