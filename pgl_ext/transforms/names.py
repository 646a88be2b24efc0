"""Names as numbers, for losses that classify."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

__all__ = ["NameToIndexd"]


class NameToIndexd(MapTransform):
    """Replace a name by its place in a list of names; a batch then holds (B,) int64.

    Args:
        keys: keys of the names.
        names: all names that may occur, in the order that numbers them from 0.

    Raises:
        ValueError: from a call, where a name is not in the list.

    Example:
        >>> NameToIndexd("task", ["colon", "liver"])({"task": "liver"})
        {'task': 1}
    """

    def __init__(self, keys: KeysCollection, names: Sequence[str]) -> None:
        super().__init__(keys)
        self.numbers = {str(name): number for number, name in enumerate(names)}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.keys:
            if str(d[key]) not in self.numbers:
                raise ValueError(f"{key} {d[key]!r} is not among the names {list(self.numbers)}: add it to them.")
            d[key] = self.numbers[str(d[key])]
        return d
