"""What is recorded beside a file of weights: how to build its network, and how its input is prepared.

A record is a JSON file of the weights' name. It is data: nothing in it is imported or evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from monai.config import PathLike
from monai.utils import ensure_tuple

from pgl_ext import __version__
from pgl_ext.files import read_json
from pgl_ext.settings import check_fields, flat_entries
from pgl_ext.task import SegmentationTask

__all__ = ["SHA256", "EncoderRecord", "InputRecord", "ModelRecord"]

SHA256 = "sha256"
"""Entry of the JSON beside files: their checksums by suffix. They are of the files and no part of the record."""

_R = TypeVar("_R", bound="_Record")


@dataclass(frozen=True)
class InputRecord:
    """How the volumes that a network sees are prepared.

    Args:
        hu_window: (low, high) that intensities are clipped to, in HU or the scans' own unit; None: not clipped; or such
            an entry for each channel. Then each channel gets zero mean and unit standard deviation.
        spacing: mm per voxel of each axis that volumes are resampled to; None: as stored.
        patch_size: (X, Y, Z) in voxels of the patches, or views, that the network was trained on.
        channels: of the input, as many as have names.
        orientation: of the voxel axes.
        channel_names: in their order; by default ``image``, or numbers of several.

    Raises:
        ValueError: there are more or fewer names than channels.
    """

    hu_window: Sequence[float] | Sequence[Sequence[float] | None] | None = None
    spacing: Sequence[float] | None = None
    patch_size: Sequence[int] | None = None
    channels: int = 1
    orientation: str = "RAS"
    channel_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        numbered = [f"channel {number}" for number in range(self.channels)]
        names = list(self.channel_names or (["image"] if self.channels == 1 else numbered))
        if self.channels not in (1, len(names)):
            raise ValueError(f"there are {self.channels} channels, but the names {names}: give each one.")
        object.__setattr__(self, "channel_names", names)
        object.__setattr__(self, "channels", len(names))

    @classmethod
    def from_json(cls, content: Any, source: Any, channels: int = 1) -> InputRecord:
        """Make one of what a record has as ``input``.

        Args:
            content: the entries.
            source: the file, for messages.
            channels: of the network, where the entries do not say.

        Raises:
            ValueError: it is something else.
        """
        names = {entry.name for entry in fields(cls)}
        unknown = sorted(set(content) - names) if isinstance(content, Mapping) else [content]
        if unknown:
            raise ValueError(f"{source} describes its input by {unknown}: install the version that wrote it.")
        known = check_fields(cls, {"channels": channels, **content}, source)
        try:
            return cls(**known)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: PathLike) -> InputRecord | None:
        """Read it from the JSON beside a file of weights, of whatever kind; None where that does not say.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged.
        """
        source, content = _read(path)
        content = _upgraded(content)
        return cls.from_json(content["input"], source) if "input" in content else None

    def check_channels(self, names: Sequence[str], source: Any) -> None:
        """Refuse channels that weights cannot start with: other than their several, in number or order.

        Raises:
            ValueError: naming the source, the file of weights.
        """
        before, now = self.channel_names, list(names)
        if before != now and (sorted(before) == sorted(now) or len(before) not in (1, len(now))):
            raise ValueError(
                f"{source} was trained on the channels {before}, here they are {now}: give these, in the order of the "
                "weights, or weights that were trained on one channel or on those here."
            )

    def differences(self, other: InputRecord) -> list[str]:
        """What another preparation differs in, in words with the options that set it."""
        differences = []
        if _floats(self.hu_window) != _floats(other.hu_window):
            differences.append(f"clipped to {self.hu_window} HU, here {_floats(other.hu_window)} (--hu_window)")
        if self.channel_names != other.channel_names and max(self.channels, other.channels) > 1:
            differences.append(f"channels {self.channel_names}, here {other.channel_names} (--channel_names)")
        if _floats(self.spacing) != _floats(other.spacing):
            here = _floats(other.spacing) or "as stored"
            differences.append(f"spacing {self.spacing or 'as stored'}, here {here} mm (--spacing)")
        if self.orientation != other.orientation:
            differences.append(f"voxel axes {self.orientation}, here {other.orientation}")
        return differences


def _floats(values: Any) -> Any:
    """A number as float, and so each of a list."""
    if isinstance(values, (list, tuple)):
        return [_floats(value) for value in values]
    return None if values is None else float(values)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What the records of encoders and models have in common.

    Args:
        input: how volumes are prepared.
        steps: optimiser steps of the training.
        data: what was trained on, such as the number of scans.
        version: of this package.
        others: further entries, which are kept as they are: optimiser, learning rate, seed, views.
    """

    input: InputRecord
    steps: int = 0
    data: Mapping = field(default_factory=dict)
    version: str = __version__
    others: Mapping = field(default_factory=dict)

    @classmethod
    def from_json(cls: type[_R], content: Mapping, source: Any) -> _R:
        """Make a record of what a JSON file or a checkpoint holds.

        Args:
            content: the entries.
            source: the file, for messages.

        Raises:
            ValueError: something is missing, or of another kind than it should be.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{source} holds a {type(content).__name__}, no description: give {cls._remedy}.")
        content = _upgraded(content)
        missing = sorted(set(cls._needed) - set(content))
        if missing:
            raise ValueError(f"{source} does not describe {cls._what}, it lacks {missing}: give {cls._remedy}.")
        names = {entry.name for entry in fields(cls)} - {"others"}
        known = {name: content.pop(name) for name in names & set(content)}
        known["input"] = InputRecord.from_json(known["input"], source, _in_channels(known[cls._built]))
        return cls(**check_fields(cls, known, source), others=content)

    @classmethod
    def load(cls: type[_R], path: PathLike) -> _R:
        """Read the record beside a file of weights, which itself need not exist.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or describes something else.
        """
        source, content = _read(path)
        return cls.from_json(content, source)

    def to_json(self) -> dict:
        """All entries as plain values."""
        content = asdict(self)
        others = content.pop("others")
        return json.loads(json.dumps({**content, **others}))


@dataclass(frozen=True, kw_only=True)
class EncoderRecord(_Record):
    """What is recorded beside the encoder that pre-training leaves.

    Args:
        architecture: ``family`` of the encoder, and the ``arguments`` that build it.
        method: name of the pre-training method.
        pairs: of views that it has seen.
        stride: voxels per cell of the deepest feature map, per axis.
        channels: of each feature map, finest first.
        pretrained: file that pre-training went on from; None: random weights.
    """

    architecture: Mapping
    method: str | None = None
    pairs: int | None = None
    stride: Sequence[int] | None = None
    channels: Sequence[int] | None = None
    pretrained: str | None = None

    _what = "an encoder"
    _remedy = "the pgl_encoder.pt that pre-training wrote, with its JSON beside it"
    _built = "architecture"
    _needed = ("architecture", "input")

    @classmethod
    def load_or_default(cls, path: PathLike | None) -> EncoderRecord:
        """Read the record beside an encoder file; where there is none, that of the paper's ResNet-50 and its input."""
        if path is not None and Path(path).with_suffix(".json").is_file():
            return cls.load(path)
        return cls(architecture={"family": "resnet", "arguments": {}}, input=InputRecord(hu_window=[-1024, 325]))


