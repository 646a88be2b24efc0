"""Does pre-training pay on a user's own cases? A study of random against pre-trained weights, and its answer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pgl_ext.evaluation.summary import AVERAGE, number_text
from pgl_ext.evaluation.verdict import LEAST_SEEDS
from pgl_ext.files import write_text
from pgl_ext.tools.plan import Data, Plan
from pgl_ext.tools.study.configs import merged_config
from pgl_ext.tools.study.efficiency import steps_to_reach
from pgl_ext.tools.study.results import Results
from pgl_ext.tools.study.run import run_study
from pgl_ext.tools.study.runs import Run, evaluation_folder, fold_folders, model_file
from pgl_ext.tools.workflows import Pretrained, fine_tuning_configs, write_plan
from pgl_ext.weights import ModelRecord, load_state, save_weights

__all__ = ["answer", "gain_study", "held_out", "run_gain"]

RANDOM, PRETRAINED = "random", "pre-trained"
_FOLDS = 3
_LEARNED = 0.05  # Dice; what has learned a structure has more
_SHARES_OF_STEPS = (0.25, 0.5, 0.75)  # after which models are kept and tested


def held_out(cases: int) -> dict[str, int]:
    """How a study tests on some labelled cases: a third is held out, at least five; of fewer than 12 each third once.

    Returns:
        The number of ``cases``, or of ``folds``.

    Raises:
        ValueError: too few would be left to train on.
    """
    if cases < 5:
        raise ValueError(f"{cases} labelled cases are too few to train on some and test on others: label at least 5.")
    return {"folds": _FOLDS} if cases < 12 else {"cases": max(5, cases // 3)}


def gain_study(
    data: Data,
    out: Path,
    plan: Plan,
    pretrained: Pretrained,
    seeds: int,
    test_cases: int | None,
    labelled_cases: int | None,
    settings: Mapping[str, Any],
) -> Path:
    """Write the study file that compares random with pre-trained weights, each with its own recipe.

    Args:
        data: labelled cases.
        out: folder of the study.
        plan: settings for the data.
        pretrained: the weights.
        seeds: of each start.
        test_cases: how many to hold out; None: see :func:`held_out`.
        labelled_cases: how many of those not held out to train on; None: all.
        settings: further ones of both.

    Returns:
        the file.
    """
    test = held_out(len(data.items)) if test_cases is None else {"cases": test_cases}
    labels = {"label_fractions": [1.0]} if "folds" in test else {"labelled_cases": [len(data.items) - test["cases"]]}
    (base, random), (_, start) = (fine_tuning_configs(plan, weights) for weights in (False, True))
    files = [*base, write_plan(plan, out)]
    config = merged_config([*files, dict(settings)])
    # Of epochs that are passes over the cases the number of steps is not known here.
    counted = config["patches_per_case"] is None
    steps = int(config["max_epochs"]) * int(config["steps_per_epoch"])
    kept = [round(share * steps) for share in _SHARES_OF_STEPS] if counted else []
    content = {
        "title": "Does pre-training pay here?",
        "fine_tuning": {
            "configs": files,
            "random_start": random,
            "pretrained_start": start,
            "settings": {**data.settings, **settings, "kept_steps": kept},
        },
        "test": test,
        "methods": {
            RANDOM: {"encoder": None},
            PRETRAINED: {"encoder": str(pretrained.encoder), "decoder": str(pretrained.decoder or "") or False},
        },
        "reference": RANDOM,
        **(labels if labelled_cases is None else {"labelled_cases": [labelled_cases]}),
        "seeds": list(range(seeds)),
    }
    write_text(out / "study.yaml", yaml.safe_dump(content, sort_keys=False))
    return out / "study.yaml"


def answer(results: Results) -> str:
    """In one sentence, what pre-training gives; Dice in points of 100."""
    (labels,) = results.study.labels
    (row,) = results.select(labels=labels, metric="dice", organ=AVERAGE, method=PRETRAINED)
    difference, low, high = (100 * row[name] for name in ("difference", "ci95_low", "ci95_high"))
    where = f"On {row['paired_cases']} {'cross-validated' if results.study.folds else 'test'} cases"
    interval = f"95 % interval {number_text(low, 1)} to {number_text(high, 1)}, {row['paired_seeds']} seeds"
    if row["paired_seeds"] < LEAST_SEEDS:
        seeds = "one seed" if row["paired_seeds"] == 1 else f"{row['paired_seeds']} seeds"
        return (
            f"{where}, pre-training gave {difference:+.1f} Dice with {seeds}, which is no verdict: single trainings "
            "differ by their seed; three seeds or more tell."
        )
    if low <= 0 <= high:
        return (
            f"{where}, no difference can be told ({interval}): more than {number_text(high, 1, '+')} Dice is unlikely."
        )
    steps = steps_to_reach(results, labels, PRETRAINED)
    end = max(noted["steps"] for run, noted in results.finished if not run.is_pretraining)
    share = (
        f" and reaches random's final Dice after {100 * steps / end:.0f} % of its steps" if low > 0 and steps else ""
    )
    return f"{where}, pre-training gives {difference:+.1f} Dice ({interval}){share}."


def run_gain(file: Path, out: Path, jobs: int | None = None) -> list[str]:
    """Run what is not finished of a gain's study, and choose the model for ``pgl segment``.

    Args:
        file: from :func:`gain_study`.
        out: folder of the study.
        jobs: runs at a time; None: one on each GPU, or one.

    Returns:
        Sentences: what was written, and the answer.

    Raises:
        ChildProcessError: a run failed.
    """
    _, results = run_study(file, out, jobs=jobs)
    study = results.study
    best, why = _best_run(results)
    folders = fold_folders(Path(), study.folds) if study.folds else [Path()]
    for folder in folders:
        model = model_file(best.folder / folder)
        save_weights(load_state(model), model_file(out / folder), ModelRecord.load(model))
    if study.folds:
        shutil.copytree(evaluation_folder(best.folder), evaluation_folder(out), dirs_exist_ok=True)
    models = f"the {study.folds} networks in {out}" if study.folds else model_file(out)
    written = [f"Tables, curves and report: {out / 'report.html'}.", f"Model for 'pgl segment': {models}, {why}."]
    if max(noted["mean_dice"] or 0 for run, noted in results.finished if not run.is_pretraining) < _LEARNED:
        written.append(
            "No network has learned to segment so far: train for longer, with --max_epochs, in another folder."
        )
    return [*written, *([study.note] * bool(study.note)), answer(results)]


def _best_run(results: Results) -> tuple[Run, str]:
    """The run with the best validation; where no case was left for it, a pre-trained one."""
    runs = [(noted["val_mean_dice"], run) for run, noted in results.finished]
    runs = [(dice, run) for dice, run in runs if run.method == PRETRAINED or dice is not None]
    dice, run = max(runs, key=lambda entry: -1.0 if entry[0] is None else entry[0])
    why = "no case was held out to choose by" if dice is None else f"the best on validation cases (Dice {dice:.3f})"
    return run, f"{run.method}, seed {run.seed}: {why}"
