"""Which runs a study consists of, and the settings of their commands."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from pgl_ext.data.datalist import named_items
from pgl_ext.data.seen import patients_text, seen_scans, seen_text
from pgl_ext.errors import few
from pgl_ext.tools.bundles import bundles_folder
from pgl_ext.tools.study.commands import (
    absolute,
    cases_of,
    fine_tuning_commands,
    pretraining_commands,
    rates_to_choose,
    segmentation_commands,
    settings_of_labels,
)
from pgl_ext.tools.study.configs import Command
from pgl_ext.tools.study.runs import AS_SET, Rates, Run, evaluation_folder, fold_folders, model_file
from pgl_ext.tools.study.scans import check_unseen, scans_text
from pgl_ext.tools.study.study_file import labels_to_compare, read_study_file

__all__ = ["Study"]

_INPUT = ("spacing", "hu_window")


class Study:
    """The runs of a study.

    Args:
        file: see :func:`pgl_ext.tools.study.study_file.read_study_file`, also for what is raised.
        folder: of the runs.
        bundles: folder of ``pgl_pretrain`` and ``pgl_segmentation``; by default those that come with the package.
        overrides: of entries of the study file.

    Attributes:
        title, note: of the report.
        methods: names in their order.
        reference: the method that the others are compared with.
        ablations: the methods of the ablations' figure.
        pictured_cases: names of test cases that the report shows beside the best, median and worst.
        labels: numbers (int) or fractions (float) of labelled cases, ascending.
        seeds: each for all methods.
        folds: of each seed's cross-validation; None: there are test cases.
        kept_steps: steps of fine-tuning whose models are evaluated too, ascending.

    Raises:
        FileNotFoundError: a config does not exist.
        ValueError: methods differ in what they must share, test scans are labelled or pre-trained on, or entries are
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
        self._pretraining_folder = Path(absolute(content["pretraining"]["folder"]) or self.folder)
        self.title = str(content["title"])
        self._entries: dict[str, dict[str, Any]] = content["methods"]
        self.methods = list(self._entries)
        self.reference: str = content["reference"]
        self.ablations: list[str] = content["ablations"]
        self.pictured_cases: list[str] = content["pictured_cases"]
        self.labels = labels_to_compare(content)
        self.seeds = [int(seed) for seed in content["seeds"]]
        folders = {_folder_name(name) for name in self.methods}
        if len(folders) < len(self.methods):
            raise ValueError(
                f"some of the methods {self.methods} would share a folder, of {sorted(folders)}: rename them."
            )
        bundles = Path(os.path.abspath(bundles or bundles_folder()))
        self._pretraining = pretraining_commands(content, self._pretraining_folder, bundles)
        self.folds: int | None = content["test"]["folds"]
        base, self._evaluation, test = segmentation_commands(content, self.folder, bundles)
        names = [case["name"] for case in named_items(test)]
        if not set(self.pictured_cases) <= set(names):
            raise ValueError(f"pictured_cases is {self.pictured_cases}, but test cases are {few(names)}: name some.")
        scans = ""
        if self._pretraining:  # all have the same scans
            pretraining = next(iter(self._pretraining.values()))
            scans = scans_text(pretraining, content["pretraining"]["scans"])
            check_unseen(pretraining, test)
        self._fine_tuning = fine_tuning_commands(content, base, self.folder, bundles)
        self._rates = rates_to_choose(content, self._pretraining, self._fine_tuning)
        self._of_labels = {labels: settings_of_labels(content, base, labels)[0] for labels in self.labels}
        self._of_selection = _settings_of_selection(content, base, self.labels[-1])
        config = base.config()
        self.kept_steps = sorted(config["kept_steps"])
        # With folds, patients stay together.
        training = [] if self.folds else cases_of(base, "fine_tuning")
        self.note = " ".join([str(content["note"]), scans, *self._remarks(config, training, test)]).strip()

    def runs(self, rates: Mapping[str, Rates]) -> list[Run]:
        """All runs in the order to run them: one seed of all methods after another, pre-training before its use.

        Args:
            rates: learning rates by method, as chosen; methods whose rates are still to be chosen are left out.
        """
        runs: dict[str, Run] = {}
        for seed, method, labels in itertools.product(self.seeds, self.methods, self.labels):
            if method in rates or method not in self._rates:
                run = self.fine_tuning(method, labels, seed, rates.get(method, AS_SET))
                runs |= {part.name: part for part in run.with_pretraining}
        return list(runs.values())

    def selection(self) -> dict[str, dict[Rates, Run]]:
        """The fine-tunings that learning rates are chosen by: the first seed's, and of the most labels, which leave the
        most cases for validation. Where they leave none, runs for this alone hold some out, and are not tested.

        Returns:
            By method whose rates are to be chosen, and by rates; empty where the study file gives none.
        """
        return {
            method: {
                one: self.fine_tuning(method, self.labels[-1], self.seeds[0], one, selection=True) for one in rates
            }
            for method, rates in self._rates.items()
        }

    def pretrained_as(self, method: str) -> str:
        """The method whose pre-training a method takes, by default its own."""
        return self._entries[method]["pretrained_as"] or method

    def pretraining(self, method: str, seed: int, rate: float | None = None) -> Run | None:
        """The pre-training of a method; None where it starts from random weights or from an encoder file."""
        if method not in self._pretraining:
            return None
        command, method = self._pretraining[method], self.pretrained_as(method)
        name = f"pretraining/{_folder_name(method, Rates(rate))}/seed_{seed}"
        folder = self._pretraining_folder / name
        command = command.with_settings(output_dir=str(folder), seed=seed)
        command = command if rate is None else command.with_settings(lr=rate)
        return Run(folder, name, method, seed, (command,), rates=Rates(rate))

    def fine_tuning(self, method: str, labels: float, seed: int, rates: Rates = AS_SET, selection: bool = False) -> Run:
        """The fine-tuning of a method on some labelled cases, or one for each fold of them, with the evaluations.

        Args:
            method: its name.
            labels: number (int) or fraction (float) of labelled cases.
            seed: of the training, and of the choice of cases.
            rates: learning rates to set.
            selection: whether the validation's Dice is needed, to choose learning rates by.
        """
        apart = selection and self._of_selection is not None
        share = f"{labels}_cases" if isinstance(labels, int) else f"{100 * labels:g}_percent"
        share = f"{share}_for_selection" if apart else share
        name = f"fine_tuning/{_folder_name(method, rates)}/{share}/seed_{seed}"
        folder = self.folder / name
        pretraining = self.pretraining(method, seed, rates.pretraining)
        weights = {"pretrained_encoder": absolute(self._entries[method].get("encoder"))}
        if pretraining is not None:
            weights["pretrained_encoder"] = str(pretraining.folder / "models" / "pgl_encoder.pt")
        decoder = self._entries[method]["decoder"]
        if pretraining is not None and decoder:
            decoder = str(pretraining.folder / "models" / "pgl_decoder.pt")
        if decoder:
            weights["pretrained_decoder"] = absolute(decoder)
        rate = {} if rates.fine_tuning is None else {"lr": rates.fine_tuning}
        of_labels = self._of_selection if apart else self._of_labels[labels]
        training = self._fine_tuning[method].with_settings(
            output_dir=str(folder), seed=seed, split_seed=seed, **weights, **of_labels, **rate
        )
        commands, folders = [training], [folder]
        if self.folds is not None:
            folders = fold_folders(folder, self.folds)
            each = [{"output_dir": str(of_fold), "test_fold": [k, self.folds]} for k, of_fold in enumerate(folders)]
            commands = [training.with_settings(**settings) for settings in each]
        for step in [] if apart else [None, *self.kept_steps]:
            models = [str(model_file(of_fold, step)) for of_fold in folders]
            model = models[0] if self.folds is None else models
            evaluated = str(evaluation_folder(folder, step))
            commands.append(self._evaluation.with_settings(output_dir=evaluated, model_path=model))
        return Run(folder, name, method, seed, tuple(commands), labels, rates, pretraining)

    def _remarks(self, fine_tuning: ConfigParser, training: list[dict], test: list[dict]) -> list[str]:
        """Sentences on what a reader of the scores of pre-trained methods should know."""
        texts = {name: seen_text(test, seen_scans(entry.get("encoder"))) for name, entry in self._entries.items()}
        remarks = [f"{name}: {text}" for name, text in texts.items() if text]
        remarks += filter(None, [patients_text({"training": training, "test": test})])
        if not self._pretraining:
            return remarks
        pretraining = next(iter(self._pretraining.values())).config()
        changes = [f"{n} {pretraining[n]}, then {fine_tuning[n]}" for n in _INPUT if pretraining[n] != fine_tuning[n]]
        if changes:
            remarks.append(f"Pre-training and fine-tuning prepare scans differently: {'; '.join(changes)}.")
        return remarks


def _settings_of_selection(content: Mapping[str, Any], base: Command, labels: float) -> dict[str, Any] | None:
    """The settings of fine-tunings for the choice of learning rates alone; None where all have validation cases."""
    if settings_of_labels(content, base, labels)[1]:
        return None
    fraction = {"validation_fraction": content["fine_tuning"]["selection_validation_fraction"]}
    return settings_of_labels(content, base.with_settings(**fraction), labels)[0] | fraction


def _folder_name(method: str, rates: Rates = AS_SET) -> str:
    name = re.sub(r"[^\w.-]+", "_", method).strip("_.")
    before = "" if rates.pretraining is None else f"_lr_{rates.pretraining:g}"
    after = "" if rates.fine_tuning is None else f"_fine_tuning_lr_{rates.fine_tuning:g}"
    return name + before + after
