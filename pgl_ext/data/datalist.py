"""Finding volumes, reading data lists and splitting them."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "SOURCE_FIELDS",
    "SUPPORTED_SUFFIXES",
    "dicom_header",
    "file_suffix",
    "find_volumes",
    "is_dicom_file",
    "item_name",
    "listed_path",
    "load_datalist",
    "source_names",
    "split_datalist",
    "walk_folders",
]

logger = logging.getLogger(__name__)

SOURCE_FIELDS = ("task", "group")
"""Fields of an item that say where it is from: its data set, and what this is merged into ("abdomen CT")."""

_LABEL_FOLDERS = {"labels": "images", "labelstr": "imagestr", "labelsts": "imagests"}
_PATH_KEYS = ("image", "label")
_KEPT_KEYS = ("image", "series_uid", *SOURCE_FIELDS)


def item_name(item: Mapping) -> str:
    """One item's path, with the series UID where a folder may hold several: unique within a data list."""
    uid = item.get("series_uid")
    return f"{item['image']} (series {uid})" if uid else str(item["image"])


def find_volumes(dataset_dir: str | os.PathLike) -> list[dict]:
    """Find every volume in a folder and the folders below it.

    NIfTI, NRRD and MetaImage files and DICOM series are found. Files of other types and hidden files are passed
    over, so are DICOM objects that hold no image volume. Folders called ``labels``, ``labelsTr`` or ``labelsTs`` next
    to ``images``, ``imagesTr`` or ``imagesTs``, and ``.seg.nrrd`` files, are left out.

    Where a ``dataset.json`` lies in the folder, prefer :func:`load_datalist`: it knows which files are images, and
    which belong to a held-out set.

    Args:
        dataset_dir: folder to search; links to folders are followed.

    Returns:
        Items ordered by path: ``{"image": absolute path}`` for a file, ``{"image": absolute folder, "series_uid":
        SeriesInstanceUID}`` for each DICOM series in a folder.

    Raises:
        ValueError: the folder is missing, is a file, or holds no volume.
        ImportError: there are DICOM files and ``pydicom`` is not installed.
    """
    root = os.path.abspath(dataset_dir)
    remedy = f"Set it to a folder of volumes; {SUPPORTED}."
    if not os.path.exists(root):
        raise ValueError(f"Dataset folder {root} does not exist. {remedy}")
    if not os.path.isdir(root):
        raise ValueError(f"Dataset folder {root} is a file, not a folder. {remedy}")
    items: list[dict] = []
    left_out = 0
    for folder, names, is_label_folder in walk_folders(root):
        volumes = [n for n in names if file_suffix(n) in SUPPORTED_SUFFIXES and file_suffix(n) not in DICOM_SUFFIXES]
        labels = [n for n in volumes if is_label_folder or n.lower().endswith(".seg.nrrd")]
        left_out += len(labels)
        items += [{"image": os.path.join(folder, n)} for n in volumes if n not in labels]
        if not is_label_folder:
            items += [{"image": folder, "series_uid": uid} for uid in _dicom_series(folder, names)]
    if left_out:
        logger.info("%s: left out %d label files.", root, left_out)
    if not items:
        raise ValueError(f"Dataset folder {root} holds no volumes. {remedy}")
    return sorted(items, key=item_name)


def walk_folders(root: str) -> Iterator[tuple[str, list[str], bool]]:
    """Each folder below ``root`` once: its path, its visible files, and whether it lies in a label folder."""
    label_roots: set[str] = set()
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        # Links may form a loop.
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        siblings = {f.lower() for f in folders}
        inside = folder in label_roots
        label_roots.update(
            os.path.join(folder, f) for f in folders if inside or _LABEL_FOLDERS.get(f.lower()) in siblings
        )
        yield folder, sorted(n for n in names if not n.startswith(".")), inside