@dataclass(frozen=True, kw_only=True)
class ModelRecord(_Record):
    """What is recorded beside the segmentation model that fine-tuning leaves.

    Args:
        task: arguments of ``SegmentationTask``.
        network: ``family`` of the network, and the ``arguments`` that build it.
        annotated_key: field of its data list that says which organs were annotated; None: all are.
        pretrained_encoder, pretrained_decoder: files that training started from; None: random weights.
        epoch: of the best validation.
        val_mean_dice: of that validation.
    """

    task: Mapping
    network: Mapping
    annotated_key: str | None = None
    pretrained_encoder: str | None = None
    pretrained_decoder: str | None = None
    epoch: int | None = None
    val_mean_dice: float | None = None

    _what = "a segmentation model"
    _remedy = "the models/model.pt that fine-tuning wrote, with its JSON beside it"
    _built = "network"
    _needed = ("task", "network", "input")

    @classmethod
    def from_json(cls, content: Any, source: Any) -> ModelRecord:
        """See :meth:`EncoderRecord.from_json`."""
        record = super().from_json(content, source)
        if record.input.patch_size is None:
            raise ValueError(f"{source} does not describe {cls._what}, it lacks a patch_size: give {cls._remedy}.")
        try:
            SegmentationTask(**record.task)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source} describes a task that is none ({error}): give {cls._remedy}.") from error
        return record

    @classmethod
    def load_or_default(cls, path: PathLike | Sequence[PathLike], metadata: PathLike) -> ModelRecord:
        """Read the record beside a model file; where there is no file yet, that of the bundle's default task.

        The checks of bundles build the network of a bundle that comes without weights.

        Args:
            path: model file, or several that are averaged.
            metadata: the bundle's ``metadata.json``, whose ``channel_def`` names the organs of the default network.

        Raises:
            FileNotFoundError: there is neither.
            ValueError: a record is damaged, or several differ in how scans are prepared or in the task.
        """
        path, *others = ensure_tuple(path)
        if others:
            first = cls.load(path)
            for other in others:
                first._check_same(cls.load(other), path, other)
            return first
        if Path(path).with_suffix(".json").is_file() or Path(path).is_file():
            return cls.load(path)
        if not Path(metadata).is_file():
            raise FileNotFoundError(
                f"Model file {Path(path).absolute()} does not exist: give the one that fine-tuning wrote, --model_path."
            )
        content = read_json(metadata)
        image, task = content["network_data_format"]["inputs"]["image"], SegmentationTask.of_channels(content)
        names = list(image["channel_def"].values())
        arguments = {"in_channels": image["num_channels"], "out_channels": task.out_channels}
        return cls(
            task=task.description(),
            network={"family": "resnet", "arguments": arguments},
            input=InputRecord(hu_window=[-1024, 325], patch_size=image["spatial_shape"], channel_names=names),
        )

    def _check_same(self, other: ModelRecord, path: PathLike, other_path: PathLike) -> None:
        """Refuse another record whose network cannot be averaged with this one's."""
        here, there = (
            flat_entries({name: record.to_json()[name] for name in ("input", "task")}) for record in (self, other)
        )
        for name in sorted({**here, **there}):
            if here.get(name) != there.get(name):
                raise ValueError(
                    f"{path} has the {name.replace('#', ' ')} {here.get(name)}, {other_path} has {there.get(name)}: "
                    "networks that are averaged must be of one task, with scans prepared alike. Give those of one "
                    "training with folds."
                )


