"""Which scans a network has seen, recorded beside its weights, so that it is not tested on them unawares."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from monai.config import PathLike

from pgl_ext.data.datalist import item_name
from pgl_ext.files import read_json, visible_files

__all__ = ["scan_digests", "seen_scans", "seen_text"]

_END = 65536  # bytes: enough to tell scans apart, and little to read of hundred thousands


def scan_digests(items: Iterable[Mapping[str, Any]], weights: PathLike | None = None) -> list[str]:
    """What tells the scans of a training again: digests of their files' contents, without names.

    Args:
        items: scans with ``"image"``.
        weights: file that the training starts from; the scans recorded beside it count too.

    Returns:
        16 hexadecimal digits for each scan, of the sizes and both ends of its files, sorted.
    """
    return sorted({_digest(item["image"]) for item in items} | seen_scans(weights))


def seen_scans(weights: PathLike | None) -> set[str]:
    """The digests that are recorded beside a file of weights; none where nothing is."""
    path = None if weights is None else Path(weights).with_suffix(".json")
    if path is None or not path.is_file():
        return set()
    data = read_json(path, "Description").get("data")
    return set(data.get("scans") or ()) if isinstance(data, Mapping) else set()


def seen_text(items: Collection[Mapping[str, Any]], seen: Collection[str]) -> str:
    """In words, which test scans a network has seen; empty where it has seen none."""
    known = [item for item in items if _digest(item["image"]) in seen] if seen else []
    if not known:
        return ""
    return (
        f"{len(known)} of the {len(items)} test scans, such as {item_name(known[0])}, are among those that the network "
        "was trained or pre-trained on: scores on them say nothing sure about new patients."
    )


def _digest(path: PathLike) -> str:
    """Of a file, or of the files of a DICOM series' folder; of what is missing, that of nothing."""
    folders = visible_files(str(path)) if os.path.isdir(path) else []
    files = [Path(folder, name) for folder, _, names in folders for name in names] or [Path(path)]
    content = hashlib.sha256()
    for file in files:
        if file.is_file():
            size = file.stat().st_size
            content.update(str(size).encode())
            with open(file, "rb") as stream:
                content.update(stream.read(_END))
                stream.seek(max(0, size - _END))
                content.update(stream.read())
    return content.hexdigest()[:16]
