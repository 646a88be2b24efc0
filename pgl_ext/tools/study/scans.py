"""The scans that a study pre-trains on: how many each data list gives, and that none is a test scan."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple

from pgl_ext.data.datalist import item_name, load_datalist
from pgl_ext.data.find import find_volumes
from pgl_ext.tools.study.configs import Command

__all__ = ["check_unseen", "scans_text"]

_LIST_SETTINGS = ("data_list_file_path", "dataset_dir", "data_list_key")


def scans_text(pretraining: Command, expected: Sequence[int]) -> str:
    """A sentence on how many scans each of several data lists gives to pre-train on; empty where there is one, or none.

    Args:
        pretraining: any method's, since all have the same scans.
        expected: what each list should give, in their order; empty: whatever it does.

    Raises:
        ValueError: one gives another number.
    """
    paths, *where = (pretraining.config()[name] for name in _LIST_SETTINGS)
    paths = ensure_tuple(paths or ())
    if not expected and len(paths) < 2:
        return ""
    counts = [len(load_datalist(path, *where)) for path in paths]
    listed = ", ".join(
        f"{count} of {'/'.join(Path(path).parts[-2:])}" for count, path in zip(counts, paths, strict=True)
    )
    if expected and counts != list(expected):
        raise ValueError(
            f"the scans to pre-train on are {listed or 'in no data list'}, where the study has {expected}: complete "
            'the lists, or go on with what there is, --pretraining#scans "[]".'
        )
    return f"Pre-trained on {sum(counts)} scans: {listed}."


def check_unseen(pretraining: Command, test: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a study whose methods are pre-trained on test scans.

    A scan that another list names differently is known by the content of its file.

    Raises:
        ValueError: there is such a scan.
    """
    config = pretraining.config()
    if config["data_list_file_path"]:
        scans = load_datalist(*(config[name] for name in _LIST_SETTINGS))
    else:
        folder = config["dataset_dir"]
        scans = find_volumes(folder, config["channel_names"]) if folder else []
    paths = {_resolved(scan) for scan in scans}
    by_size: dict[int, list[str]] = {}
    for scan in scans:
        if _file_size(scan):
            by_size.setdefault(_file_size(scan), []).append(scan["image"])
    seen = [
        case
        for case in test
        if _resolved(case) in paths
        or any(filecmp.cmp(case["image"], other, shallow=False) for other in by_size.get(_file_size(case), ()))
    ]
    if seen:
        raise ValueError(
            f"{len(seen)} of the {len(test)} test scans are pre-trained on, such as {item_name(seen[0])}: give another "
            "data_list_file_path or data_list_key under pretraining: settings, or under test: settings."
        )


def _resolved(item: Mapping[str, Any]) -> str:
    return item_name({**item, "image": os.path.realpath(item["image"])})


def _file_size(item: Mapping[str, Any]) -> int:
    """Bytes of a scan's file; 0 of a DICOM series, and where there is none."""
    return os.path.getsize(item["image"]) if os.path.isfile(item["image"]) else 0
