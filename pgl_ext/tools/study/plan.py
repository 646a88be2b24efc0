"""The cells that a study consists of."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

import pgl_ext
from pgl_ext.data.cases import labelled_items, split_cases
from pgl_ext.data.datalist import find_volumes, item_name, load_datalist
from pgl_ext.files import write_text
from pgl_ext.tools.study.cells import Cell, Stage
from pgl_ext.tools.study.configs import flat, merged_config
from pgl_ext.tools.study.study_file import read_study_file

__all__ = ["Study", "read_study"]

_SET_BY_STUDY = (
    *("output_dir", "cache_dir", "seed", "resume", "pretrained_encoder", "pretrained_decoder", "model_path"),
    *("labelled_cases", "label_fraction", "split_seed", "test_cases"),
)
# What all methods share, so that they differ by the method alone; with where it is used, lest it be set there.
_DATA = ("dataset_dir", "data_list_file_path", "data_list_key", "validation_fraction")
_SHARED = (
    *(*_DATA, "max_epochs", "batch_size", "micro_batch_size", "patches_per_volume", "view_size", "encoder"),
    *(*(f"volumes#{name}" for name in _DATA), "train#sampler", "train#trainer#max_epochs"),
)
_INPUT = ("spacing", "hu_window")
_LIST_SETTINGS = ("data_list_file_path", "dataset_dir", "data_list_key", "annotated_key")
# What cached volumes depend on: the cache wants a folder for each preprocessing.
_CACHED_WITH = ("volume_preprocessing", "case_preprocessing", "hu_window", "spacing", "organs", "background_values")


def read_study(
    file: str | os.PathLike,
    folder: str | os.PathLike,
    bundles: str | os.PathLike | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Study:
    """Read a study file and find its cells.

    Args:
        file: see :func:`pgl_ext.tools.study.study_file.read_study_file`, also for what is raised.
        folder: of the cells.
        bundles: folder of ``pgl_pretrain`` and ``pgl_segmentation``; by default the one beside the package.
        overrides: of entries of the study file.
    """
    content = read_study_file(file, overrides)
    bundles = Path(pgl_ext.__file__).parents[1] / "bundles" if bundles is None else bundles
    return Study(content, Path(os.path.abspath(folder)), Path(os.path.abspath(bundles)))


class Study:
    """The cells of a study.

    Args:
        content: all entries of the study file.
        folder: of the cells.
        bundles: folder of the two bundles.

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

    def __init__(self, content: Mapping[str, Any], folder: Path, bundles: Path) -> None:
        self.folder = folder
        # Studies of several tasks can share their pre-trainings.
        self._pretraining_folder = Path(_absolute(content["pretraining"]["folder"]) or folder)
        self.title = str(content["title"])
        self.methods = list(content["methods"])
        self.reference: str = content["reference"]
        self.ablations: list[str] = content["ablations"]
        self.labels = _labels(content)
        self.seeds = [int(seed) for seed in content["seeds"]]
        _check_methods(self)
        entries = content["methods"].items()
        self._encoders = {name: _absolute(entry["encoder"]) for name, entry in entries if "encoder" in entry}
        self._with_decoder = {name for name, entry in entries if entry["decoder"]}
        self._pretraining = _pretraining_stages(content, self._pretraining_folder, bundles / "pgl_pretrain" / "configs")
        self._fine_tuning, self._evaluation = _segmentation_stages(
            content, self.labels, folder, bundles / "pgl_segmentation" / "configs"
        )
        remarks = (
            str(content["note"]),
            _seen_in_pretraining(self._pretraining, self._evaluation),
            _other_input(self._pretraining, self._fine_tuning[self.labels[0]]),
        )
        self.note = " ".join(remark for remark in remarks if remark)
        self._rates = _rates_to_choose(content, self._pretraining)

    def cells(self, rates: Mapping[str, float]) -> list[Cell]:
        """All cells in the order to run them: one seed of all methods after another, pre-training before its use.

        Args:
            rates: learning rates by method, as chosen; methods whose rate is still to be chosen are left out.
        """
        cells: dict[str, Cell] = {}
        for seed in self.seeds:
            for method in self.methods:
                for labels in self.labels:
                    if method in rates or method not in self._rates:
                        cell = self.fine_tuning(method, labels, seed, rates.get(method))
                        cells |= {part.name: part for part in (cell.pretraining, cell) if part is not None}
        return list(cells.values())

    def selection(self) -> dict[str, dict[float, Cell]]:
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

    def pretraining(self, method: str, seed: int, rate: float | None = None) -> Cell | None:
        """The pre-training of a method; None where it starts from random weights or from an encoder file."""
        if method not in self._pretraining:
            return None
        name = f"pretraining/{_folder_name(method, rate)}/seed_{seed}"
        chosen = {} if rate is None else {"lr": rate}
        folder = self._pretraining_folder / name
        stage = self._pretraining[method].with_settings(output_dir=str(folder), seed=seed, **chosen)
        return Cell(folder, name, method, seed, (stage,), lr=rate)

    def fine_tuning(self, method: str, labels: float, seed: int, rate: float | None = None) -> Cell:
        """The fine-tuning of a method on some labelled cases, with its evaluation."""
        share = f"{labels}_cases" if isinstance(labels, int) else f"{100 * labels:g}_percent"
        name = f"fine_tuning/{_folder_name(method, rate)}/{share}/seed_{seed}"
        folder = self.folder / name
        pretraining, encoder = self.pretraining(method, seed, rate), self._encoders.get(method)
        if pretraining is not None:
            encoder = str(pretraining.folder / "models" / "pgl_encoder.pt")
        weights = {"pretrained_encoder": encoder}
        if method in self._with_decoder:
            weights["pretrained_decoder"] = str(pretraining.folder / "models" / "pgl_decoder.pt")
        stages = (
            self._fine_tuning[labels].with_settings(output_dir=str(folder), seed=seed, split_seed=seed, **weights),
            self._evaluation.with_settings(
                output_dir=str(folder / "evaluation"), model_path=str(folder / "models" / "model.pt")
            ),
        )
        return Cell(folder, name, method, seed, stages, labels, rate, pretraining)


