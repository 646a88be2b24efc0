"""nnU-Net, trained from random weights on a CPU for a given time, and its Dice on test scans.

    python -m venv NNUNET
    NNUNET/bin/python -m pip install torch==2.13.0
    NNUNET/bin/python -m pip install nnunetv2==2.8.1
    NNUNET/bin/python benchmarks/nnunet.py DATA_LIST --out FOLDER --minutes 60 [--threads 1] [--test_key validation]

It needs an environment with ``nnunetv2``, and nothing of this project. DATA_LIST is a Decathlon-style list with
``training``, the test scans under ``--test_key``, ``modality`` and ``labels``; paths are relative to ``--dataset_dir``,
by default the list's folder.

nnU-Net plans and preprocesses as it does by default, and trains its configuration ``3d_fullres`` on all training cases
(fold "all"), with its own augmentation, loss, optimiser and schedule, but for the length: the learning rate falls to 0
over ``--iterations``, or over as many as fit into ``--minutes``, which ten of them at the start tell. There is no
validation: in this fold it would be on training cases. A checkpoint is kept every ``--keep_minutes``; a run that was
stopped goes on from the last. After the end, every one that was kept segments the test scans, without test-time
mirroring and with it.

In ``--out``: ``training.csv`` (loss, processor time), ``cases.csv`` (Dice of each case and structure, on the grid of
the scan's file) and ``curve.csv`` (its means). Dice is NaN where a structure is neither in the reference nor predicted.
Minutes are processor time of training alone, summed over threads; what planning and preprocessing take is printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints,
    plan_experiments,
    preprocess_dataset,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

DATASET = "Dataset001_Benchmark"
PLANS, CONFIGURATION = "nnUNetPlans", "3d_fullres"
ENDING = ".nii.gz"


class BudgetTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a schedule of a given length and without validation; keeps checkpoints to go on from.

    ``prepare`` before use.
    """

    def prepare(self, iterations: int, iterations_per_epoch: int, keep_minutes: float, log: Path) -> None:
        """Random weights, and the schedule: nnU-Net lowers its learning rate once per epoch."""
        self.num_iterations_per_epoch = iterations_per_epoch
        self.num_epochs = iterations // iterations_per_epoch
        self.keep_minutes, self.log = keep_minutes, log
        self.initialize()

    def checkpoints(self) -> list[Path]:
        """The checkpoints that were kept, oldest first."""
        return sorted(Path(self.output_folder).glob("checkpoint_*.pth"))

    def run_training(self) -> None:
        rows = read_csv(self.log)[: self.current_epoch]
        spent = float(rows[-1]["core_minutes"]) if rows else 0.0
        kept = spent
        self.on_train_start()
        while self.current_epoch < self.num_epochs:
            start = time.process_time()
            self.on_train_epoch_start()
            steps = [self.train_step(next(self.dataloader_train)) for _ in range(self.num_iterations_per_epoch)]
            self.on_train_epoch_end(steps)
            spent += (time.process_time() - start) / 60
            iterations = (self.current_epoch + 1) * self.num_iterations_per_epoch
            loss = float(np.mean([step["loss"] for step in steps]))
            rows.append({"iterations": iterations, "core_minutes": f"{spent:.3f}", "loss": f"{loss:.4f}"})
            write_csv(self.log, rows)
            print(f"{iterations} iterations, {spent:.1f} core-minutes, loss {loss:.3f}", flush=True)
            if spent - kept >= self.keep_minutes or self.current_epoch + 1 == self.num_epochs:
                path = Path(self.output_folder) / f"checkpoint_{iterations:06d}.pth"
                self.save_checkpoint(str(path.with_suffix(".part")))
                path.with_suffix(".part").replace(path)
                kept = spent
            self.current_epoch += 1


def convert(data: Mapping, test_key: str, folder: Path, raw: Path) -> dict[str, dict[str, Path]]:
    """Lay the training cases out as nnU-Net wants them, as links; the test cases, by name."""
    cases = {
        key: {
            Path(item["image"]).name.removesuffix(ENDING): {n: folder / item[n] for n in ("image", "label")}
            for item in data[key]
        }
        for key in ("training", test_key)
    }
    for name, case in (*cases["training"].items(), *cases[test_key].items()):
        if wrong := [path for path in case.values() if not path.is_file() or not path.name.endswith(ENDING)]:
            raise ValueError(f"{name}: {wrong[0]} must be an existing {ENDING} file: convert it, or correct the list.")
    if common := cases["training"].keys() & cases[test_key].keys():
        raise ValueError(f"cases are both for training and for testing: {sorted(common)}.")
    for name, case in cases["training"].items():
        link(raw / "imagesTr" / f"{name}_0000{ENDING}", case["image"])
        link(raw / "labelsTr" / f"{name}{ENDING}", case["label"])
    description = {
        "channel_names": data["modality"],
        "labels": {name: int(value) for value, name in data["labels"].items()},
        "numTraining": len(cases["training"]),
        "file_ending": ENDING,
    }
    (raw / "dataset.json").write_text(json.dumps(description, indent=4))
    return cases[test_key]


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target.resolve())


def make_trainer(preprocessed: Path) -> BudgetTrainer:
    os.environ.update(nnUNet_n_proc_DA="0")  # augmentation in this process, so that its time is counted
    plans = json.loads((preprocessed / f"{PLANS}.json").read_text())
    plans["continue_training"] = True
    dataset = json.loads((preprocessed / "dataset.json").read_text())
    return BudgetTrainer(plans, CONFIGURATION, "all", dataset, torch.device("cpu"))


