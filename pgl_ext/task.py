"""What is segmented: organs, the label values they have in files, and how the network's output encodes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from pgl_ext.settings import parse_bool

__all__ = ["SegmentationTask"]


class SegmentationTask:
    """The organs of a task, and how label maps, network outputs and masks of organs turn into each other.

    The output channels of a multi-class task are the background and the organs, and each voxel has one class. A
    multi-label task has one channel per organ, each a binary decision of its own, so that organs may overlap: a tumour
    within its organ.

    Args:
        organs: label values in the label files, by name of the organ; the order is that of the channels. Several
            values are united: ``{"kidney": [1, 2], "tumour": [2]}``.
        background_values: label values that belong to no organ. Any other value in a label file is an error.
        multi_label: whether organs are decided each by itself, as they must where they overlap.
        ignore_label: label value of voxels that nothing is known of, left out of loss and scores; None: there is none.

    Attributes:
        names: the organs' names.
        out_channels: channels of the network's output.
        values: all label values that a file may hold.
        ignored: the value to ignore, or nothing.

    Raises:
        ValueError: there is no organ, a label value is negative or not a whole number, or organs share a value
            although the task is not multi-label.

    Example:
        >>> task = SegmentationTask({"kidney": [1, 2], "tumour": [2]}, multi_label=True)
        >>> task.masks_of_labels(torch.tensor([[[[0, 1, 2]]]])).int().tolist()
        [[[[0, 1, 1]]], [[[0, 0, 1]]]]
    """

    def __init__(
        self,
        organs: Mapping[str, Sequence[int] | int],
        background_values: Sequence[int] = (0,),
        multi_label: bool = False,
        ignore_label: int | None = None,
    ) -> None:
        if not isinstance(organs, Mapping):
            raise ValueError(f"organs must give label values by name, such as {{'spleen': [1]}}, got {organs!r}.")
        self.organs = {str(name): _values(values, name) for name, values in organs.items()}
        self.background_values = _values(background_values, "background")
        self.multi_label = parse_bool(multi_label, "multi_label")
        self.ignored = () if ignore_label is None else _values(ignore_label, "ignore_label")
        if not self.organs:
            raise ValueError("the task has no organs: give the label values of each, such as organs = {'spleen': [1]}.")
        used = [value for values in self.organs.values() for value in values]
        shared = sorted({value for value in used if used.count(value) > 1})
        if shared and not self.multi_label:
            raise ValueError(
                f"organs {self.organs} share the label values {shared}: overlapping organs need multi_label = true."
            )
        both = sorted(set(used) & set(self.background_values))
        if both:
            raise ValueError(f"the label values {both} belong to an organ and to background_values: choose one.")
        if set(self.ignored) & {*used, *self.background_values}:
            raise ValueError(
                f"ignore_label is {ignore_label}, also a value of an organ or of background_values: choose one."
            )
        self.names: tuple[str, ...] = tuple(self.organs)
        self.out_channels = len(self.names) + (0 if self.multi_label else 1)
        self.values: tuple[int, ...] = tuple(sorted({*used, *self.background_values, *self.ignored}))

    @classmethod
    def of_channels(cls, metadata: Mapping[str, Any]) -> SegmentationTask:
        """The task of a network whose channels a bundle's ``metadata.json`` names, with label values 1, 2, ..."""
        pred = metadata["network_data_format"]["outputs"]["pred"]
        names = [name for name in pred["channel_def"].values() if name != "background"]
        organs = {name: [value] for value, name in enumerate(names, start=1)}
        return cls(organs, multi_label=len(organs) == pred["num_channels"])

    def check_annotated(self, annotated: torch.Tensor) -> None:
        """Refuse cases of which not all organs are annotated, bool (..., organs), unless the task is multi-label.

        Raises:
            ValueError: the task is not multi-label: the background then holds the other organs, unmarked.
        """
        if not self.multi_label and not bool(annotated.all()):
            raise ValueError(
                "an organ is not annotated in some of the cases, so that a multi-class task cannot tell it from "
                "background: set multi_label to true, or leave that organ or those cases out."
            )

    def masks_of_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Masks of the organs (..., organs, X, Y, Z) of a label map with the files' values (..., 1, X, Y, Z)."""
        return torch.cat([self.mask_of_labels(labels, organ) for organ in self.names], dim=-4)

    def mask_of_labels(self, labels: torch.Tensor, organ: str) -> torch.Tensor:
        """Mask of one organ (..., 1, X, Y, Z) of a label map with the files' values (..., 1, X, Y, Z)."""
        first, *further = self.organs[organ]
        mask = labels == first
        for value in further:
            mask |= labels == value
        return mask

    def known_voxels(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Where a label map does not say to ignore the voxel, bool of its shape; None: everywhere."""
        if not self.ignored:
            return None
        known = labels != self.ignored[0]
        return None if bool(known.all()) else known

    def without_ignored(self, masks: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Masks (..., X, Y, Z), without the voxels that a label map (1, X, Y, Z) says to ignore."""
        known = self.known_voxels(labels)
        return masks if known is None else masks & known

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """What the output channels should be, 0 or 1 in float32 (..., out_channels, X, Y, Z), of a label map."""
        masks = self.masks_of_labels(labels)
        if not self.multi_label:
            masks = torch.cat([~masks.any(dim=-4, keepdim=True), masks], dim=-4)
        return masks.float()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of the output channels (..., out_channels, X, Y, Z)."""
        return torch.sigmoid(logits) if self.multi_label else torch.softmax(logits, dim=-4)

    def masks_of_probabilities(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Masks of the organs (..., organs, X, Y, Z): above one half, or the most probable class."""
        return probabilities > 0.5 if self.multi_label else self._most_probable(probabilities)

    def masks(self, logits: torch.Tensor) -> torch.Tensor:
        """Masks of the organs (..., organs, X, Y, Z) of logits (..., out_channels, X, Y, Z)."""
        return logits > 0 if self.multi_label else self._most_probable(logits)

    def _most_probable(self, scores: torch.Tensor) -> torch.Tensor:
        # Some four times faster than argmax along an axis that is not the last.
        best = scores.max(dim=-4, keepdim=True).indices
        return torch.cat([best == index for index in range(1, self.out_channels)], dim=-4)

    def labels_of_masks(self, masks: torch.Tensor) -> torch.Tensor:
        """Label map (..., 1, X, Y, Z) with the files' values, uint8 or int16, of masks (..., organs, X, Y, Z).

        Where masks overlap, the organ of fewer label values counts, of equally many the later one. An organ of several
        values has the first one that no such organ has: a kidney of [1, 2] becomes 1, the tumour of [2] in it 2.
        """
        dtype = torch.uint8 if self.values[-1] < 256 else torch.int16
        labels = torch.zeros_like(masks.narrow(-4, 0, 1), dtype=dtype)
        for name in self._from_large_to_small():
            index = self.names.index(name)
            labels[masks.narrow(-4, index, 1)] = self.label_values[index]
        return labels

    @property
    def label_values(self) -> tuple[int, ...]:
        """The value that each organ has in label maps that are written."""
        chosen: dict[str, int] = {}
        taken: set[int] = set()
        for name in reversed(self._from_large_to_small()):
            values = self.organs[name]
            chosen[name] = next((value for value in values if value not in taken), values[0])
            taken.update(values)
        return tuple(chosen[name] for name in self.names)

    def _from_large_to_small(self) -> list[str]:
        """The organs in an order that has an organ before those within it, which have fewer label values."""
        return sorted(self.names, key=lambda name: -len(self.organs[name]))

    def channels_of(self, organs: Iterable[str]) -> list[bool]:
        """Whether each of the task's organs is among some organs."""
        organs = set(organs)
        return [name in organs for name in self.names]

    def description(self) -> dict:
        """The arguments that build this task again, as plain values."""
        return {
            "organs": {name: list(values) for name, values in self.organs.items()},
            "background_values": list(self.background_values),
            "multi_label": self.multi_label,
            "ignore_label": self.ignored[0] if self.ignored else None,
        }


def _values(values: Sequence[int] | int, name: str) -> tuple[int, ...]:
    listed = tuple(values) if isinstance(values, Sequence) else (values,)
    if not listed or not all(isinstance(value, (int, float)) and value >= 0 and value % 1 == 0 for value in listed):
        raise ValueError(f"the label values of {name!r} must be whole numbers from 0, got {values!r}.")
    return tuple(int(value) for value in listed)
