"""Dense features: the encoder's deepest feature map as a network of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgl_ext.networks.encoder import ResNetEncoder
from pgl_ext.weights import load_encoder, read_description

__all__ = ["DenseFeatures", "build_encoder", "load_weights"]


class DenseFeatures(nn.Module):
    """The deepest feature map of an encoder.

    Feature j lies on input voxel ``stride * j``, per axis. The state dict's keys are ``encoder.*``, as in encoder
    files, and the module can be scripted.

    Args:
        encoder: maps (B, C, X, Y, Z) to its feature maps, finest first; has ``stride``.

    Attributes:
        stride: output stride per axis, in voxels.

    Example:
        >>> network = DenseFeatures(ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.25))
        >>> network(torch.rand(1, 1, 64, 48, 16)).shape
        torch.Size([1, 128, 4, 3, 2])
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.stride: tuple[int, ...] = tuple(encoder.stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map volumes (B, C, X, Y, Z) to features (B, F, ceil(X / s_x), ceil(Y / s_y), ceil(Z / s_z))."""
        return self.encoder(x)[-1]


def build_encoder(path: str | os.PathLike | None = None, load: bool = True, **overrides: Any) -> ResNetEncoder:
    """Build the encoder that an encoder file belongs to, and load the file.

    The architecture is the one recorded in the JSON beside the file; where there is none, the default ResNet-50.

    Args:
        path: encoder file (``.pt``); None: the default architecture with random weights.
        load: whether to load the weights too. Without, the file need not exist.
        overrides: arguments of :class:`ResNetEncoder` that replace the recorded ones.

    Raises:
        FileNotFoundError: the file does not exist, and its weights are to be loaded.
        ValueError: the weights do not fit the architecture, or the architecture has arguments that are not known.
    """
    architecture = {**_recorded_architecture(path), **overrides}
    try:
        encoder = ResNetEncoder(**architecture)
    except TypeError as error:
        raise ValueError(
            f"The architecture {architecture} of encoder file {path} is not one of ResNetEncoder: {error}. Install the "
            "version of pgl_ext that wrote the file."
        ) from error
    if path is not None and load:
        load_weights(encoder, path)
    return encoder


def load_weights(network: nn.Module, path: str | os.PathLike, device: torch.device | str = "cpu") -> nn.Module:
    """Load an encoder file into a network's encoder, all of its tensors, and move the network to a device.

    Args:
        network: an encoder, or a network with ``.encoder``.
        path: encoder file (``.pt``).
        device: where the network goes.

    Returns:
        The network.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or does not fit the encoder.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"Encoder file {Path(path).absolute()} does not exist: give the one that pre-training wrote, with "
            "--pretrained_encoder FILE."
        )
    load_encoder(network, path)
    return network.to(device)


def _recorded_architecture(path: str | os.PathLike | None) -> dict[str, Any]:
    if path is None or not Path(path).with_suffix(".json").is_file():
        return {}
    return dict(read_description(path).get("architecture", {}))
