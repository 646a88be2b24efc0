"""What pre-training, weights and evaluation ask of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "FeatureNetwork",
    "SegmentationNetwork",
    "crop_to",
    "encoder_of",
    "level_strides",
    "pad_to_multiple",
    "require_tracing",
    "stack_levels",
]


class FeatureNetwork(nn.Module):
    """A network with a pyramid of feature maps: all that methods without a decoder need.

    Subclasses are networks of a library, with its names of tensors.

    Attributes:
        family: its name in records, see ``networks.build``.
        arguments: what builds it again, as plain values: those of the library's constructor.
        level_channels: channels of each feature map, finest first.
        level_strides: voxels per cell of each feature map, per axis.
        centres: for each feature map the voxel, per axis, that its first cell is centred on: cell j lies on voxel
            ``stride * j + centre``. 0 for strided convolutions with odd kernels, (stride - 1) / 2 for pooling and
            patches.
        encoder_parts: names of the modules, from here, that make up the encoder.
        key_prefix: what precedes its names of tensors in files of weights.
    """

    # Without annotations, which TorchScript would take for its own.
    key_prefix = ""

    __jit_unused_properties__ = ("architecture", "feature_network")

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, level_channels[i], ...), finest first, of (B, C, X, Y, Z)."""
        raise NotImplementedError

    @property
    def architecture(self) -> dict[str, Any]:
        """Family and arguments, for a record."""
        return {"family": self.family, "arguments": dict(self.arguments)}

    @property
    def feature_network(self) -> FeatureNetwork:
        """What records of its encoder describe: the network itself, or a network that its encoder is."""
        return self

    @torch.jit.unused
    def encoder_modules(self) -> list[nn.Module]:
        """The modules that make up the encoder."""
        return [self.get_submodule(name) for name in self.encoder_parts]

    @torch.jit.unused
    def encoder_keys(self) -> list[str]:
        """Names of the encoder's tensors in the state dict, all of those that a tensor has."""
        return _keys_of(self, self.encoder_modules())

    @torch.jit.unused
    def aliases(self) -> dict[str, str]:
        """Further names of tensors that the state dict has more than once, with the first name of each."""
        first: dict[int, str] = {}
        state = self.state_dict(keep_vars=True)
        names = {key: first.setdefault(id(tensor), key) for key, tensor in state.items()}
        return {key: name for key, name in names.items() if key != name}

    @torch.jit.unused
    def encoder_copy(self) -> FeatureNetwork:
        """A copy that has the encoder alone: :meth:`features` works, nothing else does."""
        copy = deepcopy(self)
        _keep_parts(copy, tuple(self.encoder_parts))
        return copy

    @torch.jit.unused
    def train_encoder_alone(self) -> None:
        """Let the encoder's parameters need gradients and no others, which several processes would wait for."""
        self.requires_grad_(False)
        for part in self.encoder_modules():
            part.requires_grad_(True)

    @torch.jit.unused
    def check_view_size(self, view_size: Sequence[int]) -> None:
        """Raise a ValueError where the output stride does not divide ``view_size`` (voxels)."""
        stride = self.level_strides[-1]
        if len(view_size) != 3 or any(p < s or p % s for p, s in zip(view_size, stride, strict=True)):
            nearest = tuple(max(1, round(p / s)) * s for p, s in zip(view_size, stride, strict=False))
            raise ValueError(
                f"view_size {tuple(view_size)} is not a multiple of the encoder's output stride {tuple(stride)}. "
                f'Choose a multiple on each axis, for example --view_size "{list(nearest)}".'
            )


