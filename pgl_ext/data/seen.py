"""Which scans a network has seen, and whose: recorded beside its weights, so that it is not tested on them unawares."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from monai.config import PathLike

from pgl_ext.data.datalist import item_name
from pgl_ext.errors import few
from pgl_ext.files import files_below, read_json
from pgl_ext.transforms.dicom import scan_header
from pgl_ext.transforms.formats import image_files, is_dicom_file

__all__ = ["NO_FILES", "patient_of", "patients_text", "scan_digests", "seen_scans", "seen_text"]

NO_FILES = hashlib.sha256().hexdigest()[:16]
"""The digest of a scan whose files are lost."""

_END = 65536  # bytes: enough to tell scans apart, and little to read of hundred thousands


def scan_digests(items: Iterable[Mapping[str, Any]], weights: PathLike | None = None) -> list[str]:
    """What tells the scans of a training again: digests of their files' contents, without names.

    Args:
        items: scans with ``"image"``.
        weights: file that the training starts from; the scans recorded beside it count too.

    Returns:
        16 hexadecimal digits for each scan, or channel in a file, of the sizes and both ends of its files, sorted.
    """
    return sorted({_digest(file) for item in items for file in image_files(item)} | seen_scans(weights))


def seen_scans(weights: PathLike | None) -> set[str]:
    """The digests that are recorded beside a file of weights; none where nothing is."""
    path = None if weights is None else Path(weights).with_suffix(".json")
    if path is None or not path.is_file():
        return set()
    data = read_json(path, "Description").get("data")
    return set(data.get("scans") or ()) if isinstance(data, Mapping) else set()


def seen_text(items: Collection[Mapping[str, Any]], seen: Collection[str]) -> str:
    """In words, which test scans a network has seen; empty where it has seen none."""
    known = [item for item in items if any(_digest(file) in seen for file in image_files(item))] if seen else []
    if not known:
        return ""
    return (
        f"{len(known)} of the {len(items)} test scans, such as {item_name(known[0])}, are among those that the network "
        "was trained or pre-trained on: scores on them say nothing sure about new patients."
    )


def patients_text(parts: Mapping[str, Iterable[Mapping[str, Any]]]) -> str:
    """In words, which patients have scans in several parts of a split; empty where none has.

    Args:
        parts: items by what they serve for. A patient is what the field ``"patient"`` of a data list says, or the
            PatientID of DICOM files; what is of no known patient counts as of one of its own.
    """
    where: dict[str, dict[str, str]] = defaultdict(dict)
    for part, items in parts.items():
        for item in items:
            if patient := patient_of(item):
                where[patient].setdefault(part, item_name(item))
    shared = [" and ".join(f"{n} ({part})" for part, n in names.items()) for names in where.values() if len(names) > 1]
    if not shared:
        return ""
    return (
        f"{len(shared)} patients have scans in several parts of the split: {few(shared, 2, '; ')}. Scores on patients "
        "that were trained on say nothing sure about new ones: list each patient's scans under one key alone."
    )


def patient_of(item: Mapping[str, Any]) -> str:
    """Whose scan an item is, as the data list or DICOM files say; empty where that is not known."""
    if item.get("patient") not in (None, ""):
        return str(item["patient"])
    path = str(item["image"])
    wanted = item.get("series_uid")
    for file in filter(is_dicom_file, files_below(path)):
        header = scan_header(file, ["PatientID"])
        if header is not None and wanted in (None, "", header.SeriesInstanceUID):
            return str(header.get("PatientID", "")).strip()
    return ""


def _digest(path: PathLike) -> str:
    """Of a file, or of the files of a DICOM series' folder; of what is missing, that of nothing."""
    content = hashlib.sha256()
    for file in map(Path, files_below(str(path))):
        if file.is_file():
            size = file.stat().st_size
            content.update(str(size).encode())
            with open(file, "rb") as stream:
                content.update(stream.read(_END))
                stream.seek(max(0, size - _END))
                content.update(stream.read())
    return content.hexdigest()[:16]
