"""What it takes to start on many scans: time and memory of the start-up scan, by itself.

    python benchmarks/startup.py [--scans 1000 10000]

The scans are tiny (16 voxels along each axis), in a data list, and links to a hundred files. Each start is a process of
its own, as a training's: `cold` fills the cache, `warm` finds it. `preprocessing` is what reading and resampling take
without a cache; the rest of a cold start is its own, as is all of a warm one.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

FILES, SAMPLE = 100, 500


def make(root: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = root / f"scan_{number:06}.nii"
        if number < FILES:
            nib.save(nib.Nifti1Image(rng.normal(0, 200, (16, 16, 16)).astype(np.int16), np.diag([2, 2, 2, 1])), path)
        else:
            path.symlink_to(root / f"scan_{number % FILES:06}.nii")
    entries = [{"image": f"scan_{number:06}.nii"} for number in range(count)]
    (root / "dataset.json").write_text(json.dumps({"training": entries}))


def start(root: Path, kind: str) -> dict[str, float]:
    """CPU seconds and GiB of one start in this process."""
    from pgl_ext.data.cache import VolumeCache
    from pgl_ext.data.prepare import prepare_volumes
    from pgl_ext.transforms import preprocessing

    logging.disable(logging.WARNING)
    steps = preprocessing("image", spacing=(2.0, 2.0, 2.0), hu_window=(-1024, 325))
    begin = time.process_time()
    if kind == "preprocessing":
        for number in range(SAMPLE):
            steps({"image": str(root / f"scan_{number:06}.nii")})
    else:
        prepare_volumes(VolumeCache(root / "cache", steps), data_list_file_path=str(root / "dataset.json"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": time.process_time() - begin, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(Path(arguments.start[0]), arguments.start[1])))
        return
    print("| scans | start | CPU s | ms per scan | memory, GiB |\n|---|---|---|---|---|")
    for count in arguments.scans:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count)
            for kind in ("preprocessing", "cold", "warm"):
                command = [sys.executable, __file__, "--start", folder, kind]
                lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
                found = json.loads(lines[-1])
                each = 1e3 * found["seconds"] / (SAMPLE if kind == "preprocessing" else count)
                total = f"{found['seconds']:.1f}" if kind != "preprocessing" else ""
                print(f"| {count} | {kind} | {total} | {each:.2f} | {found['memory']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
