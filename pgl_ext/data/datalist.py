"""Data lists in the style of the Medical Segmentation Decathlon: reading them, and the names of what they list."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from monai.config import PathLike
from monai.utils import ensure_tuple

from pgl_ext.errors import few
from pgl_ext.files import read_json
from pgl_ext.transforms.formats import (
    READING_FIELDS,
    SUPPORTED,
    SUPPORTED_SUFFIXES,
    file_suffix,
    has_known_suffix,
    is_dicom_file,
)

__all__ = ["SOURCE_FIELDS", "item_name", "labelled_items", "load_datalist", "named_items", "source_names"]

SOURCE_FIELDS = ("task", "group")
"""Fields of an item that say where it is from: its data set, and what this is merged into ("abdomen CT")."""

_KEPT_KEYS = ("image", *READING_FIELDS, *SOURCE_FIELDS)


def item_name(item: Mapping) -> str:
    """One item's path, with the series UID where a folder may hold several: unique within a data list."""
    uid = item.get("series_uid")
    return f"{item['image']} (series {uid})" if uid else str(item["image"])


def load_datalist(
    data_list_file_path: PathLike | Sequence[PathLike],
    dataset_dir: PathLike | None = None,
    key: str | Sequence[str] = "training",
    keep: Iterable[str] = (),
) -> list[dict]:
    """Read a data list in the style of the Medical Segmentation Decathlon, or several that are aggregated.

    Args:
        data_list_file_path: JSON file, or several, that map ``key`` to a list of paths, or of dicts with ``"image"``.
            The file's ``"task"`` (or ``"name"``), ``"group"`` (by default its task) and ``"orientation"`` are those of
            entries without. Where nnU-Net 1 leaves out the ``_0000`` of an image, or 2 lists its cases under
            ``"dataset"``, these are found.
        dataset_dir: folder that relative paths start from; by default the folder of each JSON file.
        key: which list of the file to take, or which lists: ``("training", "test")`` also takes the Decathlon's scans
            without labels. Of several each file has all, of which some may be empty.
        keep: further fields of the entries to keep, as they are, but a path as ``"label"`` absolute.

    Returns:
        Items in the file's order with absolute ``"image"`` paths, plus ``"series_uid"``, ``"orientation"``, ``"task"``,
        ``"group"`` and the fields ``keep`` where given. All other fields are dropped.

    Raises:
        ValueError: a file is missing, not JSON, or lacks ``key``; an entry has no ``"image"`` or one of an unsupported
            type; not one of the images of a file exists; or a scan is named more than once, in one file or several.
    """
    paths = map(Path, ensure_tuple(data_list_file_path))
    items = [item for path in paths for item in _read_list(path, dataset_dir, ensure_tuple(key), keep)]
    twice = [name for name, count in Counter(map(item_name, items)).items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} scans are in the data list more than once: {few(twice)}. Held out for validation as one "
            f"entry, they would be trained on as another: remove all but one of each from {data_list_file_path}."
        )
    return items


def _read_list(path: Path, dataset_dir: PathLike | None, keys: Sequence[str], keep: Iterable[str]) -> list[dict]:
    content = _read_content(path, keys)
    entries = [entry for key in keys for entry in content[key]]
    task = content.get("task", content.get("name"))
    sources = {"task": task, "group": content.get("group", task), "orientation": content.get("orientation")}
    sources = {field: value for field, value in sources.items() if value is not None}
    kept = (*_KEPT_KEYS, *keep)
    items = [{**sources, **_to_item(entry, index, dataset_dir, path, kept)} for index, entry in enumerate(entries)]
    unsupported = [item["image"] for item in items if not _is_supported(item["image"])]
    if unsupported:
        raise ValueError(
            f"Data list {path} names {len(unsupported)} files of an unsupported type: {few(unsupported)}. Convert or "
            f"remove them; {SUPPORTED}."
        )
    # Single files that are missing are left to the start-up scan, which lists every bad file at once.
    if not any(os.path.exists(item["image"]) for item in items):
        raise ValueError(
            f"None of the {len(items)} images of data list {path} exists, such as {items[0]['image']}: set dataset_dir "
            "to the folder that its paths start from."
        )
    return items


