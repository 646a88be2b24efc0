"""Pre-training, fine-tunings from random and from pre-trained weights, and their evaluation, within BUDGET seconds."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from archives import unpack
from runner import Job, elapsed, run, run_all, save, say, table
from settings import (
    AMP,
    BUDGET,
    CORES,
    DATA,
    EVAL_SECONDS,
    FT_BATCH,
    FT_EXTRA,
    FT_JOBS,
    FT_LR,
    FT_SECONDS,
    FT_VALIDATIONS,
    FT_WORKERS,
    KIT,
    METHODS,
    OUT,
    PATCH,
    PRE_BATCH,
    PRE_EXTRA,
    PRE_LR,
    PRE_MICRO,
    PRE_MOMENTUM,
    PRE_PATCHES,
    PRE_SECONDS,
    PRE_VALIDATION,
    PRE_WORKERS,
    PRETRAIN,
    PY,
    RUNS,
    SEGMENT,
    SPACING,
    TINY,
    VIEW,
    WORK,
    configs,
    limit,
    setting,
)

BUNDLE = ["-m", "monai.bundle", "run"]
END = BUDGET - (0 if TINY else 8)
NEVER = 100_000  # epochs
PAPER_VIEW = 96 * 96 * 16  # voxels
LIMIT_ON_CPU = 900  # seconds


# --- commands -------------------------------------------------------------------------------------------------------


def options(**settings: object) -> list[object]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('__', '#')}", value)]


def whole(epochs: int, validations: int) -> tuple[int, int]:
    """Epochs, and their interval between validations: the last one is validated too."""
    interval = max(1, round(epochs / validations))
    return interval * max(1, round(epochs / interval)), interval


def pretraining(method: str, epochs: int, out: Path, precision: str, **changes: object) -> list[object]:
    """The command of a pre-training."""
    epochs, interval = whole(epochs, 5)
    overlays = [] if method == "PGL" else [f"methods/{method}.yaml"]
    settings = {
        "data_list_file_path": data_folder("ssl") / "dataset.json",
        "spacing": SPACING,
        "view_size": VIEW,
        "patches_per_volume": PRE_PATCHES,
        "batch_size": PRE_BATCH,
        "micro_batch_size": PRE_MICRO,
        "max_epochs": epochs,
        "warmup_epochs": max(1, epochs // 20),
        "lr": PRE_LR,
        "base_momentum": PRE_MOMENTUM,
        "validation_fraction": PRE_VALIDATION,
        "val_interval": interval,
        "validate__pairs_per_volume": 24,
        "num_workers": PRE_WORKERS,
        "cache_dir": WORK / "cache_pre",
    }
    shared = common(out, precision, picture_interval=NEVER)
    files = configs(PRETRAIN, *overlays)
    return [*BUNDLE, "training", "--config_file", files, *options(**{**settings, **shared, **changes}), *PRE_EXTRA]


def steps_per_epoch(labels: int) -> tuple[int, int]:
    """Patches of each case, some 200 per epoch in whole batches, and the optimiser steps that they make."""
    training = labels - max(1, round(0.2 * labels)) if labels > 1 else 1
    patches = 8 if TINY else FT_BATCH * round(200 / FT_BATCH / training + 0.49)
    return patches, training * patches // FT_BATCH


def fine_tuning(
    labels: int, seed: int, epochs: int, out: Path, precision: str, encoder: Path | None = None, **changes: object
) -> list[object]:
    """The command of a fine-tuning."""
    epochs, interval = whole(epochs, FT_VALIDATIONS)
    settings = {
        "data_list_file_path": data_folder("seg") / "dataset.json",
        "spacing": SPACING,
        "patch_size": PATCH,
        "labelled_cases": labels,
        "seed": seed,
        "batch_size": FT_BATCH,
        "lr": FT_LR,
        "max_epochs": epochs,
        "patches_per_case": steps_per_epoch(labels)[0],
        "val_interval": interval,
        "overlap": 0.25,
        "patience": "$None",
        "num_workers": FT_WORKERS,
        "cache_dir": WORK / "cache_seg",
    }
    start = {} if encoder is None else {"pretrained_encoder": encoder}
    shared = common(out, precision, picture_interval=1000)
    files = configs(SEGMENT, "tasks/openkbp.yaml")
    arguments = options(**{**settings, **start, **shared, **changes})
    return [*BUNDLE, "training", "--config_file", files, *arguments, *FT_EXTRA]


def common(out: Path, precision: str, **settings: object) -> dict[str, object]:
    return {"output_dir": out, "checkpoint_interval": NEVER, "overwrite": "true", "amp_dtype": precision, **settings}


def evaluation(out: Path) -> Job:
    """The running evaluation of a fine-tuning."""
    tested = {"data_list_file_path": data_folder("seg") / "dataset.json", "data_list_key": "validation"}
    places = {"model_path": out / "models" / "model.pt", "output_dir": out / "evaluation"}
    command = [*BUNDLE, "evaluating", "--config_file", f"{SEGMENT}/evaluate.json", *options(**tested, **places)]
    return Job(f"eval_{out.name}", command, limit(max(15, END - elapsed()), LIMIT_ON_CPU))


# --- what is known before -------------------------------------------------------------------------------------------


def data_folder(name: str) -> Path:
    """The folder of a data set: given as such, or unpacked."""
    given = Path(os.environ.get(name.upper(), DATA / name))
    return given if given.is_dir() else DATA / name


def unpack_archives() -> None:
    for name in ("ssl", "seg"):
        given = Path(os.environ.get(name.upper(), ""))
        if given.is_file():
            unpack(given, DATA / name)
        if not (data_folder(name) / "dataset.json").is_file():
            raise FileNotFoundError(f"{name.upper()} names no folder with a dataset.json and no archive of one")


def measured() -> list[dict]:
    """The benchmark's variants that the bundle can be run with as it is."""
    try:
        results = json.loads((WORK / "speed.json").read_text()).values()
    except (OSError, ValueError):
        return []
    changed = ("flat_batch_norm", "compile")
    needed = ("channels_last", "cudnn_benchmark", "deterministic")
    return [r for r in results if not any(r[key] for key in changed) and all(r[key] for key in needed)]


