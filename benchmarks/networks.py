"""The networks of ``configs/networks``: size, stride, memory and time of a step and of a window.

    python benchmarks/networks.py [--repeats 5]

Sizes are of the full overlays, memory and time of the small ones, on one thread of a CPU: what autograd keeps for one
view, a step of ``pgl_mae`` on a pair of views (without optimiser and loader), and a window of inference. Networks take
turns on 64 x 64 x 32 voxels; ratios are to ``dynunet`` in the same round.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from timing import interleaved_times
from torch import nn

from pgl_ext.methods import PGLMAE
from pgl_ext.networks.base import SegmentationNetwork
from pgl_ext.tools.plan import ARCHITECTURES, overlays, saved_bytes

CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "pgl_pretrain" / "configs"
SIZE = (64, 64, 32)  # voxels, a multiple of all strides


def network_of(architecture: str, small: bool) -> SegmentationNetwork:
    """The network of the overlays for pre-training."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in ("train.json", *overlays(architecture, small))])
    return parser.get_parsed_content("segmentation_network")


def full_size(architecture: str) -> str:
    """Parameters, of the encoder, and stride of the full overlay."""
    with torch.device("meta"):
        network = network_of(architecture, small=False)
    whole, encoder = (
        sum(parameter.numel() for module in modules for parameter in module.parameters()) / 1e6
        for modules in ([network], network.encoder_modules())
    )
    return f"{whole:.1f} M | {encoder:.1f} M | {network.level_strides[-1]}"


def step(method: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    method.zero_grad(set_to_none=True)
    method(batch)["loss"].backward()


@torch.no_grad()
def window(network: nn.Module, image: torch.Tensor) -> None:
    network(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    views = torch.randn(1, 2, 1, *SIZE)
    mask = torch.rand(1, 2, 1, *SIZE) < 0.7
    batch = {"views": views, "affines": torch.eye(4).repeat(1, 2, 1, 1), "mask": mask}
    memory, steps, windows = {}, {}, {}
    for name in ARCHITECTURES:
        network = network_of(name, small=True)
        with torch.device("meta"):
            memory[name] = saved_bytes(network_of(name, small=True).train(), SIZE) / 2**20
        windows[name] = partial(window, network.eval(), views[:, 0])
        # In evaluation, as batch norm of the projector refuses the one pair of a network with a single cell.
        steps[name] = partial(step, PGLMAE(network, hidden_channels=512, out_channels=128).eval(), batch)
    times = [interleaved_times(calls, args.repeats, time.process_time) for calls in (steps, windows)]
    print("| network | parameters | of the encoder | stride | small: MiB | ms a step, ratio | ms a window, ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in ARCHITECTURES:
        columns = [f"{np.median(t[name]):.0f}, {np.median(t[name] / t['dynunet']):.2f}" for t in times]
        print(f"| `{name}` | {full_size(name)} | {memory[name]:.0f} | {columns[0]} | {columns[1]} |", flush=True)


if __name__ == "__main__":
    main()