def _read_content(path: Path, keys: Sequence[str]) -> dict:
    wanted = " and ".join(map(repr, keys))
    if not path.is_file():
        raise ValueError(f"Data list {path} does not exist or is not a file: give the path of a JSON data list.")
    content = read_json(path, "Data list", f"give one with a list {wanted}")
    cases = content.get("dataset")
    if isinstance(cases, dict) and all(isinstance(case, dict) and "images" in case for case in cases.values()):
        images = (case["images"] for case in cases.values())
        paths = (image[0] if isinstance(image, list) and len(image) == 1 else image for image in images)
        content["training"] = [{**case, "image": image} for case, image in zip(cases.values(), paths, strict=True)]
    lists = [name for name, value in content.items() if isinstance(value, list) and value]
    if not set(keys) & set(lists) or not all(isinstance(content.get(key), list) for key in keys):
        raise ValueError(f"Data list {path} has no entries under the key {wanted}; keys with entries: {lists}.")
    return content


def listed_path(path: str, data_list_file_path: PathLike, dataset_dir: PathLike | None = None) -> str:
    """The absolute path that a data list means by ``path``: relative ones start from ``dataset_dir``, or the list.

    Backslashes, as lists written on Windows have them, separate folders too, where no file has them in its name.

    Raises:
        ValueError: it is an absolute path of Windows, elsewhere.
    """
    base = os.path.abspath(Path(data_list_file_path).parent if dataset_dir is None else dataset_dir)
    absolute = os.path.normpath(os.path.join(base, os.path.expanduser(path)))
    if os.name == "nt" or os.path.exists(absolute):
        return absolute
    if re.match(r"[A-Za-z]:[\\/]|\\\\", path):
        raise ValueError(
            f"Data list {data_list_file_path} names {path}, which is a path of Windows: give paths that start from the "
            "list, or from dataset_dir."
        )
    return listed_path(path.replace("\\", "/"), data_list_file_path, dataset_dir) if "\\" in path else absolute


def _first_channel(path: str) -> str:
    """The file of an image that nnU-Net 1 lists without the number of its channel.

    Raises:
        ValueError: it has several channels.
    """
    suffix = file_suffix(path)
    first, second = (f"{path.removesuffix(suffix)}_000{channel}{suffix}" for channel in (0, 1))
    if os.path.exists(path) or not os.path.exists(first):
        return path
    if os.path.exists(second):
        raise ValueError(f"{path} has several channels, such as {second}, which are not supported: list one of them.")
    return first


def _to_item(entry: object, index: int, dataset_dir: PathLike | None, path: Path, kept: Iterable[str]) -> dict:
    entry = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not _is_path(entry.get("image")):
        raise ValueError(
            f"Entry {index} of data list {path} has no single 'image' path: {entry!r}. Each entry must be a path or an "
            "object with one path under 'image'; several channels are not supported."
        )
    item = {name: entry[name] for name in kept if name in entry}
    paths = [name for name in ("image", "label") if _is_path(item.get(name))]
    item |= {name: listed_path(item[name], path, dataset_dir) for name in paths}
    return item | {"image": _first_channel(item["image"])}


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_supported(path: str) -> bool:
    return (
        file_suffix(path) in SUPPORTED_SUFFIXES
        or not has_known_suffix(path)
        or os.path.isdir(path)
        or is_dicom_file(path)
    )