def _folder_name(method: str, rate: float | None = None) -> str:
    name = re.sub(r"[^\w.-]+", "_", method).strip("_.")
    return name if rate is None else f"{name}_lr_{rate:g}"


# --- entries of the study file --------------------------------------------------------------------------------------


def _labels(content: Mapping[str, Any]) -> list[float]:
    cases, fractions = content["labelled_cases"], content["label_fractions"]
    if bool(cases) == bool(fractions):
        raise ValueError(
            f"labelled_cases is {cases} and label_fractions {fractions}: give one of them, such as labelled_cases: "
            "[3, 14]."
        )
    return sorted({int(count) for count in cases} if cases else {float(fraction) for fraction in fractions})


def _check_methods(study: Study) -> None:
    unknown = [name for name in (study.reference, *study.ablations) if name not in study.methods]
    if unknown:
        raise ValueError(f"reference or ablations name {unknown}, the study has the methods {study.methods}.")
    folders = {_folder_name(name) for name in study.methods}
    if len(folders) < len(study.methods):
        raise ValueError(
            f"some of the methods {study.methods} would share a folder, of {sorted(folders)}: rename them."
        )
    if not study.seeds:
        raise ValueError("seeds is empty: give at least one, such as seeds: [0, 1, 2].")


def _stage(entry: Mapping[str, Any], place: str, section: str, folder: Path) -> Stage:
    """The command that a part of the study file describes."""
    refused = [name for name in entry["settings"] if name in _SET_BY_STUDY]
    if refused:
        raise ValueError(f"{place} sets {refused}, which the study sets itself: remove them.")
    settings = dict(entry["settings"])
    for name in ("data_list_file_path", "dataset_dir"):
        if name in settings:
            settings[name] = _absolute(settings[name])
    return Stage(section, (*(_config_path(name, folder) for name in entry["configs"]), settings))


def _absolute(path: str | Sequence[str] | None) -> str | list[str] | None:
    """A path, or several, so that it does not matter where a command is run."""
    if path is None or isinstance(path, str):
        return path and os.path.abspath(os.path.expanduser(path))
    return [_absolute(part) for part in path]


