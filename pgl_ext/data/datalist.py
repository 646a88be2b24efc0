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

from pgl_ext.data.channels import channel_item, listed_channels, numbered_files
from pgl_ext.errors import few
from pgl_ext.files import read_json
from pgl_ext.transforms.formats import (
    READING_FIELDS,
    SUPPORTED,
    SUPPORTED_SUFFIXES,
    file_suffix,
    has_known_suffix,
    image_files,
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
            ``"dataset"``, these are found. An ``"image"`` of several channels is a list of files, the first of several
            files that nnU-Net numbers, or a file of four dimensions; the file's ``"channel_names"`` or ``"modality"``
            say what they are.
        dataset_dir: folder that relative paths start from; by default the folder of each JSON file.
        key: which list of the file to take, or which lists: ``("training", "test")`` also takes the Decathlon's scans
            without labels. Of several each file has all, of which some may be empty.
        keep: further fields of the entries to keep, as they are, but a path as ``"label"`` absolute.

    Returns:
        Items in the file's order with absolute ``"image"`` paths, plus ``"series_uid"``, ``"orientation"``, ``"task"``,
        ``"group"`` and the fields ``keep`` where given, and of several channels ``"channel_names"`` and
        ``"further_channels"``, the files behind the first. All other fields are dropped.

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
    kept, names = (*_KEPT_KEYS, *keep), listed_channels(content, path)
    items = [_to_item(entry, index, dataset_dir, path, kept, names) for index, entry in enumerate(entries)]
    items = [{**sources, **item} for item in items]
    unsupported = [file for item in items for file in image_files(item) if not _is_supported(file)]
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
        content["training"] = [{**case, "image": case["images"]} for case in cases.values()]
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


def _files_of(path: str, names: Sequence[str]) -> list[str]:
    """The files of an image that is listed by one name: of several channels, or without number, those of nnU-Net."""
    numbered = numbered_files(path, max(1, len(names)), unnumbered=not os.path.exists(path))
    if not numbered or not os.path.exists(numbered[0]):
        return [path]
    if len(names) < 2:
        # Without names as many as there are; the file of a channel that is listed as such stands for itself.
        return [path] if os.path.exists(path) else _consecutive(path)
    return numbered


def _consecutive(path: str) -> list[str]:
    for channels in itertools.count(1):
        numbered = numbered_files(path, channels, unnumbered=True)
        if not os.path.exists(numbered[-1]):
            return numbered[:-1]


def _to_item(
    entry: object, index: int, dataset_dir: PathLike | None, path: Path, kept: Iterable[str], names: Sequence[str]
) -> dict:
    entry = {"image": entry} if isinstance(entry, str) else entry
    images = entry.get("image") if isinstance(entry, dict) else None
    images = [images] if _is_path(images) else images
    if not isinstance(images, list) or not images or not all(map(_is_path, images)):
        raise ValueError(
            f"Entry {index} of data list {path} has no 'image' path: {entry!r}. Each entry must be a path or an object "
            "with a path under 'image', or a list of them, one for each channel."
        )
    item = {name: entry[name] for name in kept if name in entry}
    names = item.pop("channel_names", names)
    if _is_path(item.get("label")):
        item["label"] = listed_path(item["label"], path, dataset_dir)
    files = [listed_path(image, path, dataset_dir) for image in (*images, *item.pop("further_channels", ()))]
    files = _files_of(files[0], names) if len(files) == 1 else files
    if 1 < len(files) != len(names) > 0:
        raise ValueError(
            f"Entry {index} of data list {path} has {len(files)} files, {few(files)}, for the channels {list(names)}: "
            "give a file for each, in this order."
        )
    return {**item, **channel_item(files, names)}


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
    # Of several channels, the case's that nnU-Net numbers.
    names = [
        name.removesuffix("_0000") if "further_channels" in item else name
        for name, item in zip(names, items, strict=True)
    ]
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
