"""Pre-training speed on a GPU with the paper's configuration in bfloat16, beside the bare networks' speed.

    python benchmarks/gpu.py [--num_workers 14] [--micro_batch_size 64] [--compile]

Aim on one H100-class GPU: 700 pairs/s, at 95 % of the bare networks' speed.
"""

from __future__ import annotations

import argparse
import os

import torch
from pretraining import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--micro_batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="the first one warms up and does not count")
    parser.add_argument("--num_workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--compile", action="store_true")
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "no GPU found: benchmarks/training_step.py measures the overhead on a CPU.\n")
    result = measure(
        "cuda",
        settings.batch_size,
        settings.micro_batch_size,
        settings.steps,
        amp=True,
        num_workers=settings.num_workers,
        volumes=8,
        shape=(512, 512, 200),
        memory_limit_gib=None,
        compile=settings.compile,
    )
    print(f"{torch.cuda.get_device_name()}, {settings.num_workers} workers, {result['pairs']:.0f} pairs per step")
    print(f"bare networks   {result['bare']:8.3f} s  {result['pairs'] / result['bare']:8.1f} pairs/s")
    print(f"training step   {result['step']:8.3f} s  {result['pairs_per_s']:8.1f} pairs/s")
    print(f"waiting for data{result['data']:8.3f} s")
    print(f"share of the bare networks' speed {100 * result['bare'] / result['step']:.1f} %")
    print(f"{122e9 * result['pairs_per_s'] / 1e12:.1f} TFLOP/s at 122 GFLOP a pair")
    print(f"peak memory     {result['peak_gib']:8.2f} GiB")


if __name__ == "__main__":
    main()