def source_names(items: Iterable[Mapping], field: str) -> list[str]:
    """The data sets (field ``"task"``) or groups (``"group"``) of items, each once, in alphabetical order.

    Raises:
        ValueError: items lack the field.
    """
    items = list(items)
    unknown = [item_name(item) for item in items if item.get(field) in (None, "")]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(items)} scans have no {field!r}: {few(unknown)}. Give it in the data list "
            f'(--data_list_file_path), once for all its scans, {{"{field}": NAME, "training": [...]}}, or for each, '
            f'{{"image": PATH, "{field}": NAME}}. Several lists are given as --data_list_file_path '
            "\"['first.json','second.json']\"."
        )
    return sorted({str(item[field]) for item in items})


def labelled_items(
    data_list_file_path: PathLike | Sequence[PathLike],
    dataset_dir: PathLike | None = None,
    key: str | Sequence[str] = "training",
    annotated_key: str | None = None,
) -> list[dict]:
    """Read the labelled cases of a data list in the style of the Medical Segmentation Decathlon.

    Args:
        data_list_file_path: see :func:`load_datalist`, but each entry has ``"image"`` and ``"label"``.
        dataset_dir, key: see :func:`load_datalist`.
        annotated_key: field of an entry that lists the organs annotated in its label map; others are unknown there,
            not background. Where an entry lacks it, ``"annotated"`` counts, as in the splits that training writes.
            None: every label map shows all organs.

    Returns:
        Cases in the file's order: ``{"image": absolute path, "label": absolute path}``, plus ``"series_uid"`` and
        ``"patient"`` where given and ``"annotated"``, a list of names, with an ``annotated_key``.

    Raises:
        ValueError: the list cannot be used (see :func:`load_datalist`), or entries lack a label or, with an
            ``annotated_key``, the names of the annotated organs. All such entries are named at once.
    """
    cases, problems = [], []
    kept = ("label", "patient", "annotated", annotated_key)
    for item in load_datalist(data_list_file_path, dataset_dir, key, keep=kept):
        case = {name: item[name] for name in ("image", *READING_FIELDS, "label", "patient") if name in item}
        if not _is_path(case.get("label")):
            problems.append(f"{item_name(item)} has no single 'label' path, but {case.get('label')!r}")
        if annotated_key:
            organs = case["annotated"] = item.get(annotated_key, item.get("annotated"))
            if not isinstance(organs, list) or not all(isinstance(organ, str) for organ in organs):
                problems.append(f"{item_name(item)} has no list of organ names under {annotated_key!r}: {organs!r}")
        cases.append(case)
    if problems:
        raise ValueError(
            f"{len(problems)} entries under {key!r} of data list {data_list_file_path} cannot be used:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\nComplete or remove them."
        )
    return cases


def named_items(items: Sequence[Mapping]) -> list[dict]:
    """Items with a ``"name"`` each, see :func:`unique_names`."""
    return [{**item, "name": name} for item, name in zip(items, unique_names(items), strict=True)]


def without_suffix(path: str) -> str:
    """The path of a file without its ending, or of a folder."""
    return path if os.path.isdir(path) else path[: len(path) - len(file_suffix(path))]


def unique_names(items: Sequence[Mapping]) -> list[str]:
    """File names for outputs: the scan's own where no other scan has it, else with its folders or series before it."""
    names = [Path(without_suffix(item["image"])).name for item in items]
    if len(set(names)) == len(names):
        return names
    root = os.path.commonpath([os.path.dirname(item["image"]) for item in items])
    count = Counter(names)
    for index, item in enumerate(items):
        if count[names[index]] > 1:
            below = Path(os.path.relpath(without_suffix(item["image"]), root))
            # A list says what it likes; a name is of one file, in one folder.
            uid = re.sub(r"[^\w.-]", "_", str(item.get("series_uid") or ""))
            names[index] = "_".join(filter(None, [*below.parts, uid]))
    # Two formats of one scan in one folder.
    count = Counter(names)
    taken = set(names)
    for index, name in enumerate(names):
        if count[name] > 1:
            names[index] = next(new for n in itertools.count(index) if (new := f"{name}_{n}") not in taken)
            taken.add(names[index])
    return names
