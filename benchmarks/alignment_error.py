"""How far apart in the volume are the places that the aligner takes for the same, in each of its modes?

    python benchmarks/alignment_error.py [--pairs 500]

Views of the paper's size and statistics; the features are the source coordinates of the voxels that they are centred
on, as a strided encoder with odd kernels and padding k // 2 would see them. Where two aligned maps show the same place,
they hold the same coordinate.
"""

from __future__ import annotations

import argparse

import torch

from pgl_ext.aligner import PriorGuidedAligner
from pgl_ext.transforms import RandOverlappingViewsd

VIEW_SIZE, STRIDE = (96, 96, 16), (16, 16, 8)


def coordinate_features(affines: torch.Tensor) -> torch.Tensor:
    """Source coordinates of view voxels stride * j: (B, 2, 3, 6, 6, 2) for affines (B, 2, 4, 4)."""
    axes = [torch.arange(0, p, s, dtype=torch.float32) for p, s in zip(VIEW_SIZE, STRIDE, strict=True)]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return torch.einsum("bvij,jxyz->bvixyz", affines[..., :3, :3], voxels) + affines[..., :3, 3, None, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=500)
    settings = parser.parse_args()
    transform = RandOverlappingViewsd("image", VIEW_SIZE).set_random_state(0)
    volume = torch.zeros(1, 300, 300, 80)
    affines = torch.stack([transform({"image": volume})["affines"] for _ in range(settings.pairs)])
    flipped = (torch.diagonal(affines, dim1=-2, dim2=-1)[..., :3] < 0).diff(dim=1).squeeze(1)
    print(f"{settings.pairs} pairs, error in source voxels: mean (median)")
    print(f"{'alignment':10}{'axis':6}{'flips agree':>18}{'flips differ':>18}{'all':>18}{'below 1 voxel':>16}")
    for alignment in ("exact", "inside", "paper"):
        aligned = PriorGuidedAligner(alignment=alignment)(coordinate_features(affines), affines, VIEW_SIZE)
        error = (aligned[:, 0] - aligned[:, 1]).abs().flatten(2)
        for axis, name in enumerate("xyz"):
            groups = [error[~flipped[:, axis], axis], error[flipped[:, axis], axis], error[:, axis]]
            cells = "".join(f"{f'{g.mean():.2f} ({g.median():.2f})':>18}" for g in groups)
            print(f"{alignment:10}{name:6}{cells}{100 * (groups[2] < 1).float().mean():>14.0f} %")


if __name__ == "__main__":
    main()