def choose_precision() -> str:
    """float16, whose batch norm is cuDNN's, where the benchmark found it a tenth faster; for every method alike."""
    speeds = {r["amp_dtype"]: r["pairs_per_s"] for r in measured() if r["micro_batch_size"] == 64}
    faster = speeds.get("float16", 0) > 1.1 * speeds.get("bfloat16", math.inf)
    chosen = AMP if AMP != "auto" else "float16" if faster else "bfloat16"
    say(f"precision {chosen} (pairs/s by the benchmark: {speeds})")
    return chosen


def benchmark_speed(precision: str) -> float | None:
    """Pairs per second that the benchmark promises at this view size."""
    speeds = {r["micro_batch_size"]: r["pairs_per_s"] for r in measured() if r["amp_dtype"] == precision}
    cost = math.prod(json.loads(VIEW)) / PAPER_VIEW
    return 0.95 * speeds[PRE_MICRO] / cost if PRE_MICRO in speeds else None


def column(path: Path, name: str) -> list[float]:
    """The values of a column of a metrics file, none where there is no file."""
    try:
        with open(path, newline="") as file:
            return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
    except OSError:
        return []


def speeds(precision: str) -> tuple[float, float]:
    """Pairs and patches per second, of one epoch of each training; they make the caches too."""
    labels = max(int(entry.split(":")[0]) for entry in RUNS)
    workers = {"cache__num_workers": 0 if TINY else max(1, min(10, CORES - 4))}
    short = {"val_interval": 1000, "log_interval": 1}
    commands = {
        "probe_pre": pretraining("PGL", 1, WORK / "probe_pre", precision, **short),
        "probe_ft": fine_tuning(labels, 0, 1, WORK / "probe_ft", precision, **short, **workers),
    }
    codes = run_all([Job(name, command, limit(150, 600)) for name, command in commands.items()])
    save()
    # The fastest: validations, and the other probe, slow some down.
    found = [
        max(column(WORK / name / "metrics.csv", key), default=0.0)
        for name, key in (("probe_pre", "pairs_per_s"), ("probe_ft", "patches_per_s"))
    ]
    pairs = setting("PAIRS_PER_S", 0.0) or benchmark_speed(precision) or found[0] or 300.0
    patches = setting("PATCHES_PER_S", 0.0) or found[1] or 60.0
    say(f"speeds for the plan: {pairs:.0f} pairs/s, {patches:.0f} patches/s (probes ended {codes})")
    return pairs, patches


# --- runs -----------------------------------------------------------------------------------------------------------


def pretrain_all(pairs: float, precision: str) -> dict[str, Path]:
    """Pre-train every method; what is not left for it is taken from the fine-tunings."""
    encoders: dict[str, Path] = {}
    left = END - elapsed() - EVAL_SECONDS - FT_SECONDS
    seconds = max(5.0, min(PRE_SECONDS, left - 25) / len(METHODS))
    draws = round(165 * (1 - float(PRE_VALIDATION))) * PRE_PATCHES
    epochs = 2 if TINY else max(2, int(seconds * pairs / draws))
    for number, method in enumerate(METHODS):
        out = WORK / f"pre_{method}"
        say(f"pre-training {method}: {epochs} epochs, {epochs * draws // PRE_BATCH} steps, for {seconds:.0f} s")
        share = (END - elapsed() - EVAL_SECONDS - 60) / (len(METHODS) - number)
        run(f"pre_{method}", pretraining(method, epochs, out, precision), limit(max(60, share), LIMIT_ON_CPU))
        encoder = out / "models" / "pgl_encoder.pt"
        if encoder.is_file():
            encoders[method] = encoder
        show_retrieval(method, out)
        save()
    return encoders


