"""Stands in for a bundle's command in tests: trains, resumes, evaluates and fails in milliseconds.

    python stand_in.py training RUN_FOLDER SEED RESUME KEPT_STEPS
    python stand_in.py evaluating RUN_FOLDER EVALUATION_FOLDER MODEL[,MODEL]

What it "trains" is a number that every step changes, so that a step that is lost or done twice shows in the scores.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

STEPS = 8


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{os.getpid()}{path.suffix}")
    temporary.write_text(text)
    os.replace(temporary, path)


def train(folder: Path, seed: int, resume: bool, kept_steps: list[int]) -> None:
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint_*.pt"))
    if checkpoints and not resume:
        sys.exit("error: there are checkpoints already")
    step, value = json.loads(checkpoints[-1].read_text()) if resume else (0, seed)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    while step < STEPS:
        time.sleep(float(os.environ.get("STAND_IN_PAUSE", 0.05)))
        step, value = step + 1, random.Random(value + step).random()
        if (folder / "fail").exists():
            sys.exit("Traceback\nerror: the disk is on fire")
        if step in kept_steps:
            write(folder / "models" / f"model_step_{step}.pt", "weights")
            write(folder / "models" / f"model_step_{step}.json", json.dumps({"val_mean_dice": value}))
        if step % 2 == 0 or stop:
            write(folder / "checkpoints" / f"checkpoint_{step:08d}.pt", json.dumps([step, value]))
        if stop:
            sys.exit(143)
    write(folder / "models" / "pgl_encoder.pt", str(value))
    encoder = {"architecture": {"family": "resnet", "arguments": {}}, "input": {}, "steps": step, "pairs": 16 * step}
    write(folder / "models" / "pgl_encoder.json", json.dumps(encoder))
    task = {"organs": {"liver": [1]}}
    input_record = {"patch_size": [32, 32, 16]}
    model = {"task": task, "network": encoder["architecture"], "input": input_record, "val_mean_dice": value}
    write(folder / "models" / "model.json", json.dumps(model))


def evaluate(folder: Path, models: list[Path]) -> None:
    time.sleep(float(os.environ.get("STAND_IN_PAUSE", 0.05)))
    dice = [json.loads(model.with_suffix(".json").read_text())["val_mean_dice"] for model in models]
    write(folder / "summary.json", json.dumps({"average": {"dice": {"mean": dice[0]}}}))
    rows = [f"case_{case},liver,{dice[case % len(dice)] * case / 10},0.5,9.0,3.0,0.7\n" for case in range(1, 8)]
    write(folder / "cases.csv", "case,organ,dice,iou,hd_mm,hd95_mm,nsd\n" + "".join(rows))


def claim(folder: Path) -> int:
    """Hold the folder as long as this process lives, and note where another that lives does so too."""
    descriptor = os.open(folder / "running", os.O_RDWR | os.O_CREAT)
    # One that was killed may still be on its way out, which takes no time that a training would notice.
    for _ in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            time.sleep(0.01)
    (folder / "overlap").touch()
    return descriptor


def main() -> None:
    section, folder, first, second, *kept_steps = sys.argv[1:]
    claim(Path(folder))
    if section == "training":
        train(Path(folder), int(first), second == "True", json.loads(kept_steps[0]))
    else:
        evaluate(Path(first), [Path(model) for model in second.split(",")])


if __name__ == "__main__":
    main()