class SegmentationNetwork(FeatureNetwork):
    """A :class:`FeatureNetwork` with a decoder, which returns logits on the grid of its input.

    Attributes:
        decoder_parts: names of the modules, from here, that make up the decoder.
        head_parts: names of those among them, or inside them, that are made for certain outputs and start anew.
    """

    def features_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """:meth:`features` and logits (B, out_channels, X, Y, Z), in one pass of the encoder."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, out_channels, X, Y, Z) of (B, in_channels, X, Y, Z) of any size."""
        return self.features_and_logits(x)[1]

    @staticmethod
    def with_deep_supervision(arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a network with those that add deep supervision to it, where its family has any."""
        return dict(arguments)

    @torch.jit.unused
    def decoder_keys(self) -> list[str]:
        """Names of the decoder's tensors in the state dict, without those of the head."""
        head = set(_keys_of(self, [self.get_submodule(name) for name in self.head_parts]))
        return [
            key for key in _keys_of(self, [self.get_submodule(name) for name in self.decoder_parts]) if key not in head
        ]

    @torch.jit.unused
    def decoder_state(self) -> dict[str, torch.Tensor]:
        """The decoder's tensors, without those of the head."""
        state = self.state_dict()
        return {key: state[key] for key in self.decoder_keys()}

    @torch.jit.unused
    def parameter_groups(self, lr: float, encoder_lr_factor: float = 1.0) -> list[dict[str, Any]]:
        """Parameters for an optimiser: the encoder's with a learning rate of their own, then all others."""
        encoder = [parameter for part in self.encoder_modules() for parameter in part.parameters()]
        known = set(map(id, encoder))
        others = [parameter for parameter in self.parameters() if id(parameter) not in known]
        return [{"params": encoder, "lr": lr * encoder_lr_factor}, {"params": others, "lr": lr}]


def encoder_of(module: nn.Module) -> FeatureNetwork:
    """What records and files of encoders are of, in a network or in a method; a network's part may be called so too."""
    return (module if isinstance(module, FeatureNetwork) else module.encoder).feature_network


def _keys_of(network: nn.Module, parts: Sequence[nn.Module]) -> list[str]:
    """Keys of a network's state dict whose tensors belong to some of its modules, under whatever name."""
    tensors = {id(tensor) for part in parts for tensor in part.state_dict(keep_vars=True).values()}
    return [key for key, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in tensors]


def _keep_parts(module: nn.Module, parts: Sequence[str]) -> None:
    """Delete what is inside a module but is none of some modules, which are named from there, nor inside one."""
    for name, child in list(module.named_children()):
        inside = tuple(part.removeprefix(f"{name}.") for part in parts if part.startswith(f"{name}."))
        if inside:
            _keep_parts(child, inside)
        elif name not in parts:
            delattr(module, name)


def level_strides(strides: Sequence[Sequence[int] | int]) -> tuple[tuple[int, ...], ...]:
    """Voxels per cell and axis after each of several strided layers."""
    per_axis = [(stride,) * 3 if isinstance(stride, int) else tuple(stride) for stride in strides]
    return tuple(tuple(math.prod(axis) for axis in zip(*per_axis[: i + 1], strict=True)) for i in range(len(per_axis)))


def pad_to_multiple(x: torch.Tensor, multiple: list[int]) -> torch.Tensor:
    """Append edge values to (B, C, X, Y, Z) until each axis is a multiple of a number of voxels."""
    short: list[int] = []
    for axis in range(3):
        size, step = x.shape[2 + axis], multiple[axis]
        short.append((size + step - 1) // step * step - size)
    # A trace is of one way: through the padding, which may be of no voxels.
    if sum(short) == 0 and not torch.jit.is_tracing():
        return x
    return F.pad(x, [0, short[2], 0, short[1], 0, short[0]], mode="replicate")


def crop_to(x: torch.Tensor, size: list[int]) -> torch.Tensor:
    """The first voxels of (..., X, Y, Z), as many along each axis as ``size`` says."""
    return x[..., : size[0], : size[1], : size[2]]


def stack_levels(logits: list[torch.Tensor]) -> torch.Tensor:
    """Logits of deep supervision (B, K, out_channels, X, Y, Z): those of K levels, resized to the first one's grid."""
    resized = [logits[0]]
    for coarse in logits[1:]:
        resized.append(F.interpolate(coarse, logits[0].shape[2:]))
    return torch.stack(resized, dim=1)


def require_tracing(network: FeatureNetwork) -> FeatureNetwork:
    """What ``torch.jit.script`` is to get of a network that it cannot compile: a ValueError that says what to do."""
    raise ValueError(
        f"{type(network).__name__} can not be scripted, since the library's cannot be: export it by tracing, with "
        '--use_trace True --input_shape "[1, CHANNELS, X, Y, Z]", the size of a patch.'
    )
