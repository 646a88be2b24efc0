"""Whether a change of the code changed any number: every method, a fine-tuning and an evaluation, before and after.

    python benchmarks/unchanged_numbers.py --before REVISION [--methods pgl,byol]

Trains each method of pgl_pretrain, tiny and seeded, in a worktree of the revision and in this checkout, fine-tunes from
the encoder and evaluates, with one thread, and compares all weights bit for bit and all scores as text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
TINY = {"max_epochs": 2, "patches_per_volume": 2, "batch_size": 4, "hidden_channels": 32, "out_channels": 16}
FINE_TUNING = {
    "flip_prob": "[0.5, 0.5, 0.5]",
    "validation_fraction": 0.2,
    "max_epochs": 2,
    "patches_per_case": 2,
    "val_interval": 1,
    "organs": {"blob": 1, "rest": 2},
}


def write_data(folder: Path) -> Path:
    """Six small volumes with label maps, half of them of another source, and their data list."""
    entries = []
    for number in range(6):
        generator = np.random.default_rng(number)
        labels = np.zeros((70, 64, 40), dtype=np.uint8)
        labels[10 + number : 40, 20:50, 8:30] = 1
        labels[45:60, 10:40, 5:25] = 2
        voxels = (200.0 * labels + generator.normal(0, 60, labels.shape)).astype(np.float32)
        for name, array in (("image", voxels), ("label", labels)):
            nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0])), folder / f"{name}{number}.nii.gz")
        source = "first" if number < 3 else "second"
        entry = {"image": f"image{number}.nii.gz", "label": f"label{number}.nii.gz", "task": source, "group": source}
        entries.append(entry)
    path = folder / "dataset.json"
    path.write_text(json.dumps({"training": entries, "validation": entries[:2]}))
    return path


def run(tree: Path, section: str, bundle: str, configs: list[str], **settings: object) -> None:
    """Run a bundle of a checkout with its own package; only what fails is shown."""
    files = [str(tree / "bundles" / bundle / "configs" / name) for name in configs]
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", section, "--config_file", str(files), *options]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def train(tree: Path, data: Path, out: Path, method: str) -> dict[str, object]:
    """Train in one checkout; returns the tensors of encoder, decoder and model, and the scores."""
    overlay = [] if method == "pgl" else [f"methods/{method}.yaml"]
    if method == "models_genesis_original":
        overlay.insert(0, "methods/models_genesis.yaml")
    shared = {"data_list_file_path": data, "num_workers": 0}
    configs = ["train.json", "small.yaml", *overlay]
    run(tree, "training", "pgl_pretrain", configs, output_dir=out / method, validation_fraction=0.3, **shared, **TINY)
    result: dict[str, object] = {}
    for path in sorted((out / method / "models").glob("*.pt")):
        result |= {f"{path.stem} {key}": value for key, value in torch.load(path, weights_only=True).items()}
    if method == "pgl":
        tuned, encoder = out / "tuned", out / method / "models" / "pgl_encoder.pt"
        start = {"pretrained_encoder": encoder, **FINE_TUNING}
        run(tree, "training", "pgl_segmentation", ["train.json", "small.yaml"], output_dir=tuned, **shared, **start)
        model = tuned / "models" / "model.pt"
        settings = {"data_list_file_path": data, "model_path": model, "output_dir": tuned / "evaluation"}
        run(tree, "evaluating", "pgl_segmentation", ["evaluate.json"], **settings)
        result |= {f"model {key}": value for key, value in torch.load(model, weights_only=True).items()}
        result["cases.csv"] = (tuned / "evaluation" / "cases.csv").read_text()
    return result


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    same = {
        name
        for name in before.keys() & after.keys()
        if (torch.equal(before[name], after[name]) if torch.is_tensor(before[name]) else before[name] == after[name])
    }
    return sorted((before.keys() | after.keys()) - same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", required=True, help="revision to compare this checkout with")
    parser.add_argument("--methods", help="names with commas between them; default: all")
    arguments = parser.parse_args()
    overlays = sorted(path.stem for path in (ROOT / "bundles/pgl_pretrain/configs/methods").glob("*.yaml"))
    methods = arguments.methods.split(",") if arguments.methods else ["pgl", *overlays]
    with tempfile.TemporaryDirectory() as scratch:
        folder, tree = Path(scratch), Path(scratch) / "before"
        data = write_data(folder)
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, arguments.before], check=True)
        try:
            changed = 0
            for method in methods:
                before, after = (train(root, data, folder / f"out_{root.name}", method) for root in (tree, ROOT))
                names = differences(before, after)
                changed += len(names)
                print(f"{method}: {len(before)} compared, {len(names)} differ {names[:3] if names else ''}", flush=True)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    raise SystemExit(f"{changed} differ" if changed else 0)


if __name__ == "__main__":
    main()
