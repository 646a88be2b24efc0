"""Sliding-window inference of the segmentation bundle against the bare network, and a whole scan end to end.

    python benchmarks/sliding_window.py [--device cuda] [--patch 192 192 48] [--sw_batch_size 1]
    python benchmarks/sliding_window.py --volume 512 512 200 [--spacing 1.5 1.5 2.0] [--overlap 0.5]

Without ``--volume``: patches per second of the bundle's inferer, with its weighting, stitching and probabilities, and
of the network alone on the same patches, in turns. With it: a phantom of that many voxels in 375 x 375 x 250 mm is
written, and ``inference.json`` is run on it in a process of its own, with the default task of 13 organs and random
weights: seconds from start to end, and the largest memory of the process. ``--spacing`` is what the scan is resampled
to; by default it is taken as stored.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data.utils import affine_to_spacing
from timing import interleaved_times

from pgl_ext.segmentation.inferers import FlipInferer, VolumeInferer
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.phantom import generate_case
from pgl_ext.weights import ModelRecord, network_of

CONFIG = Path(__file__).resolve().parents[1] / "bundles" / "pgl_segmentation" / "configs" / "inference.json"
RECORD = ModelRecord.load_or_default("absent.pt", CONFIG.with_name("metadata.json"))  # the bundle's defaults


def patches_of(inferer: FlipInferer, volume: torch.Tensor) -> list[torch.Tensor]:
    """The batches of patches that the inferer gives to the network."""
    batches = []

    def record(patches: torch.Tensor) -> torch.Tensor:
        batches.append(patches.clone())
        return patches.new_zeros(len(patches), inferer.task.out_channels, *patches.shape[2:])

    inferer(volume, record)
    return batches


def against_the_network(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    task = SegmentationTask(**RECORD.task)
    network = network_of(RECORD).to(device).eval()
    inferer = FlipInferer(VolumeInferer(args.patch, args.sw_batch_size, args.overlap), task)
    size = [2 * args.patch[0], 2 * args.patch[1], args.patch[2]]
    volume = torch.randn(1, 1, *size, device=device)
    batches = patches_of(inferer, volume)
    count = sum(map(len, batches))

    def timed(run):
        def call() -> None:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return call

    times = interleaved_times(
        {
            "network": timed(lambda: [network(batch) for batch in batches]),
            "inferer": timed(lambda: inferer(volume, network)),
        },
        args.repeats,
    )
    print(f"{count} patches of {tuple(args.patch)}, {args.sw_batch_size} at a time, {device}, {_threads()}")
    speeds = {name: 1e3 * count / np.median(t) for name, t in times.items()}
    for name, speed in speeds.items():
        print(f"{name:<10}{speed:>10.3f} patches/s")
    print(f"{'ratio':<10}{speeds['inferer'] / speeds['network']:>10.3f}")


def end_to_end(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scan, model, out = Path(folder) / "scan.nii.gz", Path(folder) / "model.pt", Path(folder) / "out"
        image, _, affine = generate_case(0, tuple(args.volume))
        nib.save(nib.Nifti1Image(image, affine), scan)
        del image
        stored = " x ".join(f"{length:.2f}" for length in affine_to_spacing(affine))
        torch.save(network_of(RECORD).state_dict(), model)
        settings = {
            "dataset_dir": scan,
            "model_path": model,
            "output_dir": out,
            "device": args.device,
            "overlap": args.overlap,
            "sw_batch_size": args.sw_batch_size,
            "patch_size": args.patch,
            "amp": args.amp,
            **({"spacing": args.spacing} if args.spacing else {}),
        }
        seconds = _run_bundle(settings)
        written = {path.name: round(path.stat().st_size / 2**20, 2) for path in sorted(out.iterdir())}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    spacing = "as stored" if args.spacing is None else f"resampled to {args.spacing} mm"
    print(f"{tuple(args.volume)} voxels of {stored} mm, {spacing}, patches of {tuple(args.patch)}")
    print(f"overlap {args.overlap}, 14 classes, {args.device}, {_threads()}")
    print(f"end to end   {seconds:8.1f} s\npeak memory  {peak:8.2f} GiB\nMiB written: {json.dumps(written)}")


def _run_bundle(settings: dict[str, object]) -> float:
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(CONFIG)]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _threads() -> str:
    return f"{torch.get_num_threads()} threads"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volume", type=int, nargs=3, help="voxels of the scan to run end to end")
    parser.add_argument("--spacing", type=float, nargs=3, help="mm that it is resampled to; default: as stored")
    parser.add_argument("--patch", type=int, nargs=3, default=RECORD.input.patch_size)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--sw_batch_size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    end_to_end(args) if args.volume else against_the_network(args)


if __name__ == "__main__":
    main()
