"""How fast the volume cache gives crops, for several codecs, filters and block shapes.

    python benchmarks/volume_cache.py [--volume scan.nii.gz] [--repeats 25]

For each layout: the time to open a volume of 512 x 512 x 200 voxels and read two overlapping crops of about 120 x 120
x 20, with one thread and a warm page cache (median and 95th percentile over random places); the compression ratio
against float16; the time to write the file. For comparison, the time to read the whole volume from a .nii.gz file.
The first line is what ``pgl_ext.data.cache`` uses.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import torch

from pgl_ext.data import cache

SHAPE = (512, 512, 200)
CROP = (120, 120, 20)
LZ4, LZ4HC, ZSTD = blosc2.Codec.LZ4, blosc2.Codec.LZ4HC, blosc2.Codec.ZSTD
BIT, BYTE, NONE = blosc2.Filter.BITSHUFFLE, blosc2.Filter.SHUFFLE, blosc2.Filter.NOFILTER
LAYOUTS = [
    (
        cache._COMPRESSION["codec"],
        cache._COMPRESSION["clevel"],
        cache._COMPRESSION["filters"][0],
        cache._CHUNK,
        cache._BLOCK,
    ),
    (LZ4, 1, BIT, (1, 128, 128, 32), (1, 32, 32, 8)),
    (LZ4, 1, BIT, (1, 64, 64, 32), (1, 16, 16, 8)),
    (LZ4, 1, BIT, (1, 64, 64, 64), (1, 32, 32, 16)),
    (LZ4, 1, BIT, (1, 128, 128, 32), (1, 64, 64, 8)),
    (LZ4, 1, BYTE, (1, 64, 64, 64), (1, 32, 32, 8)),
    (LZ4, 5, BIT, (1, 64, 64, 64), (1, 32, 32, 8)),
    (LZ4HC, 5, BYTE, (1, 64, 64, 64), (1, 32, 32, 8)),
    (ZSTD, 1, BYTE, (1, 64, 64, 64), (1, 32, 32, 8)),
    (ZSTD, 1, BIT, (1, 64, 64, 64), (1, 32, 32, 8)),
    (ZSTD, 5, BIT, (1, 64, 64, 64), (1, 32, 32, 8)),
    (LZ4, 0, NONE, (1, 64, 64, 64), (1, 32, 32, 8)),
]


def synthetic_volume(rng: np.random.Generator) -> np.ndarray:
    """Nested ellipsoids of soft tissue, fat, lung and bone in air, with textured tissue and scanner noise, in HU."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE), indexing="ij", sparse=True)
    volume = np.full(SHAPE, -1000, dtype=np.float32)
    for radii, value in [((0.9, 0.7, 2), -90), ((0.82, 0.62, 2), 45), ((0.15, 0.15, 2), 280)]:
        volume[sum((x / r) ** 2 for x, r in zip(axes, radii, strict=True)) < 1] = value
    for _ in range(60):
        centre, radii = rng.uniform(-0.6, 0.6, 3), rng.uniform(0.04, 0.25, 3)
        inside = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii, strict=True)) < 1
        volume[inside] = rng.choice([-800.0, -100.0, 20.0, 60.0, 120.0, 300.0])
    return np.round(volume + 15 * rng.standard_normal(SHAPE, dtype=np.float32))


def given_volume(path: Path, rng: np.random.Generator) -> np.ndarray:
    """A scan resized to the benchmark's shape, with the noise that resizing smooths away put back."""
    image = torch.from_numpy(nibabel.load(path).get_fdata(dtype=np.float32))[None, None]
    volume = torch.nn.functional.interpolate(image, size=SHAPE, mode="trilinear")[0, 0].numpy()
    return np.round(volume + 15 * rng.standard_normal(SHAPE, dtype=np.float32))


def crop_pairs(rng: np.random.Generator, count: int) -> list[list[tuple[slice, ...]]]:
    """``count`` pairs of crops of about CROP voxels that share at least half of each axis."""
    pairs = []
    for _ in range(count):
        size = np.array([rng.integers(int(n * 0.9), int(n * 1.1) + 1) for n in CROP])
        start = rng.integers(0, np.array(SHAPE) - size + 1)
        moved = np.clip(start + rng.integers(-size // 2, size // 2), 0, np.array(SHAPE) - size)
        pairs.append([(slice(None), *map(slice, a, a + size)) for a in (start, moved)])
    return pairs


def read_times(path: Path, pairs: list) -> np.ndarray:
    """Milliseconds to open the file and read each pair, after one round to fill the page cache."""
    times = []
    for _ in range(2):
        times.clear()
        for pair in pairs:
            start = time.perf_counter()
            volume = cache._open_file(path)
            for crop in pair:
                volume[crop]
            times.append(1e3 * (time.perf_counter() - start))
    return np.array(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volume", type=Path, help="scan to use, resized; default: a synthetic one")
    parser.add_argument("--repeats", type=int, default=25, help="pairs of crops per layout")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    raw = given_volume(args.volume, rng) if args.volume else synthetic_volume(rng)
    clipped = np.clip(raw, -1024, 325)
    volume = ((clipped - clipped.mean()) / clipped.std()).astype(np.float16)[None]
    pairs = crop_pairs(rng, args.repeats)
    print(f"{'layout':<52}{'pair of crops, ms':>18}{'95 %':>8}{'ratio':>8}{'write, s':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for codec, level, used, chunk, block in LAYOUTS:
            path = Path(folder) / "volume.b2nd"
            start = time.perf_counter()
            array = blosc2.asarray(
                volume,
                chunks=chunk,
                blocks=block,
                cparams={"codec": codec, "clevel": level, "filters": [used], "nthreads": 1},
            )
            path.write_bytes(array.to_cframe())
            written = time.perf_counter() - start
            times = read_times(path, pairs)
            name = f"{codec.name} {level} {used.name} {chunk[1:]} {block[1:]}"
            ratio = volume.nbytes / path.stat().st_size
            print(f"{name:<52}{np.median(times):>18.2f}{np.percentile(times, 95):>8.2f}{ratio:>8.2f}{written:>10.2f}")
        nifti = Path(folder) / "volume.nii.gz"
        nibabel.save(nibabel.Nifti1Image(raw.astype(np.int16), np.eye(4)), nifti)
        start = time.perf_counter()
        nibabel.load(nifti).get_fdata(dtype=np.float32)
        print(f"{'whole volume from .nii.gz with nibabel':<52}{1e3 * (time.perf_counter() - start):>18.0f}")


if __name__ == "__main__":
    main()
