"""The commands of a study's methods, from its file: pre-training, fine-tuning and evaluation, of any seed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgl_ext.code_digest import digest
from pgl_ext.data.datalist import item_name, labelled_items
from pgl_ext.data.find import find_cases
from pgl_ext.data.split import split_cases
from pgl_ext.files import write_text
from pgl_ext.settings import flat_entries
from pgl_ext.tools.bundles import config_path
from pgl_ext.tools.study.configs import Command, changed
from pgl_ext.tools.study.runs import Rates

__all__ = [
    "absolute",
    "cases_of",
    "fine_tuning_commands",
    "pretraining_commands",
    "rates_to_choose",
    "segmentation_commands",
    "settings_of_labels",
]

_SET_BY_STUDY = (
    "output_dir", "cache_dir", "seed", "resume", "pretrained_encoder", "pretrained_decoder", "model_path",
    "labelled_cases", "label_fraction", "split_seed", "test_cases", "test_fold",
)  # fmt: skip
# What all methods share, so that they differ by the method alone; with where it is used, lest it be set there.
_SHARED_IN_PRETRAINING = (
    "dataset_dir", "data_list_file_path", "data_list_key", "validation_fraction",
    "max_epochs", "batch_size", "micro_batch_size", "patches_per_volume", "view_size", "encoder", "channel_names",
    "volumes#dataset_dir", "volumes#data_list_file_path", "volumes#data_list_key", "volumes#validation_fraction",
    "train#sampler", "train#trainer#max_epochs",
)  # fmt: skip
_SHARED_IN_FINE_TUNING = (
    "dataset_dir", "data_list_file_path", "data_list_key", "annotated_key", "validation_fraction", "cases",
    "organs", "background_values", "multi_label", "ignore_label", "task", "channel_names", "hu_window", "spacing",
    "encoder", "network_def",
    "max_epochs", "steps_per_epoch", "patches_per_case", "batch_size", "micro_batch_size", "patch_size",
    "train#sampler", "train#trainer#max_epochs", "train#preprocessing#transforms#0#patch_size",
    "patience", "kept_steps", "val_interval", "overlap", "validate",
)  # fmt: skip
_LIST_SETTINGS = ("data_list_file_path", "dataset_dir", "data_list_key", "annotated_key")
# What cached volumes depend on: the cache wants a folder for each preprocessing.
_CACHED_WITH = (
    "volume_preprocessing", "case_preprocessing", "hu_window", "spacing", "organs", "background_values", "ignore_label",
    "channel_names", "resample_channels",
)  # fmt: skip


def _command(entry: Mapping[str, Any], place: str, section: str, folder: Path) -> Command:
    """The command that a part of the study file describes."""
    settings = entry["settings"]
    refused = [name for name in settings if name in _SET_BY_STUDY]
    if refused:
        raise ValueError(f"{place} sets {refused}, which the study sets itself: remove them.")
    paths = {name: absolute(settings[name]) for name in _LIST_SETTINGS[:2] if name in settings}
    return Command(section, (*(config_path(name, folder) for name in entry["configs"]), {**settings, **paths}))


def absolute(path: str | Sequence[str] | None) -> str | list[str] | None:
    """A path, or several, so that it does not matter where a command is run."""
    if path is None or isinstance(path, str):
        return path and os.path.abspath(os.path.expanduser(path))
    return [absolute(part) for part in path]


def _with_cache(command: Command, prefix: Path) -> Command:
    config = command.config()
    preprocessing = json.dumps([config.get(name) for name in _CACHED_WITH], sort_keys=True)
    return command.with_settings(cache_dir=f"{prefix}_{digest(preprocessing)[:8]}")


def _check_shared(method: str, part: str, shared: Sequence[str], base: Command, command: Command) -> None:
    before, after = (
        {id_: value for name in shared for id_, value in flat_entries(config.get(name), name, lists=True).items()}
        for config in (base.config(), command.config())
    )
    changes = [f"{id_} from {before.get(id_)} to {after.get(id_)}" for id_ in changed(before, after)]
    if changes:
        raise ValueError(
            f"method {method!r} changes {'; '.join(changes)}: all methods are compared on the same data with the same "
            f"number of pairs or patches. Set it under {part}, for all of them."
        )


# --- pre-training ---------------------------------------------------------------------------------------------------


def pretraining_commands(content: Mapping[str, Any], folder: Path, bundles: Path) -> dict[str, Command]:
    """The pre-training command of each method that is pre-trained.

    Args:
        content: entries of the study file.
        folder: of the pre-trainings.
        bundles: folder of the bundles.
    """
    configs = bundles / "pgl_pretrain" / "configs"
    base = _command(content["pretraining"], "pretraining", "training", configs)
    commands = {}
    for name, entry in content["methods"].items():
        if "encoder" not in entry:
            layers = _command(entry, f"method {name!r}", "training", configs).layers
            commands[name] = _with_cache(Command("training", base.layers + layers), folder / "cache" / "pretraining")
            _check_shared(name, "pretraining", _SHARED_IN_PRETRAINING, base, commands[name])
        elif entry["configs"] or entry["settings"] or not isinstance(entry["decoder"] or "", str):
            raise ValueError(
                f"method {name!r} has an encoder and is not pre-trained: besides it can have fine_tuning, and as "
                "decoder a file."
            )
    if commands:  # all have the scans of the base
        _check_outside(base, folder)
    return commands


def _check_outside(command: Command, folder: Path) -> None:
    config = command.config()
    scans = None if config["data_list_file_path"] else config["dataset_dir"]
    if scans and folder.is_relative_to(scans):
        raise ValueError(
            f"the study's folder {folder} lies within the scans to pre-train on, {scans}, and what it writes would be "
            "taken for further scans: give an --out elsewhere."
        )


# --- fine-tuning and evaluation -------------------------------------------------------------------------------------


def segmentation_commands(
    content: Mapping[str, Any], folder: Path, bundles: Path
) -> tuple[Command, Command, list[dict[str, Any]]]:
    """What the fine-tunings of all methods share, the evaluation, and the cases that are tested.

    In a cross-validation the former is that of the first fold, and all cases are tested.

    Args:
        content: entries of the study file.
        folder: of the study.
        bundles: folder of the bundles.

    Raises:
        ValueError: cases are both labelled and for testing, or there is no data list.
    """
    configs = bundles / "pgl_segmentation" / "configs"
    fine_tuning = _command(content["fine_tuning"], "fine_tuning", "training", configs)
    evaluation = _command(content["test"], "test", "evaluating", configs)
    count, folds = content["test"]["cases"], content["test"]["folds"]
    ways = {
        "cases, to hold out of the labelled ones": count,
        "folds, each of them to hold out once": folds,
        "a data_list_file_path under settings": content["test"]["settings"].get("data_list_file_path"),
    }
    if len(given := [name for name, value in ways.items() if value is not None]) > 1:
        raise ValueError(f"test has both {', and '.join(given)}: remove one of them.")
    if count is not None:
        fine_tuning, evaluation = _hold_out(fine_tuning, evaluation, count, folder)
    if "annotated_key" not in content["test"]["settings"]:
        evaluation = evaluation.with_settings(annotated_key=fine_tuning.config()["annotated_key"])
    cases = cases_of(fine_tuning, "fine_tuning")
    if folds is not None:
        return fine_tuning.with_settings(test_fold=[0, folds]), evaluation, cases
    test = cases_of(evaluation, "test")
    both = {item_name(case) for case in cases} & {item_name(case) for case in test}
    if both:
        raise ValueError(
            f"{len(both)} test cases are among the labelled ones, such as {min(both)}: give another list or "
            "data_list_key under test, or a number of cases to hold out (test: cases)."
        )
    return fine_tuning, evaluation, test


def fine_tuning_commands(content: Mapping[str, Any], base: Command, folder: Path, bundles: Path) -> dict[str, Command]:
    """The fine-tuning command of each method, of any number of labels.

    After the configs of all follow those of its start, from random or from pre-trained weights, then the settings of
    all, then what the method has for itself.

    Args:
        content: entries of the study file.
        base: what all share.
        folder: of the study.
        bundles: folder of the bundles.

    Raises:
        ValueError: a method differs in what all must share, such as cases and number of steps.
    """
    configs, part = bundles / "pgl_segmentation" / "configs", content["fine_tuning"]
    commands = {}
    for name, entry in content["methods"].items():
        start = part["random_start" if entry.get("encoder", "") is None else "pretrained_start"]
        *files, settings = base.layers
        own = _command(entry["fine_tuning"], f"fine_tuning of method {name!r}", "training", configs).layers
        layers = (*files, *(config_path(file, configs) for file in start), settings, *own)
        commands[name] = _with_cache(Command("training", layers), folder / "cache" / "fine_tuning")
        _check_shared(name, "fine_tuning", _SHARED_IN_FINE_TUNING, base, commands[name])
    return commands


def settings_of_labels(content: Mapping[str, Any], base: Command, labels: float) -> tuple[dict[str, Any], int]:
    """The settings of fine-tuning with a number (int) or fraction (float) of labelled cases.

    Returns:
        Them, and how many of the cases are for validation.
    """
    config = base.config()
    settings = {"labelled_cases": None, "label_fraction": 1.0}
    settings["labelled_cases" if isinstance(labels, int) else "label_fraction"] = labels
    given = {name: config[name] for name in ("validation_fraction", "test_fold")}
    split = split_cases(cases_of(base, "fine_tuning"), **given, **settings)
    patches = content["fine_tuning"]["patches_per_epoch"]
    if patches is not None:
        settings["patches_per_case"] = max(1, round(patches / len(split["training"])))
    return {"test_cases": 0, **settings}, len(split["validation"])


def cases_of(command: Command, place: str) -> list[dict]:
    """The cases that fine-tunings draw theirs from (place ``"fine_tuning"``), or that evaluations are on (``"test"``).

    Raises:
        ValueError: the settings name none.
    """
    config = command.config()
    if place == "fine_tuning" and config["dataset_dir"] and not config["data_list_file_path"]:
        return find_cases(config["dataset_dir"], config["channel_names"])
    if not config["data_list_file_path"]:
        raise ValueError(
            f"{place} has no data_list_file_path: set it under {place}: settings, to a JSON list of image and label of "
            "each case."
        )
    return labelled_items(*(config[name] for name in _LIST_SETTINGS))


def _hold_out(fine_tuning: Command, evaluation: Command, count: int, folder: Path) -> tuple[Command, Command]:
    """Hold test cases out of the labelled ones, the same ones in all runs."""
    cases = cases_of(fine_tuning, "fine_tuning")
    # Relative, so that the list is the same where the data have been moved.
    dataset_dir = os.path.commonpath([os.path.dirname(case[name]) for case in cases for name in ("image", "label")])
    cases = [case | {name: os.path.relpath(case[name], dataset_dir) for name in ("image", "label")} for case in cases]
    parts = split_cases(cases, test_cases=count, validation_fraction=0)
    text = json.dumps({part: parts[part] for part in ("training", "test")}, indent=2) + "\n"
    # By its content, so that no other study in the folder, not even one that is only looked at, changes it.
    path = folder / f"split_{digest(text)[:8]}.json"
    write_text(path, text)
    split = {"data_list_file_path": str(path), "dataset_dir": dataset_dir}
    return (
        fine_tuning.with_settings(**split, data_list_key="training"),
        evaluation.with_settings(**split, data_list_key="test"),
    )


# --- learning rates -------------------------------------------------------------------------------------------------


def rates_to_choose(
    content: Mapping[str, Any], pretraining: Mapping[str, Command], fine_tuning: Mapping[str, Command]
) -> dict[str, list[Rates]]:
    """The learning rates to choose among, by method that does not set them itself.

    Args:
        content: entries of the study file.
        pretraining, fine_tuning: commands by method.

    Raises:
        ValueError: a method sets a rate itself that is to be chosen, or methods choose among more rates of fine-tuning
            than others.
    """
    before = {name: _rates_of_pretraining(content, name, pretraining.get(name)) for name in content["methods"]}
    after = {name: _rates_of_fine_tuning(content, name, command) for name, command in fine_tuning.items()}
    if len({len(rates) for rates in after.values()}) > 1:
        counts = ", ".join(f"{name}: {len(rates)}" for name, rates in after.items())
        raise ValueError(
            f"methods choose among different numbers of learning rates of fine-tuning ({counts}), which favours those "
            "with more: give each the same number, random weights too."
        )
    return {
        name: [Rates(first, second) for first in before[name] or [None] for second in after[name] or [None]]
        for name in content["methods"]
        if before[name] or after[name]
    }


def _rates_of_pretraining(content: Mapping[str, Any], method: str, command: Command | None) -> list[float]:
    of_method, of_all = content["methods"][method]["learning_rates"], content["pretraining"]["learning_rates"]
    rates = of_all if of_method is None else of_method
    if command is None or not rates:
        return []
    if not _sets_rate(command, len(content["pretraining"]["configs"]) + 1):
        return sorted({float(rate) for rate in rates})
    if of_method:
        raise ValueError(f"method {method!r} sets its learning rate itself: remove it, or its learning_rates.")
    return []


def _rates_of_fine_tuning(content: Mapping[str, Any], method: str, command: Command) -> list[float]:
    own = content["methods"][method]["fine_tuning"]
    rates = content["fine_tuning"]["learning_rates"] if own["learning_rates"] is None else own["learning_rates"]
    if rates and _sets_rate(command, len(command.layers) - len(own["configs"]) - 1):
        raise ValueError(
            f"method {method!r} sets its learning rate of fine-tuning itself, or has an optimizer without '@lr': "
            "remove that, or the learning_rates to choose among."
        )
    return sorted({float(rate) for rate in rates})


def _sets_rate(command: Command, shared: int) -> bool:
    """Whether the layers after the shared ones give the rate, or an optimiser that does not take it."""
    config = Command("training", (*command.layers[:shared], {"lr": None}, *command.layers[shared:])).config()
    return config["lr"] is not None or config["optimizer"]["lr"] != "@lr"
