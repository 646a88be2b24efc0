"""Which scans inference runs on, and the names of what it writes."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pgl_ext.data.datalist import file_suffix, find_volumes, item_name, load_datalist

__all__ = ["FEATURES_SUFFIX", "inference_items", "unique_names"]

FEATURES_SUFFIX = "_features.nii.gz"
"""Ending of the files of feature maps."""


def inference_items(
    dataset_dir: str | os.PathLike | None = None,
    data_list_file_path: str | os.PathLike | None = None,
    data_list_key: str = "training",
    query_volume: str | int | None = None,
) -> list[dict]:
    """The scans to run on, the query scan first.

    Feature maps that an earlier run wrote below ``dataset_dir`` are passed over.

    Args:
        dataset_dir: folder of scans, or one file; with a data list the folder that its paths start from.
        data_list_file_path: JSON data list to take the scans from instead.
        data_list_key: which list of the file to take.
        query_volume: the scan that holds the query point: its name (with or without ending or folder), or its place
            in the order of the paths, from 0. None: the first.

    Returns:
        Items with ``"image"``, ``"name"`` (unique, usable as a file name) and ``"series_uid"`` for a DICOM series.

    Raises:
        ValueError: there is nothing to run on, or ``query_volume`` names none or several of the scans.
    """
    if data_list_file_path is not None:
        items = load_datalist(data_list_file_path, dataset_dir, data_list_key)
    elif dataset_dir is None:
        raise ValueError("dataset_dir is not set: give a folder of scans, or one file, with --dataset_dir PATH.")
    elif os.path.isfile(dataset_dir):
        items = [{"image": os.path.abspath(dataset_dir)}]
    else:
        items = [item for item in find_volumes(dataset_dir) if not item["image"].endswith(FEATURES_SUFFIX)]
    if not items:
        raise ValueError(f"Dataset folder {dataset_dir} holds only feature maps: set it to a folder of scans.")
    items = [{**item, "name": name} for item, name in zip(items, unique_names(items), strict=True)]
    query = _find(items, query_volume)
    return [items[query], *items[:query], *items[query + 1 :]]


def _stem(path: str) -> str:
    """The name of a file without its ending, or of a folder."""
    name = Path(path).name
    return name if os.path.isdir(path) else name[: len(name) - len(file_suffix(name))]


def unique_names(items: Sequence[Mapping]) -> list[str]:
    """File names for outputs: the scan's own where no other scan has it, else with its folders or series before it."""
    names = [_stem(item["image"]) for item in items]
    if len(set(names)) == len(names):
        return names
    root = os.path.commonpath([os.path.dirname(item["image"]) for item in items])
    count = Counter(names)
    for index, item in enumerate(items):
        if count[names[index]] > 1:
            folder = os.path.relpath(os.path.dirname(item["image"]), root)
            parts = [*Path(folder).parts, names[index], *([item["series_uid"]] if "series_uid" in item else [])]
            names[index] = "_".join(parts)
    # Two formats of one scan in one folder.
    count = Counter(names)
    taken = {name for name in names if count[name] == 1}
    for index, name in enumerate(names):
        if count[name] > 1:
            names[index] = next(new for n in itertools.count(index) if (new := f"{name}_{n}") not in taken)
            taken.add(names[index])
    return names


def _find(items: Sequence[Mapping], query: str | int | None) -> int:
    if query is None:
        return 0
    text = str(query)
    found = [
        index
        for index, item in enumerate(items)
        if text in (item["name"], item["image"], item_name(item), Path(item["image"]).name, item.get("series_uid"))
    ]
    if len(found) == 1:
        return found[0]
    if not found and isinstance(query, int) and 0 <= query < len(items):
        return query
    names = ", ".join(item["name"] for item in items[:8]) + (", ..." if len(items) > 8 else "")
    raise ValueError(
        f"query_volume {query!r} names {'none' if not found else 'several'} of the {len(items)} scans: give one of the "
        f"names ({names}) or a number from 0 to {len(items) - 1}."
    )
