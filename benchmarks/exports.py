"""The segmentation network as PyTorch runs it, as TorchScript and as ONNX: differences, sizes and speed.

    python benchmarks/exports.py [--network small|default] [--patch 96 96 48] [--batch 1] [--repeats 5]

Random weights. MONAI's ``ckpt_export`` and ``onnx_export`` write the files, with the bundle's configs. The three take
turns on the same patches with one thread each; times are of the CPU, so that a busy machine matters less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from monai.bundle import ckpt_export, onnx_export
from timing import interleaved_times
from torch import nn

from pgl_ext.networks import SegmentationNet
from pgl_ext.weights import build_network, save_weights

CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "pgl_segmentation" / "configs"
SMALL = {
    "encoder": {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 0.25},
    "aspp_channels": 64,
    "decoder_channels": [64, 32, 16],
}


def write_model(preset: str, path: Path) -> nn.Module:
    """A model file, of the network of ``small.yaml`` or of the bundle's default, and its network."""
    if preset == "default":
        network = build_network(path)
        torch.save(network.state_dict(), path)
    else:
        network = SegmentationNet(**SMALL)
        description = {"task": None, "network": network.architecture, "normalization": {}, "spacing": None}
        save_weights(network.state_dict(), path, {**description, "patch_size": None})
    return network.eval()


def export(model: Path) -> dict[str, Path]:
    """Files of the exported network, by name."""
    settings = {"ckpt_file": str(model), "model_path": str(model), "config_file": str(CONFIGS / "inference.json")}
    files = {"TorchScript": model.with_suffix(".ts"), "ONNX Runtime": model.with_suffix(".onnx")}
    ckpt_export("network_def", filepath=str(files["TorchScript"]), **settings)
    onnx_export(args_file=str(CONFIGS / "onnx_export.yaml"), filepath=str(files["ONNX Runtime"]), **settings)
    return files


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("small", "default"), default="small")
    parser.add_argument("--patch", type=int, nargs=3, default=(96, 96, 48))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    patches = torch.randn(args.batch, 1, *args.patch)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        network = write_model(args.network, Path(folder) / "model.pt")
        files = {"eager": Path(folder) / "model.pt", **export(Path(folder) / "model.pt")}
        script, session = torch.jit.load(files["TorchScript"]), session_of(files["ONNX Runtime"])
        calls = {
            "eager": lambda: network(patches).numpy(),
            "TorchScript": lambda: script(patches).numpy(),
            "ONNX Runtime": lambda: session.run(["pred"], {"image": patches.numpy()})[0],
        }
        outputs = {name: call() for name, call in calls.items()}
        times = interleaved_times(calls, args.repeats, time.process_time)
        sizes = {name: path.stat().st_size / 1e6 for name, path in files.items()}
    scale = np.abs(outputs["eager"]).max()
    count = sum(parameter.numel() for parameter in network.parameters())
    print(f"{args.network} network, {count:,} parameters, {args.batch} x {tuple(args.patch)} voxels")
    print(f"one thread, medians of {args.repeats} rounds, largest output {scale:.3g}")
    print(f"{'':<14}{'MB':>9}{'max diff':>12}{'relative':>12}{'CPU ms':>10}{'speed':>8}")
    for name, output in outputs.items():
        difference = np.abs(output - outputs["eager"]).max()
        speed = np.median(times["eager"] / times[name])
        print(
            f"{name:<14}{sizes[name]:>9.2f}{difference:>12.2e}{difference / scale:>12.2e}"
            f"{np.median(times[name]):>10.1f}{speed:>8.2f}"
        )


if __name__ == "__main__":
    main()
