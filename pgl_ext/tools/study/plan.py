"""Which runs a study consists of, and the settings of their commands."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from pgl_ext.code_digest import digest
from pgl_ext.data.datalist import item_name, labelled_items, load_datalist
from pgl_ext.data.find import find_volumes
from pgl_ext.data.split import split_cases
from pgl_ext.files import write_text
from pgl_ext.tools.study.configs import Command, changed, config_path
from pgl_ext.tools.study.runs import Run
from pgl_ext.tools.study.study_file import labels_to_compare, read_study_file
from pgl_ext.weights.records import flat_entries

__all__ = ["Study"]

_SET_BY_STUDY = (
    "output_dir", "cache_dir", "seed", "resume", "pretrained_encoder", "pretrained_decoder", "model_path",
    "labelled_cases", "label_fraction", "split_seed", "test_cases",
)  # fmt: skip
# What all methods share, so that they differ by the method alone; with where it is used, lest it be set there.
_SHARED = (
    "dataset_dir", "data_list_file_path", "data_list_key", "validation_fraction",
    "max_epochs", "batch_size", "micro_batch_size", "patches_per_volume", "view_size", "encoder",
    "volumes#dataset_dir", "volumes#data_list_file_path", "volumes#data_list_key", "volumes#validation_fraction",
    "train#sampler", "train#trainer#max_epochs",
)  # fmt: skip
_INPUT = ("spacing", "hu_window")
_LIST_SETTINGS = ("data_list_file_path", "dataset_dir", "data_list_key", "annotated_key")
# What cached volumes depend on: the cache wants a folder for each preprocessing.
_CACHED_WITH = ("volume_preprocessing", "case_preprocessing", "hu_window", "spacing", "organs", "background_values")
_BUNDLES = Path(__file__).parents[3] / "bundles"


class Study:
    """The runs of a study.

    Args:
        file: see :func:`pgl_ext.tools.study.study_file.read_study_file`, also for what is raised.
        folder: of the runs.
        bundles: folder of ``pgl_pretrain`` and ``pgl_segmentation``; by default the one beside the package.
        overrides: of entries of the study file.

    Attributes:
        title, note: of the report.
        methods: names in their order.
        reference: the method that the others are compared with.
        ablations: the methods of the ablations' figure.
        labels: numbers (int) or fractions (float) of labelled cases, ascending.
        seeds: each for all methods.

    Raises:
        FileNotFoundError: a config does not exist.
        ValueError: methods differ in what they must share, cases are both labelled and for testing, or entries are
            missing or wrong.
    """

    def __init__(
        self,
        file: str | os.PathLike,
        folder: str | os.PathLike,
        bundles: str | os.PathLike | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        content = read_study_file(file, overrides)
        self.folder = Path(os.path.abspath(folder))
        # Studies of several tasks can share their pre-trainings.
        self._pretraining_folder = Path(_absolute(content["pretraining"]["folder"]) or self.folder)
        self.title = str(content["title"])
        self._entries: dict[str, dict[str, Any]] = content["methods"]
        self.methods = list(self._entries)
        self.reference: str = content["reference"]
        self.ablations: list[str] = content["ablations"]
        self.labels = labels_to_compare(content)
        self.seeds = [int(seed) for seed in content["seeds"]]
        folders = {_folder_name(name) for name in self.methods}
        if len(folders) < len(self.methods):
            raise ValueError(
                f"some of the methods {self.methods} would share a folder, of {sorted(folders)}: rename them."
            )
        bundles = Path(os.path.abspath(bundles or _BUNDLES))
        self._pretraining = _pretraining_commands(content, self._pretraining_folder, bundles)
        self._fine_tuning, self._evaluation = _segmentation_commands(content, self.labels, self.folder, bundles)
        self._rates = _rates_to_choose(content, self._pretraining)
        self.note = " ".join([str(content["note"]), *self._remarks()]).strip()

    def runs(self, rates: Mapping[str, float]) -> list[Run]:
        """All runs in the order to run them: one seed of all methods after another, pre-training before its use.

        Args:
            rates: learning rates by method, as chosen; methods whose rate is still to be chosen are left out.
        """
        runs: dict[str, Run] = {}
        for seed, method, labels in itertools.product(self.seeds, self.methods, self.labels):
            if method in rates or method not in self._rates:
                run = self.fine_tuning(method, labels, seed, rates.get(method))
                runs |= {part.name: part for part in run.with_pretraining}
        return list(runs.values())

    def selection(self) -> dict[str, dict[float, Run]]:
        """The fine-tunings that learning rates are chosen by: the first seed's, and of the most labels, which leave the
        most cases for validation.

        Returns:
            By method whose rate is to be chosen, and by rate; empty where the study file gives no rates.
        """
        chosen_by = self.labels[-1], self.seeds[0]
        return {
            method: {rate: self.fine_tuning(method, *chosen_by, rate) for rate in rates}
            for method, rates in self._rates.items()
        }

    def pretraining(self, method: str, seed: int, rate: float | None = None) -> Run | None:
        """The pre-training of a method; None where it starts from random weights or from an encoder file."""
        if method not in self._pretraining:
            return None
        name = f"pretraining/{_folder_name(method, rate)}/seed_{seed}"
        folder = self._pretraining_folder / name
        command = self._pretraining[method].with_settings(output_dir=str(folder), seed=seed)
        command = command if rate is None else command.with_settings(lr=rate)
        return Run(folder, name, method, seed, (command,), lr=rate)

    def fine_tuning(self, method: str, labels: float, seed: int, rate: float | None = None) -> Run:
        """The fine-tuning of a method on some labelled cases, with its evaluation."""
        share = f"{labels}_cases" if isinstance(labels, int) else f"{100 * labels:g}_percent"
        name = f"fine_tuning/{_folder_name(method, rate)}/{share}/seed_{seed}"
        folder = self.folder / name
        pretraining = self.pretraining(method, seed, rate)
        weights = {"pretrained_encoder": _absolute(self._entries[method].get("encoder"))}
        if pretraining is not None:
            weights["pretrained_encoder"] = str(pretraining.folder / "models" / "pgl_encoder.pt")
        if self._entries[method]["decoder"]:
            weights["pretrained_decoder"] = str(pretraining.folder / "models" / "pgl_decoder.pt")
        commands = (
            self._fine_tuning[labels].with_settings(output_dir=str(folder), seed=seed, split_seed=seed, **weights),
            self._evaluation.with_settings(
                output_dir=str(folder / "evaluation"), model_path=str(folder / "models" / "model.pt")
            ),
        )
        return Run(folder, name, method, seed, commands, labels, rate, pretraining)

    def _remarks(self) -> list[str]:
        """Sentences on what a reader of the scores of all pre-trained methods should know."""
        if not self._pretraining:
            return []
        pretraining = next(iter(self._pretraining.values())).config()
        fine_tuning = self._fine_tuning[self.labels[0]].config()
        remarks = []
        scans, test = _scans(pretraining), _cases(self._evaluation, "test")
        seen = sum(item_name(case) in scans for case in test)
        if seen:
            remarks.append(f"Pre-training has seen {seen} of the {len(test)} test scans, without their labels.")
        changes = [f"{n} {pretraining[n]}, then {fine_tuning[n]}" for n in _INPUT if pretraining[n] != fine_tuning[n]]
        if changes:
            remarks.append(f"Pre-training and fine-tuning prepare scans differently: {'; '.join(changes)}.")
        return remarks


def _folder_name(method: str, rate: float | None = None) -> str:
    name = re.sub(r"[^\w.-]+", "_", method).strip("_.")
    return name if rate is None else f"{name}_lr_{rate:g}"


# --- entries of the study file --------------------------------------------------------------------------------------


def _command(entry: Mapping[str, Any], place: str, section: str, folder: Path) -> Command:
    """The command that a part of the study file describes."""
    settings = entry["settings"]
    refused = [name for name in settings if name in _SET_BY_STUDY]
    if refused:
        raise ValueError(f"{place} sets {refused}, which the study sets itself: remove them.")
    paths = {name: _absolute(settings[name]) for name in _LIST_SETTINGS[:2] if name in settings}
    return Command(section, (*(config_path(name, folder) for name in entry["configs"]), {**settings, **paths}))


def _absolute(path: str | Sequence[str] | None) -> str | list[str] | None:
    """A path, or several, so that it does not matter where a command is run."""
    if path is None or isinstance(path, str):
        return path and os.path.abspath(os.path.expanduser(path))
    return [_absolute(part) for part in path]


def _with_cache(command: Command, prefix: Path) -> Command:
    config = command.config()
    preprocessing = json.dumps([config.get(name) for name in _CACHED_WITH], sort_keys=True)
    return command.with_settings(cache_dir=f"{prefix}_{digest(preprocessing)[:8]}")


# --- pre-training ---------------------------------------------------------------------------------------------------


def _pretraining_commands(content: Mapping[str, Any], folder: Path, bundles: Path) -> dict[str, Command]:
    """The pre-training command of each method, of any seed."""
    configs = bundles / "pgl_pretrain" / "configs"
    base = _command(content["pretraining"], "pretraining", "training", configs)
    commands = {}
    for name, entry in content["methods"].items():
        if "encoder" not in entry:
            layers = _command(entry, f"method {name!r}", "training", configs).layers
            commands[name] = _with_cache(Command("training", base.layers + layers), folder / "cache" / "pretraining")
            _check_shared(name, base, commands[name])
        elif entry["configs"] or entry["settings"] or entry["decoder"]:
            raise ValueError(f"method {name!r} has an encoder and is not pre-trained: remove its other entries.")
    if commands:  # all have the scans of the base
        _check_outside(base, folder)
    return commands


def _check_shared(method: str, base: Command, command: Command) -> None:
    before, after = (
        {id_: value for name in _SHARED for id_, value in flat_entries(config.get(name), name, lists=True).items()}
        for config in (base.config(), command.config())
    )
    changes = [f"{id_} from {before.get(id_)} to {after.get(id_)}" for id_ in changed(before, after)]
    if changes:
        raise ValueError(
            f"method {method!r} changes {'; '.join(changes)}: all methods are compared on the same data with the same "
            "number of pairs. Set it under pretraining, for all of them."
        )


def _check_outside(command: Command, folder: Path) -> None:
    config = command.config()
    scans = None if config["data_list_file_path"] else config["dataset_dir"]
    if scans and folder.is_relative_to(scans):
        raise ValueError(
            f"the study's folder {folder} lies within the scans to pre-train on, {scans}, and what it writes would be "
            "taken for further scans: give an --out elsewhere."
        )


def _rates_to_choose(content: Mapping[str, Any], commands: Mapping[str, Command]) -> dict[str, list[float]]:
    """The learning rates to choose among, by method that does not set its rate itself."""
    shared = len(content["pretraining"]["configs"]) + 1
    rates_by_method = {}
    for method, command in commands.items():
        of_method = content["methods"][method]["learning_rates"]
        rates = content["pretraining"]["learning_rates"] if of_method is None else of_method
        if rates and not _sets_rate(command, shared):
            rates_by_method[method] = sorted({float(rate) for rate in rates})
        elif of_method:
            raise ValueError(f"method {method!r} sets its learning rate itself: remove it, or its learning_rates.")
    return rates_by_method


def _sets_rate(command: Command, shared: int) -> bool:
    """Whether the layers after the shared ones give the rate, or an optimiser that does not take it."""
    config = Command("training", (*command.layers[:shared], {"lr": None}, *command.layers[shared:])).config()
    return config["lr"] is not None or config["optimizer"]["lr"] != "@lr"


def _scans(config: ConfigParser) -> set[str]:
    """Names of the scans that are pre-trained on, those for validation included."""
    if config["data_list_file_path"]:
        return {item_name(item) for item in load_datalist(*(config[name] for name in _LIST_SETTINGS[:3]))}
    return {item_name(item) for item in find_volumes(config["dataset_dir"])} if config["dataset_dir"] else set()


# --- fine-tuning and evaluation -------------------------------------------------------------------------------------


def _segmentation_commands(
    content: Mapping[str, Any], labels: Sequence[float], folder: Path, bundles: Path
) -> tuple[dict[float, Command], Command]:
    """The fine-tuning command of each share of labels, and the evaluation command, of any method and seed."""
    configs = bundles / "pgl_segmentation" / "configs"
    fine_tuning = _command(content["fine_tuning"], "fine_tuning", "training", configs)
    evaluation = _command(content["test"], "test", "evaluating", configs)
    if content["test"]["cases"] is not None:
        if content["test"]["settings"].get("data_list_file_path") is not None:
            raise ValueError(
                "test has both cases, to hold out of the labelled ones, and a data_list_file_path under settings: "
                "remove one of them."
            )
        fine_tuning, evaluation = _hold_out(fine_tuning, evaluation, content["test"]["cases"], folder)
    config = fine_tuning.config()
    if "annotated_key" not in content["test"]["settings"]:
        evaluation = evaluation.with_settings(annotated_key=config["annotated_key"])
    cases = _cases(fine_tuning, "fine_tuning")
    both = {item_name(case) for case in cases} & {item_name(case) for case in _cases(evaluation, "test")}
    if both:
        raise ValueError(
            f"{len(both)} test cases are among the labelled ones, such as {min(both)}: give another list or "
            "data_list_key under test, or a number of cases to hold out (test: cases)."
        )
    fine_tuning = _with_cache(fine_tuning, folder / "cache" / "fine_tuning")
    patches = content["fine_tuning"]["patches_per_epoch"]
    commands = {}
    for share in labels:
        counts = {"labelled_cases": None, "label_fraction": 1.0}
        counts["labelled_cases" if isinstance(share, int) else "label_fraction"] = share
        training = len(split_cases(cases, validation_fraction=config["validation_fraction"], **counts)["training"])
        budget = {} if patches is None else {"patches_per_case": max(1, round(patches / training))}
        commands[share] = fine_tuning.with_settings(test_cases=0, **counts, **budget)
    return commands, evaluation


def _cases(command: Command, place: str) -> list[dict]:
    config = command.config()
    if not config["data_list_file_path"]:
        raise ValueError(
            f"{place} has no data_list_file_path: set it under {place}: settings, to a JSON list of image and label of "
            "each case."
        )
    return labelled_items(*(config[name] for name in _LIST_SETTINGS))


def _hold_out(fine_tuning: Command, evaluation: Command, count: int, folder: Path) -> tuple[Command, Command]:
    """Hold test cases out of the labelled ones, the same ones in all runs."""
    cases = _cases(fine_tuning, "fine_tuning")
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
