"""Overhead of a training step over the bare networks, on the CPU, with the paper's network and views.

python benchmarks/training_step.py [--batch_size 4] [--steps 4]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from pretraining import make_dataset, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="the first one warms up and does not count")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder), volumes=4, shape=(256, 256, 64), memory_limit_gib=1)
        result = measure("cpu", dataset, settings.batch_size, settings.micro_batch_size, settings.steps)
    print(f"{torch.get_num_threads()} threads, {result['pairs']:.0f} pairs per step")
    print(f"bare networks   {result['bare']:8.2f} s")
    print(f"training step   {result['step']:8.2f} s, of which data {result['data']:.3f} s")
    print(f"overhead        {100 * (result['step'] / result['bare'] - 1):8.1f} %  (aim: at most 10 %)")
    print(f"peak memory     {result['peak_gib']:8.2f} GiB")


if __name__ == "__main__":
    main()