def _dicom_series(folder: str, names: Sequence[str]) -> list[str]:
    """UIDs of the DICOM series in ``folder`` that make up a volume."""
    paths = [os.path.join(folder, n) for n in names]
    paths = [p for p in paths if file_suffix(p) in DICOM_SUFFIXES or (not _has_known_suffix(p) and is_dicom_file(p))]
    slices: dict[str, int] = {}
    for path in paths:
        uid, count = _series_and_slices(path)
        if uid:
            slices[uid] = slices.get(uid, 0) + count
    single = [uid for uid, count in slices.items() if count < 2]
    if single:
        logger.info("%s: left out %d DICOM series of a single slice.", folder, len(single))
    return sorted(set(slices) - set(single))


def _has_known_suffix(path: str) -> bool:
    # DICOM files are often named by their UID alone, whose last part then looks like a suffix.
    suffix = file_suffix(path)
    return bool(suffix) and not suffix[1:].isdigit()


def _series_and_slices(path: str) -> tuple[str, int]:
    """SeriesInstanceUID and number of slices in one DICOM file; ``("", 0)`` if it holds no scan."""
    try:
        header = dicom_header(path, ["SeriesInstanceUID", "Modality", "Rows", "NumberOfFrames"])
    except OSError as error:
        logger.warning("%s is not a readable DICOM file and is left out: %s", path, error)
        return "", 0
    is_scan = "Rows" in header and header.get("Modality") not in ("SEG", "RTDOSE")
    return (str(header.get("SeriesInstanceUID", "")), int(header.get("NumberOfFrames") or 1)) if is_scan else ("", 0)


def load_datalist(
    data_list_file_path: str | os.PathLike | Sequence[str | os.PathLike],
    dataset_dir: str | os.PathLike | None = None,
    key: str = "training",
    keep: Iterable[str] = (),
) -> list[dict]:
    """Read a data list in the style of the Medical Segmentation Decathlon, or several that are aggregated.

    For lists with labels see :func:`pgl_ext.data.cases.labelled_items`.

    Args:
        data_list_file_path: JSON file that maps ``key`` to a list of paths, or of dicts with ``"image"``. Its own
            ``"task"`` and ``"group"`` are those of the entries without; for the task, ``"name"`` will do, and a list
            without a group is one of its own. Or several such files.
        dataset_dir: folder that relative paths start from; by default the folder of the JSON file, of each its own.
        key: which list of the file to take.
        keep: further fields of the entries to keep, as they are, but a path as ``"label"`` absolute.

    Returns:
        Items in the file's order with absolute ``"image"`` paths, plus ``"series_uid"``, ``"task"``, ``"group"`` and
        the fields ``keep`` where given. Everything else, labels in particular, is dropped.

    Raises:
        ValueError: a file is missing, not JSON, or lacks ``key``; an entry has no ``"image"`` or one of an unsupported
            type; not one of the images of a file exists; or a scan is named more than once, in one file or several.
    """
    single = isinstance(data_list_file_path, (str, os.PathLike))
    paths = [data_list_file_path] if single else data_list_file_path
    items = [item for path in paths for item in _read_list(Path(path), dataset_dir, key, keep)]
    twice = [name for name, count in Counter(map(item_name, items)).items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} scans are in the data list more than once: {_few(twice)}. Held out for validation as one "
            f"entry, they would be trained on as another: remove all but one of each from {data_list_file_path}."
        )
    return items


def _read_list(path: Path, dataset_dir: str | os.PathLike | None, key: str, keep: Iterable[str]) -> list[dict]:
    content = _read_content(path, key)
    task = content.get("task", content.get("name"))
    sources = {"task": task, "group": content.get("group", task)}
    sources = {field: value for field, value in sources.items() if value is not None}
    kept = (*_KEPT_KEYS, *keep)
    items = [{**sources, **_to_item(entry, index, dataset_dir, path, kept)} for index, entry in enumerate(content[key])]
    unsupported = [item["image"] for item in items if not _is_supported(item["image"])]
    if unsupported:
        raise ValueError(
            f"Data list {path} names {len(unsupported)} files of an unsupported type: {_few(unsupported)}. Convert or "
            f"remove them; {SUPPORTED}."
        )
    # Single files that are missing are left to the start-up scan, which lists every bad file at once.
    if not any(os.path.exists(item["image"]) for item in items):
        raise ValueError(
            f"None of the {len(items)} images of data list {path} exists, such as {items[0]['image']}: set dataset_dir "
            "to the folder that its paths start from."
        )
    return items


