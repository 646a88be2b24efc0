"""What there is to train on: the scans or cases in a folder or a data list that a user names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgl_ext.data.datalist import item_name, load_datalist
from pgl_ext.data.find import find_cases, find_volumes
from pgl_ext.files import read_json
from pgl_ext.transforms.formats import image_files
from pgl_ext.weights import InputRecord

__all__ = ["Data", "read_data"]


@dataclass(frozen=True)
class Data:
    """What there is to train on.

    Args:
        items: scans, or cases with ``"label"``.
        settings: of the bundles' configs that name them, such as ``data_list_file_path``.
        content: of the ``dataset.json``; empty where there is none.
        source: of the data, for messages.
    """

    items: list[dict[str, Any]]
    settings: dict[str, Any]
    content: Mapping[str, Any]
    source: str

    @property
    def labelled(self) -> bool:
        return all("label" in item for item in self.items)

    @property
    def channel_names(self) -> list[str]:
        """The channels of all scans: names, or numbers of several that nothing names; ``image`` of one.

        Raises:
            ValueError: scans differ in them.
        """
        scans = {_channels(item): item_name(item) for item in self.items}
        if len(scans) > 1:
            listed = "; ".join(f"{name}: {list(channels)}" for channels, name in scans.items())
            raise ValueError(f"scans of {self.source} differ in their channels: {listed}. Give each the same.")
        (names,) = scans
        return list(names)


def _channels(item: Mapping[str, Any]) -> tuple[str, ...]:
    count = len(image_files(item))
    return tuple(item.get("channel_names") or InputRecord(channels=count).channel_names)


def read_data(
    path: str | os.PathLike, key: str = "training", labelled: bool | None = None, channel_names: Sequence[str] = ()
) -> Data:
    """Find the scans in a folder or in a JSON data list.

    Args:
        path: folder, with a Decathlon-style ``dataset.json`` or without, or the list itself.
        key: the list in it.
        labelled: whether label maps are needed; False: they are left aside; None: taken where all scans have one.
        channel_names: of scans in a folder whose channels are files of their own, see
            :func:`~pgl_ext.data.find.find_volumes`.

    Raises:
        ValueError: there are none.
    """
    path = Path(os.path.abspath(os.path.expanduser(path)))
    lists = path / "dataset.json" if path.is_dir() else path
    content = read_json(lists, "Data list") if lists.suffix == ".json" and lists.is_file() else {}
    if isinstance(content.get(key), list) and content[key]:
        items = load_datalist(lists, None, key, keep=[] if labelled is False else ["label"])
        settings = {"data_list_file_path": str(lists), "data_list_key": key}
    elif lists == path:
        raise ValueError(f"{path} is neither a folder nor a JSON data list with the list {key!r}: give one of them.")
    else:
        has_labels = labelled is None and any((path / name).is_dir() for name in ("labelsTr", "labels"))
        items = (find_cases if labelled or has_labels else find_volumes)(path, channel_names)
        settings = {"dataset_dir": str(path)}
    if labelled and not all("label" in item for item in items):
        raise ValueError(f"some scans of {path} have no label map: give labelled cases.")
    return Data(items, settings, content, str(path))
