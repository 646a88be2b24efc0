"""Does pre-training help? Fine-tune from random weights and from an encoder file, on few labels, over several seeds.

Every cell is a training and an evaluation with the bundle's own commands; one that is complete is not run again. All
cells of a task take the same number of optimiser steps, whatever the number of cases.

    python benchmarks/transfer.py --task openkbp --data dataset.json --encoder pgl_encoder.pt --out RUNS
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STARTS = ("random", "pgl")
CONFIGS = ROOT / "bundles" / "pgl_segmentation" / "configs"


def bundle(section: str, files: list[str], settings: dict[str, object], log: Path, jobs: int) -> None:
    """Run a section of the bundle, its output to a log."""
    # Jobs that share the cores must not each start a thread on every one.
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    names = [str(CONFIGS / name) for name in files]
    command = [sys.executable, "-m", "monai.bundle", "run", section, "--config_file", str(names)]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True, env=environment)


def run_cell(arguments: argparse.Namespace, cases: int, seed: int, name: str) -> Path:
    """Fine-tune and evaluate; returns the folder of the evaluation."""
    folder = arguments.out / f"{name}_{cases}_cases_seed_{seed}"
    evaluation = folder / "evaluation"
    if (evaluation / "cases.csv").is_file():  # written last
        return evaluation
    # As many patches for few cases as for many: of n cases, about a fifth is held out for validation.
    training_cases = cases - max(1, round(0.2 * cases))
    patches = max(1, round(arguments.patches_per_epoch / training_cases))
    settings = {
        "data_list_file_path": arguments.data,
        "output_dir": folder,
        "cache_dir": arguments.out / "cache",
        "labelled_cases": cases,
        "seed": seed,
        "patches_per_case": patches,
        "max_epochs": arguments.epochs,
        "resume": any((folder / "checkpoints").glob("*.pt")),
    }
    for setting in arguments.set:
        key, value = setting.split("=", 1)
        settings[key] = value
    if name != "random":
        settings["pretrained_encoder"] = arguments.encoder
    start = time.monotonic()
    bundle(
        "training",
        ["train.json", f"tasks/{arguments.task}.yaml", *arguments.overlay],
        settings,
        folder / "train.log",
        arguments.jobs,
    )
    evaluate = {
        "model_path": folder / "models" / "model.pt",
        "data_list_file_path": arguments.data,
        "data_list_key": arguments.test_key,
        "output_dir": evaluation,
    }
    bundle("evaluating", ["evaluate.json"], evaluate, folder / "evaluate.log", arguments.jobs)
    print(f"{folder.name}: {time.monotonic() - start:.0f} s", flush=True)
    return evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="task file of the bundle, such as openkbp")
    parser.add_argument("--data", type=Path, required=True, help="data list")
    parser.add_argument("--test_key", default="validation", help="list of the cases to evaluate on")
    parser.add_argument("--encoder", type=Path, required=True, help="encoder file of pre-training")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=[3, 7, 14, 70], help="labelled cases, validation included"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--patches_per_epoch", type=int, default=224)
    parser.add_argument("--overlay", nargs="*", default=["small.yaml"], help="further configs of the bundle")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the training")
    arguments = parser.parse_args()
    cells = list(itertools.product(arguments.cases, arguments.seeds, STARTS))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        evaluations = list(pool.map(lambda cell: run_cell(arguments, *cell), cells))
    for cases in arguments.cases:
        folders = [
            ",".join(
                str(path) for (n, _, start), path in zip(cells, evaluations, strict=True) if (n, start) == (cases, s)
            )
            for s in STARTS
        ]
        out = arguments.out / f"comparison_{cases}_cases"
        print(f"\n{cases} labelled cases, {len(arguments.seeds)} seeds, scores averaged over them", flush=True)
        command = [sys.executable, "-m", "pgl_ext", "compare", *folders, "--names", ",".join(STARTS), "--out", str(out)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
