"""Which structures there are to segment, as a ``dataset.json`` or the label maps themselves say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike

from pgl_ext.data.prepare import listed_cases
from pgl_ext.errors import few
from pgl_ext.files import read_json
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.load import LoadVolumed

__all__ = ["annotated_field", "found_structures", "listed_ignore_label", "listed_structures", "task_of_data"]


def task_of_data(
    organs: Mapping[str, Sequence[int] | int] | None = None,
    background_values: Sequence[int] = (0,),
    multi_label: bool = False,
    dataset_dir: PathLike | None = None,
    data_list_file_path: PathLike | Sequence[PathLike] | None = None,
    data_list_key: str | Sequence[str] = "training",
    metadata: PathLike | None = None,
    ignore_label: int | None = None,
    channel_names: Sequence[str] = (),
) -> SegmentationTask:
    """The task that settings describe, or where they name no organs, the data.

    Args:
        organs, background_values, multi_label, ignore_label: see :class:`SegmentationTask`; the last also as the list's
            ``labels`` name it ``ignore``.
        dataset_dir, data_list_file_path, data_list_key: the cases. Structures are what the list's ``labels`` name, else
            the values of the label maps; where some overlap, each is decided by itself.
        metadata: of the bundle, which tells the channels of the network where there are no data: in checks of bundles,
            in MONAI Label, and where a federation starts.
        channel_names: see :func:`~pgl_ext.data.find.find_volumes`.

    Raises:
        ValueError: there is nothing that names a structure.
    """
    if organs is not None:
        return SegmentationTask(organs, background_values, multi_label, ignore_label)
    if not dataset_dir and not data_list_file_path and metadata is not None and os.path.isfile(metadata):
        return SegmentationTask.of_channels(read_json(metadata))
    lists = data_list_file_path or os.path.join(dataset_dir or "", "dataset.json")
    first = Path(lists if isinstance(lists, (str, os.PathLike)) else lists[0])
    content = read_json(first, "Data list") if first.is_file() else {}
    structures = listed_structures(content, first)
    ignore_label = listed_ignore_label(content) if ignore_label is None else ignore_label
    if not structures:
        cases = listed_cases(dataset_dir, data_list_file_path, data_list_key, channel_names=channel_names)
        structures = found_structures(cases, ignore_label)
    used = [value for values in structures.values() for value in values]
    return SegmentationTask(structures, background_values, multi_label or len(used) > len(set(used)), ignore_label)


def listed_structures(content: Mapping[str, Any], source: Any) -> dict[str, list[int]]:
    """The label values of each structure that a ``dataset.json`` names under ``labels``.

    Args:
        content: of the file, as the Decathlon or nnU-Net 1 writes it (``{"1": "liver"}``), or nnU-Net 2
            (``{"liver": 1}``, and of regions ``{"kidney": [1, 2], "tumour": [2]}``).
        source: the file, for messages.

    Returns:
        By name, in the order of the file, without the background and what is to be ignored; empty where the file has no
        labels.

    Raises:
        ValueError: the labels have another form.
    """
    labels = content.get("labels") or {}
    if not isinstance(labels, Mapping):
        labels = {str(value): name for value, name in enumerate(labels)} if isinstance(labels, list) else {"": labels}
    structures = {}
    for key, value in labels.items():
        name, values = (value, key) if isinstance(value, str) and not _is_value(value) else (key, value)
        values = values if isinstance(values, list) else [values]
        if not isinstance(name, str) or not values or not all(map(_is_value, values)):
            raise ValueError(
                f"{source} has the label {key!r}: {value!r}. Give each structure a name and its label values, such as "
                '{"1": "liver"} or {"liver": 1}.'
            )
        structures[name] = [int(value) for value in values]
    return {name: values for name, values in structures.items() if values != [0] and name != "ignore"}


def listed_ignore_label(content: Mapping[str, Any]) -> int | None:
    """The value that a ``dataset.json`` names ``ignore`` under ``labels``, as nnU-Net 2 does; None without."""
    labels = content.get("labels")
    value = labels.get("ignore") if isinstance(labels, Mapping) else None
    return int(value) if _is_value(value) else None


def _is_value(value: Any) -> bool:
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, str) and value.isdigit()))


def found_structures(cases: Iterable[Mapping[str, Any]], ignore_label: int | None = None) -> dict[str, list[int]]:
    """A structure for each value above 0 in the label maps of cases, named ``structure 1`` and so on by its value; but
    for the value to ignore.

    Raises:
        ValueError: there is none, or a value is no whole number.
    """
    values: set[float] = set()
    for case in cases:
        values |= set(np.unique(LoadVolumed("label")(dict(case))["label"].numpy()).tolist())
    odd = [value for value in values if value < 0 or value != int(value)]
    if odd or not values - {0, ignore_label}:
        raise ValueError(
            f"the label maps hold {few(sorted(map(str, values)))}: give maps in which each structure has a whole "
            "number above 0."
        )
    return {f"structure {int(value)}": [int(value)] for value in sorted(values - {0, ignore_label})}


def annotated_field(entries: Sequence[Mapping[str, Any]], names: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """The field of a data list that says which structures were annotated in a case, if it has one.

    Args:
        entries: of the list.
        names: of the structures.

    Returns:
        The field, None if there is none, and how it spells the names that it has (``SpinalCord`` of ``spinal_cord``).
    """
    plain = {_plain(name): name for name in names}
    for field in entries[0] if entries else ():
        listed = [entry.get(field) for entry in entries]
        if all(isinstance(value, list) and value and all(isinstance(name, str) for name in value) for value in listed):
            spelt = {plain.get(_plain(name)): name for value in listed for name in value}
            if None not in spelt:
                return field, spelt
    return None, {}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
