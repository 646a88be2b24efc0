"""Reading a study file: its entries, overrides from the command line, and misspelt names."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

__all__ = ["labels_to_compare", "read_study_file"]

_DEFAULTS: dict[str, Any] = {
    "title": "Comparison of pre-training methods",
    "note": "",
    "pretraining": {"configs": ["train.json"], "settings": {}, "learning_rates": [], "folder": None, "scans": []},
    "fine_tuning": {
        "configs": ["train.json"],
        "random_start": [],
        "pretrained_start": [],
        "settings": {},
        "patches_per_epoch": None,
        "learning_rates": [],
        "selection_validation_fraction": 0.34,
    },
    "test": {"configs": ["evaluate.json"], "settings": {}, "cases": None, "folds": None},
    "methods": {},
    "reference": "random",
    "ablations": [],
    "pictured_cases": [],
    "labelled_cases": [],
    "label_fractions": [],
    "seeds": [0, 1, 2],
}
_PARTS = ("pretraining", "fine_tuning", "test")
_OF_METHOD: dict[str, Any] = {"configs": [], "settings": {}, "learning_rates": None}
_METHOD: dict[str, Any] = {**_OF_METHOD, "decoder": False, "fine_tuning": _OF_METHOD, "pretrained_as": None}
_FORMS = {dict: "NAME: VALUE", list: "[0, 1, 2]"}


def read_study_file(file: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a study file.

    Args:
        file: YAML or JSON. What it names as ``base``, one file or several relative to its folder, is read before it; as
            in MONAI's configs, an entry replaces an earlier one, and ``methods#NAME`` adds to one.
        overrides: entries by id, such as ``pretraining#settings#max_epochs``. What follows ``settings`` is an id of the
            bundle's config: ``fine_tuning#settings#encoder#layers``.

    Returns:
        All entries, those not given with their defaults.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file cannot be read, or an entry has a name that is not known or a value of the wrong kind.
    """
    try:
        given = ConfigParser.load_config_files(_with_bases(Path(file)))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}, or a file that it is based on, is not valid YAML: {error}") from error
    given.pop("base", None)
    content = _with_defaults(given)
    for name, value in (overrides or {}).items():
        _override(content, name.replace("::", "#").split("#"), value)
    content = _with_defaults(content)  # of methods that overrides added
    _check_names(content)
    return content


def _with_bases(file: Path) -> list[Path]:
    bases = ConfigParser.load_config_file(file).get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    return [*(part for base in bases for part in _with_bases(file.parent / base)), file]


def _with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    content = copy.deepcopy(_DEFAULTS) | given
    for name, default in _DEFAULTS.items():
        if type(default) in _FORMS:
            content[name] = type(default)() if content[name] is None else content[name]
            if not isinstance(content[name], type(default)):
                raise ValueError(f"{name} must have the form {_FORMS[type(default)]}, got {content[name]!r}.")
    for part in _PARTS:
        content[part] = copy.deepcopy(_DEFAULTS[part]) | content[part]
    methods = content["methods"].items()
    content["methods"] = {str(name): copy.deepcopy(_METHOD) | (entry or {}) for name, entry in methods}
    for entry in content["methods"].values():
        entry["fine_tuning"] = copy.deepcopy(_OF_METHOD) | (entry["fine_tuning"] or {})
    for name, entry in content["methods"].items():
        if entry["pretrained_as"] is not None:
            _take_pretraining(name, entry, content["methods"])
    return content


def _take_pretraining(name: str, entry: dict[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Make the pre-training of a method that of the one that it names as ``pretrained_as``."""
    other = methods.get(entry["pretrained_as"], {"encoder": None})
    if "encoder" in other or "encoder" in entry or other["pretrained_as"] is not None:
        raise ValueError(
            f"method {name!r} is pretrained_as {entry['pretrained_as']!r}: name a method of the study that is "
            "pre-trained itself, and give no encoder."
        )
    of_other = {part: other[part] for part in _OF_METHOD}
    if any(entry[part] not in (default, of_other[part]) for part, default in _OF_METHOD.items()):
        raise ValueError(
            f"method {name!r} is pretrained_as {entry['pretrained_as']!r}: besides it can have decoder and fine_tuning."
        )
    entry.update(of_other)


def _override(content: dict[str, Any], name: list[str], value: Any) -> None:
    while len(name) > 1 and isinstance(content.get(name[0]), dict):
        content, name = content[name[0]], name[1:]
    content["#".join(name)] = value


def _check_names(content: Mapping[str, Any]) -> None:
    known = {"the study": (content, _DEFAULTS)}
    known |= {part: (content[part], _DEFAULTS[part]) for part in _PARTS}
    for name, entry in content["methods"].items():
        known[f"method {name!r}"] = entry, {**_METHOD, "encoder": None}
        known[f"fine_tuning of method {name!r}"] = entry["fine_tuning"], _OF_METHOD
    for place, (entries, names) in known.items():
        unknown = [str(name) for name in entries if name not in names]
        if unknown:
            raise ValueError(
                f"{place} has the entries {unknown}, which mean nothing there: it may have {', '.join(names)}. "
                "Settings of a bundle's config go under 'settings'."
            )


def labels_to_compare(content: Mapping[str, Any]) -> list[float]:
    """The numbers (int) or fractions (float) of labelled cases, ascending.

    Args:
        content: entries of a study file.

    Raises:
        ValueError: there are none or both, there is no seed, or methods are named that the study does not have.
    """
    cases, fractions, methods = content["labelled_cases"], content["label_fractions"], list(content["methods"])
    if bool(cases) == bool(fractions):
        raise ValueError(
            f"labelled_cases is {cases} and label_fractions {fractions}: give one of them, such as labelled_cases: "
            "[3, 14]."
        )
    unknown = [name for name in (content["reference"], *content["ablations"]) if name not in methods]
    if unknown:
        raise ValueError(f"reference or ablations name {unknown}, the study has the methods {methods}.")
    if not content["seeds"]:
        raise ValueError("seeds is empty: give at least one, such as seeds: [0, 1, 2].")
    return sorted({int(count) for count in cases} if cases else {float(fraction) for fraction in fractions})