def _config_path(name: str, folder: Path) -> str:
    """A config of the bundle, or else one that the working directory has."""
    for path in (folder / name, Path(os.path.abspath(name))):
        if path.is_file():
            return str(path)
    raise FileNotFoundError(f"the config {name} is neither in {folder} nor in the working directory.")


# --- pre-training ---------------------------------------------------------------------------------------------------


def _pretraining_stages(content: Mapping[str, Any], folder: Path, configs: Path) -> dict[str, Stage]:
    """By method what all its pre-trainings share."""
    base = _stage(content["pretraining"], "pretraining", "training", configs)
    stages = {}
    for name, entry in content["methods"].items():
        if "encoder" in entry:
            if entry["configs"] or entry["settings"] or entry["decoder"]:
                raise ValueError(f"method {name!r} has an encoder and is not pre-trained: remove its other entries.")
        else:
            own = _stage(entry, f"method {name!r}", "training", configs)
            stage = Stage("training", base.layers + own.layers)
            _check_shared(name, base, stage)
            stages[name] = _with_cache(stage, folder / "cache" / "pretraining")
    if stages:  # all have the scans of the base
        _check_outside(base, folder)
    return stages


def _check_shared(method: str, base: Stage, stage: Stage) -> None:
    configs = [merged_config(part.layers) for part in (base, stage)]
    shared, own = ({id_: v for name in _SHARED for id_, v in flat(config.get(name), name)} for config in configs)
    ids = {**shared, **own}
    changed = [f"{id_} from {shared.get(id_)} to {own.get(id_)}" for id_ in ids if own.get(id_) != shared.get(id_)]
    if changed:
        raise ValueError(
            f"method {method!r} changes {'; '.join(changed)}: all methods are compared on the same data with the same "
            "number of pairs. Set it under pretraining, for all of them."
        )


def _check_outside(stage: Stage, folder: Path) -> None:
    config = merged_config(stage.layers)
    scans = None if config["data_list_file_path"] else config["dataset_dir"]
    if scans and folder.is_relative_to(scans):
        raise ValueError(
            f"the study's folder {folder} lies within the scans to pre-train on, {scans}, and what it writes would be "
            "taken for further scans: give an --out elsewhere."
        )


def _rates_to_choose(content: Mapping[str, Any], stages: Mapping[str, Stage]) -> dict[str, list[float]]:
    """The learning rates to choose among, by method that does not set its rate itself."""
    shared = len(content["pretraining"]["configs"]) + 1
    found = {}
    for method, stage in stages.items():
        named = content["methods"][method]["learning_rates"]
        rates = content["pretraining"]["learning_rates"] if named is None else named
        if not rates:
            continue
        if not _sets_rate(stage, shared):
            found[method] = sorted({float(rate) for rate in rates})
        elif named:
            raise ValueError(f"method {method!r} sets its learning rate itself: remove it, or its learning_rates.")
    return found


def _sets_rate(stage: Stage, shared: int) -> bool:
    """Whether the layers after the shared ones give the rate, or an optimiser that does not take it."""
    layers = [ConfigParser.load_config_file(part) if isinstance(part, str) else part for part in stage.layers[shared:]]
    return any("lr" in layer for layer in layers) or merged_config(stage.layers)["optimizer"]["lr"] != "@lr"


def _seen_in_pretraining(pretraining: Mapping[str, Stage], evaluation: Stage) -> str:
    """A remark where test scans are among those of pre-training, which are the same for all methods."""
    config = merged_config(next(iter(pretraining.values())).layers) if pretraining else {}
    if not config or not (config["data_list_file_path"] or config["dataset_dir"]):
        return ""
    items = (
        load_datalist(*(config[name] for name in _LIST_SETTINGS[:3]))
        if config["data_list_file_path"]
        else find_volumes(config["dataset_dir"])
    )
    seen = {item_name(item) for item in items}
    names = [item_name(case) for case in _cases(evaluation, "test")]
    count = sum(name in seen for name in names)
    return f"Pre-training has seen {count} of the {len(names)} test scans, without their labels." if count else ""


