"""Choosing the settings of a training from the data: ``pgl plan``.

Spacing follows nnU-Net's rule: the median, and along the worst axis of very anisotropic scans a lower percentile. The
patch is as large as the network's memory on the device allows, with the proportions of the median scan.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pgl_ext.data.channels import listed_channels
from pgl_ext.data.headers import Header, read_headers
from pgl_ext.data.memory import total_memory
from pgl_ext.data.structures import annotated_field, found_structures, listed_ignore_label, listed_structures
from pgl_ext.networks.base import SegmentationNetwork
from pgl_ext.networks.build import NETWORKS
from pgl_ext.tools.bundles import config_path
from pgl_ext.tools.data import Data, read_data
from pgl_ext.tools.study.configs import merged_config
from pgl_ext.transforms.load import LoadVolumed

__all__ = ["ARCHITECTURES", "Data", "Plan", "expected_time", "make_plan", "read_data", "saved_bytes"]

ARCHITECTURES = {"resnet50": None, **{family: family for family in NETWORKS if family != "resnet"}}
"""Overlays in ``configs/networks`` by architecture; the paper's network needs none."""

CT_WINDOW = (-1024, 325)  # HU, the paper's
_ANISOTROPY = 3  # from which the worst axis is resampled to a lower percentile
_LOWER_PERCENTILE = 10
_LOOKED_AT = 8  # scans whose intensities are looked at where the data do not say what they are
# Peak memory of a training step, in multiples of what autograd keeps: 1.4 to 1.75 of four networks on a CPU.
_PEAK = 1.75
_SMALL_VOXELS = 48 * 48 * 32  # of a patch, for a CPU
_LARGEST = 192  # voxels of a patch along an axis
_SPARE = 0.7  # share of the memory to plan with


@dataclass
class Plan:
    """Settings for both bundles, and why each is what it is.

    Args:
        settings: by name, as ``train.json`` has them.
        reasons: by name of the setting, a remark beside it.
        head: remarks above all.
        architecture: a key of :data:`ARCHITECTURES`.
        small: whether the presets for a CPU go before.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    head: list[str] = field(default_factory=list)
    architecture: str = "dynunet"
    small: bool = False

    def set(self, name: str, value: Any, reason: str) -> None:
        """Add a setting."""
        self.settings[name], self.reasons[name] = value, reason

    @property
    def configs(self) -> list[str]:
        """The overlays of a bundle that go between ``train.json`` and the plan."""
        return overlays(self.architecture, self.small)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read what :meth:`text` has written, perhaps edited since.

        Raises:
            ValueError: it is no plan.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            architecture, preset = (content.pop(name) for name in ("_desc_architecture", "_desc_preset"))
        except (AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is no plan ({error!r}): give a file that 'pgl plan' wrote.") from error
        return cls(content, dict.fromkeys(content, f"of {path}"), [f"Of {path}."], architecture, preset == "small")

    def text(self) -> str:
        """As a commented YAML overlay."""
        lines = [*(f"# {line}" for line in self.head), ""]
        lines += [f"_desc_architecture: {_yaml(self.architecture)}"]
        lines += [f"_desc_preset: {'small' if self.small else 'full'}", ""]
        for name, value in self.settings.items():
            lines += [f"# {self.reasons[name]}", f"{name}: {_yaml(value)}"]
        return "\n".join(lines) + "\n"


def overlays(architecture: str, small: bool) -> list[str]:
    """The files in ``configs/`` of an architecture and of the preset for a CPU, in their order."""
    name = ARCHITECTURES[architecture]
    files = [f"networks/{name}.yaml"] if name else []
    return [*files, *(["small.yaml"] * small), *([f"networks/{name}_small.yaml"] if name and small else [])]


def make_plan(
    data: Data,
    configs: str | os.PathLike,
    architecture: str = "dynunet",
    small: bool | None = None,
    record: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
    memory: float | None = None,
) -> Plan:
    """Choose settings for pre-training on scans, or fine-tuning on cases.

    Args:
        data: what there is to train on.
        configs: folder ``configs`` of the bundle pgl_segmentation.
        architecture: a key of :data:`ARCHITECTURES`.
        small: whether to take the presets for a CPU; None: where there is no GPU.
        record: the settings that follow from pre-trained weights; they are not chosen anew.
        given: those that the user chose.
        memory: bytes of the device; None: those that it has.

    Raises:
        ValueError: data or architecture are none that can be planned for.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"the architecture {architecture!r} is not known: choose one of {', '.join(ARCHITECTURES)}.")
    has_gpu = torch.cuda.is_available()
    plan = Plan(architecture=architecture, small=not has_gpu if small is None else small)
    headers = read_headers(data.items)
    plan.head += [f"Planned for {data.source}: {_summary(data, headers)}", *_device(has_gpu)]
    for known, reason in ((record, "as recorded beside the weights"), (given, "as given")):
        for name, value in (known or {}).items():
            plan.set(name, value, reason)
    if "spacing" not in plan.settings:
        plan.set("spacing", *_spacing([header.spacing for header in headers]))
    if "channel_names" not in plan.settings and len(data.channel_names) > 1:
        plan.set("channel_names", data.channel_names, "channels, in their order")
    if "hu_window" not in plan.settings:
        plan.set("hu_window", *_intensity(data, plan.settings.get("channel_names", ["image"])))
    if data.labelled:
        _plan_structures(plan, data)
    _plan_patch(plan, headers, configs, memory or _memory(has_gpu))
    return plan