def _read_content(path: Path, key: str) -> dict:
    if not path.is_file():
        raise ValueError(f"Data list {path} does not exist or is not a file: give the path of a JSON data list.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Data list {path} is not valid JSON: {error}. Correct the file.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Data list {path} holds a {type(content).__name__}, not an object with a list {key!r}.")
    lists = [name for name, value in content.items() if isinstance(value, list) and value]
    if key not in lists:
        raise ValueError(f"Data list {path} has no entries under the key {key!r}; keys with entries: {lists}.")
    return content


def listed_path(path: str, data_list_file_path: str | os.PathLike, dataset_dir: str | os.PathLike | None = None) -> str:
    """The absolute path that a data list means by ``path``: relative ones start from ``dataset_dir``, or the list."""
    base = os.path.abspath(Path(data_list_file_path).parent if dataset_dir is None else dataset_dir)
    return os.path.normpath(os.path.join(base, os.path.expanduser(path)))


def _to_item(entry: object, index: int, dataset_dir: str | os.PathLike | None, path: Path, kept: Iterable[str]) -> dict:
    entry = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or not entry["image"]:
        raise ValueError(
            f"Entry {index} of data list {path} has no single 'image' path: {entry!r}. Each entry must be a path or an "
            "object with one path under 'image'."
        )
    item = {name: entry[name] for name in kept if name in entry}
    paths = {name: item[name] for name in _PATH_KEYS if isinstance(item.get(name), str) and item[name]}
    return item | {name: listed_path(value, path, dataset_dir) for name, value in paths.items()}


def _is_supported(path: str) -> bool:
    return (
        file_suffix(path) in SUPPORTED_SUFFIXES
        or not _has_known_suffix(path)
        or os.path.isdir(path)
        or is_dicom_file(path)
    )


def _few(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def source_names(items: Iterable[Mapping], field: str) -> list[str]:
    """The data sets or groups that items are from.

    Args:
        items: data items.
        field: ``"task"`` or ``"group"``, see :data:`SOURCE_FIELDS`.

    Returns:
        The names, each once, in alphabetical order.

    Raises:
        ValueError: items lack the field.
    """
    items = list(items)
    unknown = [item_name(item) for item in items if item.get(field) in (None, "")]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(items)} scans have no {field!r}: {_few(unknown)}. Give it in the data list "
            f'(--data_list_file_path), once for all its scans, {{"{field}": NAME, "training": [...]}}, or for each, '
            f'{{"image": PATH, "{field}": NAME}}. Several lists are given as --data_list_file_path '
            "\"['first.json','second.json']\"."
        )
    return sorted({str(item[field]) for item in items})


def split_datalist(items: Iterable[Mapping], validation_fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Split items at random into a training and a validation part.

    The split depends on the seed and on which items there are, not on their order. With a fraction above 0 the
    validation part has at least one item and leaves at least one for training; a single item serves as both.

    Args:
        items: data items with ``"image"``.
        validation_fraction: share of the items to validate on, in [0, 1).
        seed: of the random choice.

    Returns:
        The training items and the validation items, each ordered by path.

    Raises:
        ValueError: the fraction is outside [0, 1).
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}.")
    ordered = sorted((dict(item) for item in items), key=item_name)
    if validation_fraction == 0 or not ordered:
        return ordered, []
    if len(ordered) == 1:
        logger.warning("Only one volume, %s: it serves for training and for validation.", item_name(ordered[0]))
        return ordered, [dict(ordered[0])]
    count = min(max(1, round(validation_fraction * len(ordered))), len(ordered) - 1)
    chosen = set(np.random.RandomState(seed).permutation(len(ordered))[:count].tolist())
    train = [item for index, item in enumerate(ordered) if index not in chosen]
    return train, [ordered[index] for index in sorted(chosen)]