def _read(weights: PathLike) -> tuple[Path, dict]:
    """The JSON file beside a file of weights, and what it holds."""
    name, path = Path(weights).name, Path(weights).with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(f"no description {path} beside {name}: copy both, they belong together.")
    content = read_json(path, "Description", f"copy it again, together with {name}")
    content.pop(SHA256, None)
    return path, content


def _in_channels(architecture: Any) -> Any:
    """Channels of the input of a recorded network."""
    arguments = architecture.get("arguments") if isinstance(architecture, Mapping) else None
    return arguments.get("in_channels", 1) if isinstance(arguments, Mapping) else 1


def _upgraded(content: Mapping) -> dict:
    """Entries of records that were written before architectures had families and inputs an entry of their own."""
    content = dict(content)
    for name in ("architecture", "network"):
        if isinstance(content.get(name), Mapping) and "family" not in content[name]:
            content[name] = {"family": "resnet", "arguments": content[name]}
    if "normalization" in content and "input" not in content:
        window = content.pop("normalization")
        content["input"] = {
            "hu_window": window.get("clip_hu") if isinstance(window, Mapping) else window,
            "spacing": content.pop("spacing", None),
            "patch_size": content.pop("view_size", None) or content.pop("patch_size", None),
            "orientation": content.pop("orientation", "RAS"),
        }
    return content