def fine_tune_all(encoders: dict[str, Path], patches: float, precision: str) -> None:
    """Fine-tune from random and from pre-trained weights side by side; as each ends, evaluate it."""
    starts: dict[str, Path | None] = {"random": None, **encoders}
    wanted = [tuple(map(int, entry.split(":"))) for entry in RUNS]
    seconds = min(FT_SECONDS, END - elapsed() - EVAL_SECONDS)
    planned = max(10, int((seconds - 20) * patches / FT_BATCH / (len(wanted) * len(starts))))
    steps = setting("FT_STEPS", 0) or (4 if TINY else planned)
    say(f"fine-tunings: {len(wanted)} x {len(starts)}, {steps} steps of {FT_BATCH} each, {FT_JOBS} at a time")
    queue = [(labels, seed, name) for labels, seed in wanted for name in starts]
    running: list[tuple[Job, Path]] = []
    evaluating: list[Job] = []
    while queue or running or evaluating:
        left = END - EVAL_SECONDS - elapsed()
        if queue and not running and left <= 15 and not TINY:
            say(f"no time left for {queue}")
            queue = []
        while queue and len(running) < FT_JOBS and (left > 15 or TINY):
            labels, seed, name = queue.pop(0)
            out = WORK / f"ft_{labels}_{seed}_{name}"
            epochs = max(1, round(steps / steps_per_epoch(labels)[1]))
            command = fine_tuning(labels, seed, epochs, out, precision, starts[name])
            running.append((Job(out.name, command, limit(left + 20, LIMIT_ON_CPU)), out))
        for job, out in [pair for pair in running if pair[0].poll() is not None]:
            running.remove((job, out))
            job.wait()
            if (out / "models" / "model.pt").is_file():
                evaluating.append(evaluation(out))
        for job in [job for job in evaluating if job.poll() is not None]:
            evaluating.remove(job)
            job.wait()
            write_results()
            save()
        time.sleep(0.3)


# --- results --------------------------------------------------------------------------------------------------------


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def show_retrieval(method: str, out: Path) -> None:
    """The validations of a pre-training."""
    names = ("step", "val_loss", "val_feature_std", "val_retrieval_top1", "val_retrieval_chance")
    try:
        with open(out / "metrics.csv", newline="") as file:
            rows = [[row[name] for name in names] for row in csv.DictReader(file) if row["val_loss"]]
    except OSError:
        return
    fastest = max(column(out / "metrics.csv", "pairs_per_s"), default=math.nan)
    table(f"{method}, up to {fastest:.0f} pairs/s\n\n" + markdown(names, rows))


def case_means(path: Path) -> dict[str, np.ndarray]:
    """By case its mean Dice and HD95 (mm) over the organs."""
    scores: dict[str, list] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            values = [float(row[name] or "nan") for name in ("dice", "hd95_mm")]
            scores.setdefault(row["case"], []).append(values)
    return {case: np.nanmean(values, axis=0) for case, values in scores.items()}


def write_results() -> None:
    """Dice and HD95 of every finished run, and paired differences to random weights over the test cases."""
    paths = sorted(WORK.glob("ft_*/evaluation/cases.csv"))
    scores = {tuple(path.parents[1].name.split("_", 3)[1:]): case_means(path) for path in paths}
    rows = []
    for path, ((labels, seed, name), means) in zip(paths, scores.items(), strict=True):
        dice, hd95 = np.array(list(means.values())).mean(axis=0)
        reference = scores.get((labels, seed, "random"))
        gain = _paired_gain(means, reference) if name != "random" and reference else ("", "")
        metrics = path.parents[1] / "metrics.csv"
        best = max(column(metrics, "val_mean_dice"), default=math.nan)
        steps = max(column(metrics, "step"), default=0)
        rows.append([labels, seed, name, f"{dice:.4f}", f"{hd95:.1f}", *gain, f"{best:.4f}", int(steps)])
    head = ("cases", "seed", "weights", "Dice", "HD95 mm", "minus random", "95 % interval", "best validation", "steps")
    text = markdown(head, rows)
    (OUT / "results.md").write_text(text + "\n")
    print(text, flush=True)


def _paired_gain(means: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> tuple[str, str]:
    gains = np.array([means[case][0] - reference[case][0] for case in means])
    resampled = np.random.default_rng(0).choice(gains, (4000, len(gains))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return f"{gains.mean():+.4f}", f"{low:+.4f} to {high:+.4f}"


def main() -> None:
    precision = choose_precision()
    unpack_archives()
    pairs, patches = speeds(precision)
    encoders = pretrain_all(pairs, precision)
    fine_tune_all(encoders, patches, precision)
    write_results()
    if encoders and (END - elapsed() > 12 or TINY):
        command = [PY, KIT / "encoder8.py", "pack", next(iter(encoders.values())), OUT]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        say("encoder: " + (done.stdout + done.stderr)[-300:].strip())