def _summary(data: Data, headers: Sequence[Header]) -> str:
    shape, spacing = (np.median(values, axis=0) for values in zip(*headers, strict=True))
    kind = "labelled cases" if data.labelled else "scans"
    size = " x ".join(f"{value:g}" for value in shape)
    return f"{len(headers)} {kind}, {size} voxels of {' x '.join(f'{value:.3g}' for value in spacing)} mm (medians)."


def _device(has_gpu: bool) -> list[str]:
    if has_gpu:
        return [f"Device: {torch.cuda.get_device_name()}, {_memory(True) / 2**30:.0f} GiB."]
    return [f"Device: CPU, {os.cpu_count()} cores, {_memory(False) / 2**30:.0f} GiB."]


def _memory(has_gpu: bool) -> float:
    # In all, not what is free just now: another start of the same command plans the same.
    return torch.cuda.mem_get_info()[1] if has_gpu else total_memory()


def _spacing(spacings: Sequence[Sequence[float]]) -> tuple[list[float], str]:
    """The spacing to resample to, by nnU-Net's rule."""
    target = np.median(spacings, axis=0)
    worst = int(np.argmax(target))
    reason = "mm along x, y, z: median of the scans"
    if target[worst] > _ANISOTROPY * np.max(np.delete(target, worst)):
        lower = np.percentile(np.array(spacings)[:, worst], _LOWER_PERCENTILE)
        target[worst] = max(lower, np.max(np.delete(target, worst)))
        reason += f", along the worst axis the {_LOWER_PERCENTILE}th percentile"
    return [float(f"{value:.3g}") for value in target], reason


