"""Intensity augmentations of batches (B, C, X, Y, Z) on any device, with parameters drawn per sample and channel.

The PGL paper's (section 3.2, steps 3 to 6) and patch swapping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import Randomizable

from pgl_ext.geometry import resample_axes
from pgl_ext.transforms.crops import check_probability, checked_size
from pgl_ext.transforms.deformations import RandSteps, rescale_to_unit

__all__ = [
    "BatchIntensityd",
    "RandBatchBlur",
    "RandBatchBrightness",
    "RandBatchGamma",
    "RandBatchNoise",
    "RandBatchPatchSwap",
]


_POSITIVE = 1e-6  # the smallest standard deviation, in voxels, and exponent


class _RandBatchTransform(Randomizable):
    """Apply ``transform`` to each channel, or sample, with probability ``prob``, its parameter from ``value_range``."""

    per_channel = True

    def __init__(
        self, prob: float, name: str, value_range: Sequence[float], lowest: float = -math.inf, highest: float = math.inf
    ) -> None:
        check_probability("prob", prob)
        if len(value_range) != 2 or not lowest <= value_range[0] <= value_range[1] <= highest:
            raise ValueError(
                f"{name} must be two increasing numbers, got {tuple(value_range)}; allowed: {lowest:g} to {highest:g}."
            )
        self.prob = prob
        self.value_range = tuple(value_range)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Augment (B, C, X, Y, Z); returns a new tensor of the same shape and dtype."""
        if images.ndim != 5:
            raise ValueError(f"expected a batch (B, C, X, Y, Z), got shape {tuple(images.shape)}.")
        if self.per_channel and images.shape[1] > 1:
            return self(images.reshape(-1, 1, *images.shape[2:])).view(images.shape)
        changed = np.flatnonzero(self.R.random_sample(len(images)) < self.prob)
        values = self.R.uniform(*self.value_range, size=len(images))[changed]
        if not len(changed):
            return images
        index = torch.from_numpy(changed).to(images.device, non_blocking=True)
        values = torch.from_numpy(values).float().to(images.device, images.dtype, non_blocking=True)
        # Autocast would run the blur's products in half precision.
        with torch.autocast(images.device.type, enabled=False):
            return images.index_copy(0, index, self.transform(images[index], values.view(-1, 1, 1, 1, 1)))

    def transform(self, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Change all of ``images`` (n, C, X, Y, Z) with their parameters ``values`` (n, 1, 1, 1, 1)."""
        raise NotImplementedError


class RandBatchNoise(_RandBatchTransform):
    """Add white Gaussian noise whose variance is drawn uniformly (step 3).

    Args:
        prob: probability per channel of a sample.
        variance: range of the variance, in squared units of the normalised intensity.
    """

    def __init__(self, prob: float = 0.1, variance: Sequence[float] = (0.0, 0.1)) -> None:
        super().__init__(prob, "variance", variance, lowest=0)

    def transform(self, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(images.device).manual_seed(int(self.R.randint(2**31)))
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        return torch.addcmul(images, noise, values.sqrt())


class RandBatchBlur(_RandBatchTransform):
    """Gaussian blur with repeated borders (step 4).

    Args:
        prob: probability per channel of a sample.
        sigma: range of the standard deviation, in voxels.
    """

    def __init__(self, prob: float = 0.2, sigma: Sequence[float] = (0.5, 1.0)) -> None:
        super().__init__(prob, "sigma", sigma, lowest=_POSITIVE)
        # Four standard deviations hold all but 6e-5 of the weight.
        self.radius = max(1, int(4 * sigma[1] + 0.5))

    def transform(self, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        distance = torch.arange(-self.radius, self.radius + 1, device=images.device)
        kernels = torch.exp(-0.5 * (distance / values.view(-1, 1)).square())
        kernels = kernels / kernels.sum(dim=1, keepdim=True)
        # One matrix per sample and axis: depthwise 3D convolutions are slow, on CPUs above all.
        weights = []
        for size in images.shape[2:]:
            neighbour = (torch.arange(size, device=images.device)[:, None] + distance).clamp(0, size - 1)
            weights.append(torch.einsum("nd,ids->nis", kernels, F.one_hot(neighbour, size).to(images.dtype)))
        return resample_axes(images, weights)


class RandBatchBrightness(_RandBatchTransform):
    """Multiply by a constant and clip to the channel's original range (step 5).

    Args:
        prob: probability per channel of a sample.
        factor: range of the factor.
    """

    def __init__(self, prob: float = 0.5, factor: Sequence[float] = (0.75, 1.25)) -> None:
        super().__init__(prob, "factor", factor)

    def transform(self, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        voxels = (1, 2, 3, 4)
        return torch.clamp(images * values, images.amin(voxels, keepdim=True), images.amax(voxels, keepdim=True))


class RandBatchGamma(_RandBatchTransform):
    """Gamma transformation (step 6): rescale the channel to [0, 1], raise to the power of gamma, rescale back.

    Args:
        prob: probability per channel of a sample.
        gamma: range of the exponent.
    """

    def __init__(self, prob: float = 0.5, gamma: Sequence[float] = (0.7, 1.5)) -> None:
        super().__init__(prob, "gamma", gamma, lowest=_POSITIVE)

    def transform(self, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scaled, lowest, span = rescale_to_unit(images)
        return scaled.clamp(0, 1).pow(values) * span + lowest


class RandBatchPatchSwap(_RandBatchTransform):
    """Swap pairs of disjoint patches within a sample, after context restoration (Chen et al. 2019).

    They are the same in all channels. The patches lie on a grid as coarse as they are large, shifted at random.

    Args:
        prob: probability per sample.
        fraction: range of the share of the voxels that change place; the number of swaps follows.
        patch_size: (X, Y, Z) in voxels.
    """

    per_channel = False

    def __init__(
        self, prob: float = 0.5, fraction: Sequence[float] = (0.0, 0.2), patch_size: Sequence[int] | int = (8, 4, 4)
    ) -> None:
        super().__init__(prob, "fraction", fraction, lowest=0, highest=1)
        self.patch_size = checked_size("patch_size", patch_size)

    def transform(self, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        size = tuple(images.shape[2:])
        pairs_of_all = math.prod(size) / math.prod(self.patch_size) / 2
        most = round(self.value_range[1] * pairs_of_all)
        if most == 0:
            return images
        corners = np.stack([self._disjoint_corners(size, 2 * most) for _ in images])
        places = corners[:, :, None] + np.indices(self.patch_size).reshape(3, -1).T
        voxels = torch.from_numpy(np.ravel_multi_index(tuple(np.moveaxis(places, -1, 0)), size))
        voxels = voxels.to(images.device, non_blocking=True)
        # Patches i and i + most are a pair. A sample swaps only as many pairs as were drawn for it.
        swaps = (values.view(-1, 1) * pairs_of_all).round()
        swapped = (torch.arange(most, device=images.device) < swaps).repeat(1, 2)[..., None]
        sources = torch.where(swapped, voxels.roll(most, dims=1), voxels)
        voxels, sources = (index.flatten(1)[:, None].expand(-1, images.shape[1], -1) for index in (voxels, sources))
        flat = images.flatten(2)
        return flat.scatter(2, voxels, flat.gather(2, sources)).view_as(images)

    def _disjoint_corners(self, size: Sequence[int], count: int) -> np.ndarray:
        """First voxels (count, 3) of patches that do not meet."""
        size, patch_size = np.asarray(size), np.asarray(self.patch_size)
        # One patch less per axis than would fit leaves the grid room to be shifted.
        cells = np.maximum(size - patch_size + 1, 0) // patch_size
        if count > cells.prod():
            raise ValueError(
                f"images of {tuple(size.tolist())} voxels have no room for {count} patches of {self.patch_size}: use a "
                "smaller fraction or smaller patches."
            )
        shift = self.R.randint(size - cells * patch_size + 1)
        chosen = self.R.choice(cells.prod(), count, replace=False)
        return shift + patch_size * np.stack(np.unravel_index(chosen, cells), axis=-1)


class BatchIntensityd(RandSteps):
    """Run intensity augmentations on the views of a batch, each view with its own parameters.

    Args:
        keys: key of the views, (B, V, C, X, Y, Z) or (B, C, X, Y, Z).
        transforms: batched augmentations in their order, each (B, C, X, Y, Z) to the same shape.
    """

    def __init__(self, keys: str, transforms: Sequence[Callable]) -> None:
        super().__init__(transforms)
        self.key = keys

    def __call__(self, batch: dict) -> dict:
        views = batch[self.key]
        flat = views.reshape(-1, *views.shape[-4:])
        for transform in self.transforms.transforms:
            flat = transform(flat)
        return {**batch, self.key: flat.view(views.shape)}
