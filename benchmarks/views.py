"""How long one pair of (96, 96, 16) views of a 512 x 512 x 200 volume takes, with one thread.

    python benchmarks/views.py [--repeats 40] [--seed 0]

Compares ``RandOverlappingViewsd`` on a volume in memory and in the cache on disk (opened for each pair, warm page
cache) with MONAI's own dictionary transforms, which get the same crops and flips, and with reading the scan from a
.nii.gz file for each pair. Times are medians of processor time over random crops, taken in turns; checks make sure that
all give the same views.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd, LoadImaged, Resized, SpatialCropd
from timing import interleaved_times

from pgl_ext.data.cache import VolumeCache
from pgl_ext.transforms import RandOverlappingViewsd

SHAPE = (512, 512, 200)
VIEW_SIZE = (96, 96, 16)


def synthetic_volume(rng: np.random.Generator) -> np.ndarray:
    """A smooth body with scanner noise in air, in HU."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE), indexing="ij", sparse=True)
    body = (axes[0] / 0.9) ** 2 + (axes[1] / 0.7) ** 2 < 1
    tissue = 60 + 100 * np.sin(9 * axes[0]) * np.cos(7 * axes[1]) * np.sin(5 * axes[2])
    return np.round(np.where(body, tissue, -1000) + 15 * rng.standard_normal(SHAPE, dtype=np.float32))


def stock_views(volume: MetaTensor, transform: RandOverlappingViewsd) -> torch.Tensor:
    """The views that ``transform`` cut last, by MONAI's own transforms."""
    views = []
    for start, size, flip in zip(transform.crop_start, transform.crop_size, transform.flip, strict=True):
        steps = [
            SpatialCropd("image", roi_start=start, roi_end=start + size),
            Resized("image", VIEW_SIZE, mode="trilinear"),
        ]
        if flip.any():
            steps.append(Flipd("image", np.flatnonzero(flip).tolist()))
        views.append(Compose(steps)({"image": volume})["image"])
    return torch.stack(views)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--slow-repeats", type=int, default=3, help="repeats of reading the .nii.gz file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hounsfield = synthetic_volume(np.random.default_rng(args.seed))
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "scan.nii.gz"
        nibabel.save(nibabel.Nifti1Image(hounsfield.astype(np.int16), np.eye(4)), scan)
        item = {"image": str(scan)}
        load = LoadImaged("image", ensure_channel_first=True)
        cache = VolumeCache(Path(folder) / "cache", load)
        cache.prepare([item])
        half = cache.open(item)[:]
        single = half.astype(np.float32)
        meta = MetaTensor(torch.from_numpy(single), affine=torch.eye(4))
        transform = RandOverlappingViewsd("image", VIEW_SIZE).set_random_state(args.seed)
        calls = {
            "views, float16 in memory": lambda: transform({"image": half})["views"],
            "views, float32 in memory": lambda: transform({"image": single})["views"],
            "views, cache on disk": lambda: transform({"image": cache.open(item)})["views"],
            "stock MONAI, float32 in memory": lambda: stock_views(meta, transform),
        }
        for name in ("views, float16 in memory", "views, float32 in memory", "views, cache on disk"):
            difference = (calls[name]() - stock_views(meta, transform)).abs().max()
            # HU reach 1000, of which float32 resolves 6e-5.
            assert difference < 2e-3, f"{name} differs from stock MONAI by {float(difference)}"
        times = interleaved_times(calls, args.repeats, time.process_time)
        read = "views, scan read from .nii.gz"
        times |= interleaved_times({read: lambda: transform(load(item))["views"]}, args.slow_repeats, time.process_time)
    times = {name: np.median(taken) for name, taken in times.items()}
    print(f"{SHAPE} volume, pair of {VIEW_SIZE} views, {torch.get_num_threads()} thread, seed {args.seed}")
    stock, cached = times["stock MONAI, float32 in memory"], times["views, cache on disk"]
    print(f"{'':<34}{'ms per pair':>12}{'stock / this':>14}{'this / cache':>14}")
    for name, taken in times.items():
        print(f"{name:<34}{taken:>12.2f}{stock / taken:>14.2f}{taken / cached:>14.2f}")


if __name__ == "__main__":
    main()
