"""How fast the aligner is against ``grid_sample`` and average pooling, forward and backward.

    python benchmarks/aligner.py [--repeats 1] [--threads 2] [--seed 0]

The rival takes the same sample points, two per cell and axis, from each feature map by trilinear ``grid_sample`` with
border padding, and averages the points of each cell: RoIAlign as it is commonly built in 3D. Its result is checked
against the aligner's. Times are the fastest of the rounds, taken in turns: where something else keeps a core busy,
threads wait for one another, in the aligner's short operations above all. The larger map takes a minute and 4 GB of
memory, for grid_sample.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from timing import interleaved_times

from pgl_ext.aligner import PriorGuidedAligner

VIEW_SIZE = (96, 96, 16)
# (samples, views, channels, x, y, z) and the number of repeats.
SHAPES = [((8, 2, 256, 6, 6, 2), 20), ((8, 2, 256, 24, 24, 8), 2)]
RATIO = 2


def random_affines(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Affines (batch, 2, 4, 4) of crops of 110 to 140 % of the view size, up to a quarter apart, flipped at random."""
    size = torch.tensor(VIEW_SIZE, dtype=torch.float32)
    zoom = 1.1 + 0.3 * torch.rand(batch, 2, 3, generator=generator)
    start = 200 + size * 0.25 * torch.rand(batch, 2, 3, generator=generator)
    flip = torch.rand(batch, 2, 3, generator=generator) < 0.5
    affines = torch.diag_embed(torch.cat([torch.where(flip, -zoom, zoom), torch.ones(batch, 2, 1)], -1))
    affines[..., :3, 3] = start - 0.5 + zoom * torch.where(flip, size - 0.5, torch.tensor(0.5))
    return affines


def grid_sample_align(features: torch.Tensor, affines: torch.Tensor) -> torch.Tensor:
    """The aligner's "exact" mode with ``grid_sample`` and ``avg_pool3d``."""
    feature_size = torch.tensor(features.shape[3:])
    size = torch.tensor(VIEW_SIZE)
    scale, offset = affines.diagonal(dim1=-2, dim2=-1)[..., :3], affines[..., :3, 3]
    edges = torch.stack([offset - 0.5 * scale, offset + (size - 0.5) * scale])
    lower, upper = edges.amin(0).amax(1, keepdim=True), edges.amax(0).amin(1, keepdim=True)
    axes = []
    for axis, n in enumerate(feature_size.tolist()):
        fraction = (torch.arange(n * RATIO) + 0.5) / (n * RATIO)
        source = lower[..., axis, None] + (upper - lower)[..., axis, None] * fraction
        view = (source - offset[..., axis, None]) / scale[..., axis, None]
        feature = view / (size[axis] / feature_size[axis])
        axes.append((2 * feature / (n - 1) - 1).flatten(0, 1))  # align_corners=True: -1 and 1 are voxel centres
    x, y, z = axes
    shape = (len(x), x.shape[1], y.shape[1], z.shape[1])
    # grid_sample wants the last axis first.
    grid = torch.stack(
        [z[:, None, None, :].expand(shape), y[:, None, :, None].expand(shape), x[:, :, None, None].expand(shape)], -1
    )
    sampled = F.grid_sample(features.flatten(0, 1), grid, padding_mode="border", align_corners=True)
    return F.avg_pool3d(sampled, RATIO).unflatten(0, features.shape[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=float, default=1, help="multiplies the number of repeats")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    aligner = PriorGuidedAligner(sampling_ratio=RATIO)
    print(f"view size {VIEW_SIZE}, {RATIO} samples per cell and axis, {args.threads} threads, seed {args.seed}")
    print(f"{'features':<28}{'grid_sample, ms':>16}{'aligner, ms':>13}{'ratio':>8}{'largest difference':>20}")
    for shape, repeats in SHAPES:
        features = torch.randn(shape, generator=generator).requires_grad_()
        gradient = torch.randn(shape, generator=generator)
        affines = random_affines(shape[0], generator)
        methods = {
            "grid_sample": lambda f=features, a=affines: grid_sample_align(f, a),
            "aligner": lambda f=features, a=affines: aligner(f, a, VIEW_SIZE),
        }
        results = {}
        for name, align in methods.items():
            aligned = align()
            results[name] = (aligned, *torch.autograd.grad(aligned, features, gradient))
        difference = max(float((a - b).detach().abs().max()) for a, b in zip(*results.values(), strict=True))
        assert difference < 1e-5, f"the methods differ by {difference}"
        calls = {
            name: lambda align=align, f=features, g=gradient: torch.autograd.grad(align(), f, g)
            for name, align in methods.items()
        }
        times = interleaved_times(calls, max(1, round(args.repeats * repeats)))
        rival, ours = times["grid_sample"].min(), times["aligner"].min()
        print(f"{shape!s:<28}{rival:>16.2f}{ours:>13.2f}{rival / ours:>8.1f}{difference:>20.1e}")


if __name__ == "__main__":
    main()