def _other_input(pretraining: Mapping[str, Stage], fine_tuning: Stage) -> str:
    """A remark where scans are prepared otherwise in pre-training, to the disadvantage of all its methods."""
    if not pretraining:
        return ""
    before, after = (merged_config(stage.layers) for stage in (next(iter(pretraining.values())), fine_tuning))
    parts = [f"{name} {before[name]}, then {after[name]}" for name in _INPUT if before[name] != after[name]]
    return f"Pre-training and fine-tuning prepare scans differently: {'; '.join(parts)}." if parts else ""


def _with_cache(stage: Stage, prefix: Path) -> Stage:
    config = merged_config(stage.layers)
    parts = json.dumps([config.get(name) for name in _CACHED_WITH], sort_keys=True)
    return stage.with_settings(cache_dir=f"{prefix}_{hashlib.sha256(parts.encode()).hexdigest()[:8]}")


# --- fine-tuning and evaluation -------------------------------------------------------------------------------------


def _segmentation_stages(
    content: Mapping[str, Any], labels: Sequence[float], folder: Path, configs: Path
) -> tuple[dict[float, Stage], Stage]:
    """What the fine-tunings on the same share of labels have in common, and what all evaluations have."""
    fine_tuning = _stage(content["fine_tuning"], "fine_tuning", "training", configs)
    evaluation = _stage(content["test"], "test", "evaluating", configs)
    if content["test"]["cases"] is not None:
        if content["test"]["settings"].get("data_list_file_path") is not None:
            raise ValueError(
                "test has both cases, to hold out of the labelled ones, and a data_list_file_path under settings: "
                "remove one of them."
            )
        fine_tuning, evaluation = _hold_out(fine_tuning, evaluation, content["test"]["cases"], folder)
    config = merged_config(fine_tuning.layers)
    if "annotated_key" not in content["test"]["settings"]:
        evaluation = evaluation.with_settings(annotated_key=config["annotated_key"])
    cases = _cases(fine_tuning, "fine_tuning")
    both = {item_name(case) for case in cases} & {item_name(case) for case in _cases(evaluation, "test")}
    if both:
        raise ValueError(
            f"{len(both)} test cases are among the labelled ones, such as {min(both)}: give another list or "
            "data_list_key under test, or a number of cases to hold out (test: cases)."
        )
    stage = _with_cache(fine_tuning, folder / "cache" / "fine_tuning")
    patches = content["fine_tuning"]["patches_per_epoch"]
    stages = {}
    for share in labels:
        counts = {"labelled_cases": None, "label_fraction": 1.0}
        counts["labelled_cases" if isinstance(share, int) else "label_fraction"] = share
        training = len(split_cases(cases, validation_fraction=config["validation_fraction"], **counts)["training"])
        budget = {} if patches is None else {"patches_per_case": max(1, round(patches / training))}
        stages[share] = stage.with_settings(test_cases=0, **counts, **budget)
    return stages, evaluation


def _cases(stage: Stage, place: str) -> list[dict]:
    config = merged_config(stage.layers)
    if not config["data_list_file_path"]:
        raise ValueError(
            f"{place} has no data_list_file_path: set it under {place}: settings, to a JSON list of image and label of "
            "each case."
        )
    return labelled_items(*(config[name] for name in _LIST_SETTINGS))


def _hold_out(fine_tuning: Stage, evaluation: Stage, count: int, folder: Path) -> tuple[Stage, Stage]:
    """Hold test cases out of the labelled ones, the same ones in all cells."""
    cases = _cases(fine_tuning, "fine_tuning")
    parts = split_cases(cases, test_cases=count, validation_fraction=0)
    # Relative, so that the list is the same where the data have been moved.
    dataset_dir = os.path.commonpath([os.path.dirname(case[name]) for case in cases for name in ("image", "label")])
    content = {
        part: [
            case | {name: os.path.relpath(case[name], dataset_dir) for name in ("image", "label")}
            for case in parts[part]
        ]
        for part in ("training", "test")
    }
    text = json.dumps(content, indent=2) + "\n"
    # By its content, so that no other study in the folder, not even one that is only looked at, changes it.
    path = folder / f"split_{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    write_text(path, text)
    split = {"data_list_file_path": str(path), "dataset_dir": dataset_dir}
    return (
        fine_tuning.with_settings(**split, data_list_key="training"),
        evaluation.with_settings(**split, data_list_key="test"),
    )