def _intensity(data: Data, channels: Sequence[str]) -> tuple[list | None, str]:
    """The HU window of CT, None of other scans; of several channels that differ, of each."""
    names = listed_channels(data.content, data.source) or (data.items[0].get("channel_names") or [])
    if len(names) == len(channels):
        is_ct, reason = [name.upper() == "CT" for name in names], f"{', '.join(names)}, as the data list says"
    else:
        step = max(1, len(data.items) // _LOOKED_AT)
        load = LoadVolumed("image", channel_names=channels)
        scans = [load(item)["image"].flatten(1).amin(1).tolist() for item in data.items[::step][:_LOOKED_AT]]
        # Air has -1000 HU, and no scan of another modality is that far below 0.
        is_ct = [float(lowest) <= -500 for lowest in np.median(scans, axis=0)]
        found = ["CT" if ct else "no CT" for ct in is_ct]
        reason = f"{', '.join(found)}, as the intensities of {len(scans)} scans tell"
    if all(is_ct):
        return list(CT_WINDOW), f"HU; {reason}"
    if any(is_ct):
        return [list(CT_WINDOW) if ct else None for ct in is_ct], f"by channel, HU; {reason}"
    return None, f"{reason}: each scan gets zero mean and unit standard deviation, none is clipped"


def _plan_structures(plan: Plan, data: Data) -> None:
    """What is to be segmented, by the data list or else the label maps."""
    structures, reason = listed_structures(data.content, data.source), "as the data list names them"
    listed = listed_ignore_label(data.content)
    if "ignore_label" not in plan.settings and listed is not None:
        plan.set("ignore_label", listed, "label value of voxels that count nowhere, as the data list says")
    if not structures:
        found = found_structures(data.items, plan.settings.get("ignore_label"))
        structures, reason = found, "the values of the label maps"
    entries = data.content.get(data.settings.get("data_list_key", ""), [])
    annotated, spelt = annotated_field(entries if entries and isinstance(entries[0], dict) else [], structures)
    used = [value for values in structures.values() for value in values]
    partly = annotated is not None and any(len(set(entry[annotated])) < len(structures) for entry in entries)
    plan.set("organs", {spelt.get(name, name): values for name, values in structures.items()}, reason)
    plan.set("background_values", [0], "label values that belong to no structure")
    overlapping = len(used) > len(set(used))
    why = "structures overlap" if overlapping else "not all are annotated in each case" if partly else "none overlap"
    plan.set("multi_label", overlapping or partly, f"whether each structure is decided by itself: {why}")
    if annotated:
        plan.set("annotated_key", annotated, "which structures were annotated, by case")


def _plan_patch(plan: Plan, headers: Sequence[Header], configs: str | os.PathLike, memory: float) -> None:
    """Size of patches and views, and memory of a step."""
    target = plan.settings["spacing"]
    extents = np.array([header.shape for header in headers])
    if target is not None:
        extents = extents * np.array([header.spacing for header in headers]) / np.array(target)
    network, config = _network(plan, configs)
    batch = int(config["batch_size"])
    multiple = np.lcm.reduce(np.array(network.feature_network.level_strides), axis=0)

    def fits(patch: np.ndarray) -> bool:
        if plan.small:
            return bool(np.prod(patch) <= _SMALL_VOXELS)
        return batch * _PEAK * saved_bytes(network, patch) <= _SPARE * memory

    patch = _largest_patch(np.median(extents, axis=0), multiple, fits)
    needed = batch * _PEAK * saved_bytes(network, patch) / 2**30
    plan.set("patch_size", patch.tolist(), f"voxels; {batch} of them need some {needed:.2g} GiB (within 20 %)")
    # Crops for views are larger than these, up to 1.4 times.
    view = np.minimum(patch, np.maximum(multiple, np.median(extents, axis=0) / 1.2 // multiple * multiple))
    plan.set("view_size", view.astype(int).tolist(), "voxels, of pre-training")


def _network(plan: Plan, configs: str | os.PathLike) -> tuple[SegmentationNetwork, Mapping[str, Any]]:
    """The network of the plan, without values, and the merged config of fine-tuning."""
    files = [config_path(name, configs) for name in ("train.json", *plan.configs)]
    names = ("network_def", "encoder", "organs", "background_values", "multi_label", "channel_names")
    settings = {"organs": {"structure": 1}, **plan.settings}
    config = merged_config([*files, {name: settings[name] for name in names if name in settings}])
    with torch.device("meta"):
        return config.get_parsed_content("network_def").train(), config


def _largest_patch(median: np.ndarray, multiple: np.ndarray, fits: Callable[[np.ndarray], bool]) -> np.ndarray:
    """The largest patch that fits, with the proportions of the median scan; whole multiples along each axis."""
    patch = np.clip(np.ceil(median / multiple), 1, np.maximum(1, _LARGEST // multiple)).astype(int) * multiple
    while not fits(patch) and (patch > multiple).any():
        axis = int(np.argmax(np.where(patch > multiple, patch / median, 0)))
        patch[axis] -= multiple[axis]
    return patch


def saved_bytes(network: SegmentationNetwork, patch: Sequence[int]) -> int:
    """Bytes that autograd keeps for one patch."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor)] = tensor  # also so that no other gets its id
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Two, since batch norm refuses a single value for each channel.
        network(torch.zeros(2, network.arguments["in_channels"], *patch, device="meta"))
    weights = {id(parameter) for parameter in network.parameters()}
    return sum(t.numel() * t.element_size() for id_, t in kept.items() if id_ not in weights) // 2


def expected_time(plan: Plan, configs: str | os.PathLike) -> list[str]:
    """How long fine-tuning takes here, in a sentence; nothing where that is not known, or takes long to measure."""
    network, config = _network(plan, configs)
    if config["patches_per_case"] is not None or not (plan.small or torch.cuda.is_available()):
        return []
    steps, batch = config["max_epochs"] * config["steps_per_epoch"], int(config["batch_size"])
    seconds = _seconds(network, plan.settings["patch_size"])
    hours = steps * batch * seconds / 3600
    return [
        f"Fine-tuning: {steps} steps of {batch} patches, about {hours:.2g} h, at {seconds:.2g} s a patch, as measured "
        "just now."
    ]


def _seconds(network: SegmentationNetwork, patch: Sequence[int]) -> float:
    """Seconds that a training step takes for one patch on the device that trains, the second time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = deepcopy(network).to_empty(device=device)
    images = torch.zeros(2, network.arguments["in_channels"], *patch, device=device)
    for _ in range(2):
        start = time.perf_counter()
        network(images).sum().backward()
        torch.cuda.synchronize() if device.type == "cuda" else None
    return (time.perf_counter() - start) / len(images)


def _yaml(value: Any) -> str:
    """One value as YAML of one line."""
    return json.dumps(value, ensure_ascii=False)
