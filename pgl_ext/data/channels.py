"""Scans of several channels: what the data say that these are, and which files belong to one scan."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgl_ext.files import read_json
from pgl_ext.transforms.formats import file_suffix

__all__ = ["channel_item", "channels_of_folder", "grouped_channels", "listed_channels", "numbered_files"]


def listed_channels(content: Mapping[str, Any], source: Any) -> list[str]:
    """The names of the channels that a ``dataset.json`` gives, in their order; empty where it gives none.

    Args:
        content: of the file: ``channel_names`` (nnU-Net 2) or ``modality`` (nnU-Net 1, Decathlon), a dict by number
            from 0, a list, or one name.
        source: the file, for messages.

    Raises:
        ValueError: they are something else.
    """
    given = content.get("channel_names", content.get("modality")) or []
    names = [given] if isinstance(given, str) else given
    if isinstance(names, Mapping):
        numbers = [str(number) for number in range(len(names))]
        names = [names[number] for number in numbers] if set(numbers) == set(names) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{source} names channels as {given!r}: give each a name by its number from 0, such as "
            '{"channel_names": {"0": "T1", "1": "T2"}}.'
        )
    return names


def channels_of_folder(folder: str) -> list[str]:
    """The channels that a ``dataset.json`` in a folder, or beside it, names; empty where there is none."""
    for place in (folder, os.path.dirname(folder)):
        path = os.path.join(place, "dataset.json")
        if os.path.isfile(path):
            with contextlib.suppress(ValueError):  # damaged, or not a list at all: nothing that scans need
                return listed_channels(read_json(path), path)
    return []


def channel_item(files: Sequence[str], names: Sequence[str] = ()) -> dict[str, Any]:
    """The entries of an item that say what its image is read from: one file, or one for each channel."""
    item: dict[str, Any] = {"image": files[0]}
    if len(files) > 1:
        item["further_channels"] = list(files[1:])
    return {**item, "channel_names": list(names)} if len(names) > 1 else item


def grouped_channels(files: Iterable[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """Items of the files of a folder, of which those that nnU-Net numbers, ``CASE_0000`` and so on, are one scan.

    Args:
        files: of volumes.
        names: of the channels; of one channel, or none, each file is a scan.
    """
    files = sorted(files)
    if len(names) < 2:
        return [channel_item([file]) for file in files]
    known, scans = set(files), {}
    for file in files:
        wanted = numbered_files(file, len(names))
        # Numbers of cases look alike, but have no case 0 each. What is missing of a scan, reading it names.
        first = wanted[0] if wanted and wanted[0] in known else file
        scans.setdefault(first, set(wanted if first in wanted else [])).add(file)
    return [channel_item(sorted(found), names) for found in scans.values()]


def numbered_files(path: str, channels: int, unnumbered: bool = False) -> list[str]:
    """The names that nnU-Net gives the files of a scan, ``CASE_0000`` and so on, whatever there is of them.

    Args:
        path: one of them.
        channels: their number.
        unnumbered: whether it may also be their name without the number.

    Returns:
        none where the path has no number.
    """
    stem = path[: len(path) - len(file_suffix(path))]
    numbered = re.fullmatch(r"(.+)_\d{4}", Path(stem).name)
    if not numbered and not unnumbered:
        return []
    stem = stem[: -len("_0000")] if numbered else stem
    return [f"{stem}_{channel:04d}{path[len(path) - len(file_suffix(path)) :]}" for channel in range(channels)]