def seconds_per_iteration(trainer: BudgetTrainer, count: int = 10) -> float:
    """Processor time of an iteration, after a few that do not count."""
    trainer.prepare(1, 1, 0, Path(os.devnull))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for step in range(3 + count):
        if step == 3:
            start = time.process_time()
        trainer.train_step(next(trainer.dataloader_train))
    return (time.process_time() - start) / count


def predict(trainer: BudgetTrainer, checkpoint: Path, mirror: bool, cases: Mapping, folder: Path) -> None:
    """Segment the test scans that are not in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer.load_checkpoint(str(checkpoint))
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(use_mirroring=mirror, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    images, outputs = [[str(case["image"])] for case in cases.values()], [str(folder / name) for name in cases]
    predictor.predict_from_files_sequential(images, outputs, overwrite=False)


def score(cases: Mapping, folder: Path, labels: Mapping[str, int]) -> list[dict[str, object]]:
    """Dice of each case and structure."""
    rows = []
    for name, case in cases.items():
        maps = [nib.load(path) for path in (folder / f"{name}{ENDING}", case["label"])]
        if maps[0].shape != maps[1].shape or not np.allclose(maps[0].affine, maps[1].affine, atol=1e-3):
            raise ValueError(f"{name}: prediction and label map lie on different grids.")
        prediction, reference = (np.asarray(image.dataobj) for image in maps)
        for structure, value in labels.items():
            masks = prediction == value, reference == value
            size = masks[0].sum() + masks[1].sum()
            dice = 2 * (masks[0] & masks[1]).sum() / size if size else np.nan
            rows.append({"case": name, "structure": structure, "dice": float(dice)})
    return rows


def evaluate(trainer: BudgetTrainer, cases: Mapping, out: Path) -> None:
    """Segment and score the test scans with every checkpoint; tables in the folder."""
    minutes = {int(row["iterations"]): row["core_minutes"] for row in read_csv(out / "training.csv")}
    labels = {name: value for name, value in trainer.dataset_json["labels"].items() if value}
    scores, curve = [], []
    for checkpoint in reversed(trainer.checkpoints()):  # the last is the result
        iterations = int(checkpoint.stem.rpartition("_")[2])
        for mirroring in (False, True):
            folder = out / "predictions" / f"{iterations:06d}_{'mirroring' if mirroring else 'plain'}"
            predict(trainer, checkpoint, mirroring, cases, folder)
            point = {"iterations": iterations, "core_minutes": minutes[iterations], "mirroring": mirroring}
            rows = score(cases, folder, labels)
            scores += [{**point, **row} for row in rows]
            dice = np.array([row["dice"] for row in rows]).reshape(len(cases), len(labels))
            means = dict(zip(labels, np.nanmean(dice, axis=0), strict=True))
            means["mean"] = np.nanmean(np.nanmean(dice, axis=1))
            curve.append({**point, **{name: f"{mean:.4f}" for name, mean in means.items()}})
            print(curve[-1], flush=True)
    write_csv(out / "cases.csv", scores)
    write_csv(out / "curve.csv", curve)


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def prepare_data(preprocessed: Path, threads: int) -> None:
    """Fingerprint, plan and preprocessed training cases, as nnU-Net makes them by default."""
    start = time.perf_counter()
    os.environ.update(nnUNet_n_proc_DA="1")  # which planning takes for a number of threads
    number = int(DATASET[len("Dataset") :].partition("_")[0])
    extract_fingerprints([number], num_processes=threads)
    plan_experiments([number])
    preprocess_dataset(number, PLANS, [CONFIGURATION], [threads])
    plan = json.loads((preprocessed / f"{PLANS}.json").read_text())["configurations"][CONFIGURATION]
    print(f"planned and preprocessed in {time.perf_counter() - start:.0f} s: {json.dumps(plan)}", flush=True)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_list", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--iterations", type=int, help="length of the schedule")
    length.add_argument("--minutes", type=float, help="of processor time, instead; measured at the start")
    parser.add_argument("--iterations_per_epoch", type=int, default=5, help="between steps of the learning rate")
    parser.add_argument("--keep_minutes", type=float, default=5, help="between checkpoints that are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dataset_dir", type=Path, help="what paths of the list are relative to")
    parser.add_argument("--test_key", default="test")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    out = args.out.resolve()
    os.environ.update({f"nnUNet_{name}": str(out / name) for name in ("raw", "preprocessed", "results")})
    os.environ.update(nnUNet_compile="f")
    data = json.loads(args.data_list.read_text())
    cases = convert(data, args.test_key, args.dataset_dir or args.data_list.parent, out / "raw" / DATASET)
    preprocessed = out / "preprocessed" / DATASET
    settings = out / "settings.json"
    if not settings.exists():  # last of the preparations, so that they are complete where it is
        prepare_data(preprocessed, args.threads)
        iterations = args.iterations
        if iterations is None:
            seconds = seconds_per_iteration(make_trainer(preprocessed))
            iterations = round(60 * args.minutes / seconds)
            print(f"{seconds:.2f} s of processor time per iteration", flush=True)
        epochs = max(1, round(iterations / args.iterations_per_epoch))
        settings.write_text(json.dumps([epochs * args.iterations_per_epoch, args.iterations_per_epoch]))
    trainer = make_trainer(preprocessed)
    trainer.prepare(*json.loads(settings.read_text()), args.keep_minutes, out / "training.csv")
    if kept := trainer.checkpoints():
        trainer.load_checkpoint(str(kept[-1]))
    if trainer.current_epoch < trainer.num_epochs:
        trainer.run_training()
    evaluate(trainer, cases, out)


if __name__ == "__main__":
    main()
