"""Cross-validation: a network for each fold of the cases, and every case scored by the one that has not seen it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgl_ext.checkpoints import CheckpointFolder
from pgl_ext.code_digest import digest
from pgl_ext.evaluation.summary import AVERAGE, interval_text, number_text
from pgl_ext.files import read_json, write_json
from pgl_ext.tools.plan import Data, Plan
from pgl_ext.tools.study.configs import changed
from pgl_ext.tools.workflows import Pretrained, evaluation, fine_tuning

__all__ = ["train_folds"]

_SET_HERE = ("output_dir", "split_path", "model_path", "test_cases", "test_fold", "resume", "overwrite")
_OF_EVALUATION = ("device", "amp", "overlap", "sw_batch_size", "num_workers")


def train_folds(
    data: Data, out: Path, plan: Plan, pretrained: Pretrained | None, settings: Mapping[str, Any], folds: int
) -> list[str]:
    """Train a network for each fold, on all cases but those of the fold, and score each case by that which lacks it.

    Finished folds are not trained again, and one that was stopped goes on. Into the folder go ``fold_0``, ``fold_1``
    and so on, as fine-tuning writes them, with the cases of the fold under ``test`` in ``split.json``, and
    ``evaluation``, of all cases.

    Args:
        data: the cases.
        out: folder to write.
        plan: settings for the data.
        pretrained: weights to start from; None: random ones.
        settings: further ones of every fine-tuning, which override all others.
        folds: their number, at least 2.

    Returns:
        Sentences: what was written, and the mean Dice.

    Raises:
        SystemExit: a training or the evaluation fails, or was stopped.
        ValueError: there are fewer cases than folds, a setting is one that differs between the folds, or a finished
            fold was trained with others.
    """
    if refused := [name for name in _SET_HERE if name in settings]:
        raise ValueError(
            f"--{refused[0]} cannot be given with --folds, which sets it for each fold: leave it out. The same command "
            "goes on where it was stopped; another OUT begins anew."
        )
    if folds > len(data.items):
        raise ValueError(f"--folds is {folds}, but there are {len(data.items)} labelled cases: take fewer folds.")
    weights = {} if pretrained is None else pretrained.weights
    trained_with = {"architecture": plan.architecture, "small": plan.small, **plan.settings, **data.settings, **weights}
    trained_with["digest of the cases"] = digest(json.dumps(data.items, sort_keys=True))
    for fold in range(folds):
        folder, of_fold = out / f"fold_{fold}", {**settings, "test_fold": [fold, folds]}
        if not _is_finished(folder, {**trained_with, **of_fold}):
            print(f"{folder.name}, {fold + 1} of {folds}:", flush=True)
            resume = {"resume": True} if CheckpointFolder(folder / "checkpoints").paths() else {}
            of_all = {"cache_dir": str(out / "cache"), **of_fold, **resume}
            (out / "evaluation" / "cases.csv").unlink(missing_ok=True)  # of a network that is trained anew
            fine_tuning(data, folder, plan, pretrained, of_all).run()
            write_json(folder / "finished.json", {**trained_with, **of_fold})
    if not (out / "evaluation" / "cases.csv").is_file():
        shared = {name: settings[name] for name in _OF_EVALUATION if name in settings}
        evaluation(out, None, out / "evaluation", shared).run()
    summary = read_json(out / "evaluation" / "summary.json")
    dice = summary[AVERAGE]["dice"]
    interval = f" (95 % interval {interval_text(dice['ci95'])})" if dice["ci95"] else ""
    return [
        f"Wrote the networks of {folds} folds to {out}, and scores and pictures to {out / 'evaluation'}.",
        f"Mean Dice of all {summary['cases']} cases, each scored by the network that has not seen it: "
        f"{number_text(dice['mean'])}{interval}.",
    ]


def _is_finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a fold is; a ValueError where it was trained with other settings."""
    mark = folder / "finished.json"
    if not mark.is_file():
        return False
    before, now = read_json(mark), json.loads(json.dumps(settings))
    if differing := [f"{name} was {before.get(name)} and is {now.get(name)}" for name in changed(before, now)]:
        raise ValueError(
            f"{folder} was trained otherwise: {'; '.join(differing)}. Give another OUT, or go back to its settings."
        )
    return True
