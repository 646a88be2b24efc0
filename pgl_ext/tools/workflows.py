"""What ``pgl`` makes of data, plan and weights: the workflow of a bundle to run, and what to say of its result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgl_ext.evaluation.summary import AVERAGE, number_text
from pgl_ext.files import read_csv, read_json, write_text
from pgl_ext.networks.build import ENCODERS, NETWORKS, build
from pgl_ext.tools.bundles import bundle_folder, config_path
from pgl_ext.tools.launch import BundleRun, option_value
from pgl_ext.tools.plan import Data, Plan, make_plan
from pgl_ext.tools.task_config import task_config
from pgl_ext.weights import decoder_file, recorded_architecture, recorded_input

__all__ = [
    "Pretrained",
    "evaluation",
    "fine_tuning",
    "fine_tuning_configs",
    "inference",
    "model_file",
    "plan_of",
    "pretraining",
    "probe",
    "recorded",
    "result_of_evaluation",
    "result_of_fine_tuning",
    "result_of_pretraining",
    "weights_file",
    "write_plan",
]

_INPUT = ("spacing", "hu_window")
_OF_DATA = ("channel_names", "ignore_label")
_WITH_ADAMW = ("mae", "pgl_mae")


def _configs(bundle: str) -> Path:
    return bundle_folder(bundle) / "configs"


class Pretrained:
    """Weights of a pre-training, and what is recorded beside them, or what a published file tells itself.

    Args:
        path: the encoder file, or the folder that pre-training wrote.

    Attributes:
        encoder: file of the encoder.
        decoder: file of the decoder; None where there is none.
        input: how volumes were prepared; None where nothing says so.

    Raises:
        FileNotFoundError: there are none.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.encoder = weights_file(path, "pgl_encoder.pt")
        self.decoder = decoder_file(self.encoder)
        self.input = recorded_input(self.encoder)
        self._network = recorded_architecture(self.encoder)

    @property
    def weights(self) -> dict[str, str]:
        """Settings of fine-tuning that load them."""
        files = {"pretrained_encoder": str(self.encoder)}
        return files if self.decoder is None else {**files, "pretrained_decoder": str(self.decoder)}

    def settings(self, channels: int) -> dict[str, Any]:
        """Settings of fine-tuning that follow from the record: how scans are prepared, and the network.

        Args:
            channels: of the scans; a window of intensities is recorded for as many as those of the weights.
        """
        settings = {} if self.input is None else {name: getattr(self.input, name) for name in _INPUT}
        if self.input is not None and channels != self.input.channels:
            settings.pop("hu_window")
        config = task_config(_configs("pgl_segmentation"), (), encoder=self.encoder)
        if self.architecture == "resnet50":
            return {**settings, "encoder": config["encoder"]}
        network = config["network_def"]
        # Its heads have no weights of their own yet.
        return {**settings, "network_def": NETWORKS[self.architecture].with_deep_supervision(network)}

    @property
    def architecture(self) -> str:
        """Of the network, as ``--architecture`` names it."""
        family = self._network["family"]
        return "resnet50" if family == "resnet" else family

    def use_in_pretraining(self, plan: Plan) -> dict[str, str]:
        """Make the network of a plan for pre-training theirs; the settings that load them."""
        network = build(ENCODERS, self._network, self.encoder)
        arguments = dict(network.arguments)
        if "out_channels" in arguments:  # it restores its input
            arguments["out_channels"] = arguments["in_channels"]
        plan.settings.pop("network_def", None)
        target = f"pgl_ext.networks.{type(network).__name__}"
        plan.set("encoder", {"_target_": target, **arguments}, "that of the weights that pre-training goes on from")
        return {"pretrained": str(self.encoder)}

    def check(self, given: Mapping[str, Any]) -> None:
        """Refuse settings that contradict the record.

        Raises:
            ValueError: naming both values.
        """
        for name in _INPUT if self.input is not None else ():
            recorded = getattr(self.input, name)
            if name in given and _as_value(given[name]) != _as_value(recorded):
                raise ValueError(
                    f"--{name} is {given[name]}, but the weights {self.encoder} were trained with {recorded}: leave "
                    f"--{name} out, or pre-train with it."
                )


def _as_value(value: Any) -> Any:
    """A setting as typed, or as recorded, to compare."""
    value = option_value("", value) if isinstance(value, str) else value
    if isinstance(value, (list, tuple)):
        return [part if isinstance(part, str) else _as_value(part) for part in value]
    return float(value) if isinstance(value, int) else value


def write_plan(plan: Plan, folder: Path) -> str:
    """Write the plan to an output folder; the file."""
    write_text(folder / "plan.yaml", plan.text())
    return str(folder / "plan.yaml")


def pretraining(
    data: Data,
    out: Path,
    plan: Plan,
    method: str,
    settings: Mapping[str, Any],
    processes: int = 1,
    pretrained: Pretrained | None = None,
) -> BundleRun:
    """Pre-train on scans.

    Args:
        data: the scans.
        out: folder to write.
        plan: settings for the data.
        method: an overlay in ``configs/methods``, without its suffix, or ``pgl``.
        settings: further ones, which override all others.
        processes: one for each GPU.
        pretrained: weights to go on from, the plan's network becomes theirs; None: random ones.
    """
    configs = _configs("pgl_pretrain")
    start = {} if pretrained is None else pretrained.use_in_pretraining(plan)
    overlays = [*plan.configs, *([] if method == "pgl" else [f"methods/{method}.yaml"])]
    overlays += ["small_adamw.yaml"] if plan.small and method in _WITH_ADAMW else []
    names = ["train.json", *overlays, *(["multi_gpu_train.json"] if processes > 1 else [])]
    files = [*(config_path(name, configs) for name in names), write_plan(plan, out)]
    return BundleRun("training", files, {**data.settings, "output_dir": str(out), **start, **settings}, processes)


def plan_of(
    data: Data, architecture: str, small: bool | None, pretrained: Pretrained | None, given: Mapping[str, str]
) -> Plan:
    """The plan for data; of pre-trained weights network and preparation are theirs, and some settings are given."""
    configs = _configs("pgl_segmentation")
    known = {name: _as_value(given[name]) for name in _INPUT if name in given}
    known |= {name: option_value(name, given[name]) for name in _OF_DATA if name in given}
    if pretrained is None:
        return make_plan(data, configs, architecture, small, None, known)
    channels = known.get("channel_names", data.channel_names)
    if pretrained.input is not None:  # before anything is prepared
        pretrained.input.check_channels(channels, pretrained.encoder)
    return make_plan(data, configs, pretrained.architecture, small, pretrained.settings(len(channels)), known)


def fine_tuning_configs(plan: Plan, pretrained: bool) -> tuple[list[str], list[str]]:
    """The config files of a fine-tuning but for the plan: of any start, and of the recipe of one, which come after."""
    start = [f"start/{'pretrained' if pretrained else 'random'}.yaml", *["start/small.yaml"] * plan.small]
    # The recipes are for networks with instance or group norm: all but the paper's.
    names = ["train.json", *plan.configs], [] if plan.architecture == "resnet50" else start
    return tuple([config_path(name, _configs("pgl_segmentation")) for name in part] for part in names)


def fine_tuning(
    data: Data, out: Path, plan: Plan, pretrained: Pretrained | None, settings: Mapping[str, Any]
) -> BundleRun:
    """Fine-tune on labelled cases, from pre-trained weights or from random ones.

    Args:
        data: the cases.
        out: folder to write.
        plan: settings for the data.
        pretrained: the weights; None: random ones.
        settings: further ones, which override all others.
    """
    base, start = fine_tuning_configs(plan, pretrained is not None)
    files = [*base, *start, write_plan(plan, out)]
    weights = {} if pretrained is None else pretrained.weights
    return BundleRun("training", files, {**data.settings, "output_dir": str(out), **weights, **settings})


def weights_file(path: str | os.PathLike, *names: str) -> Path:
    """The file of weights that is meant by a file, or by a folder that a training wrote.

    Args:
        path: the file, the folder, or the folder ``models`` in it.
        names: of the file in a folder, the first that is there.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(os.path.abspath(os.path.expanduser(path)))
    places = [folder / name for name in names for folder in (path / "models", path)]
    found = [file for file in ([path] if path.is_file() else places) if file.is_file()]
    if not found:
        wrote = {"model.pt": "'pgl finetune'", "pgl_encoder.pt": "'pgl pretrain'"}
        known = [name for name in names if name in wrote]
        raise FileNotFoundError(
            f"{path} holds no {' or '.join(known)}: give such a file, or the folder that "
            f"{' or '.join(map(wrote.get, known))} wrote."
        )
    return found[0]


def model_file(path: str | os.PathLike) -> Path:
    """The model file that is meant by a file, or by the folder that a training wrote; of one with folds the folder.

    Raises:
        FileNotFoundError: there is none, or folds are not finished.
        ValueError: there are folds and a model without.
    """
    path = Path(os.path.abspath(os.path.expanduser(path)))
    if not (path / "fold_0").is_dir():
        return weights_file(path, "model.pt")
    if (path / "models" / "model.pt").is_file():
        raise ValueError(f"{path} has models/model.pt and folds, of two trainings: give that file, or remove it.")
    if not (path / "evaluation" / "cases.csv").is_file():
        raise FileNotFoundError(f"{path} holds folds that are not finished: repeat 'pgl finetune', which goes on.")
    return path


def probe(data: Data, out: Path, plan: Plan, pretrained: Pretrained | None, settings: Mapping[str, Any]) -> BundleRun:
    """Fit a linear classifier on an encoder's features, and score it; args as of :func:`fine_tuning`."""
    files = [*fine_tuning_configs(plan, False)[0], write_plan(plan, out)]
    files.append(config_path("probe.yaml", _configs("pgl_segmentation")))
    weights = {} if pretrained is None else {"pretrained_encoder": str(pretrained.encoder)}
    return BundleRun("probing", files, {**data.settings, "output_dir": str(out), **weights, **settings})


def inference(model: Path, scans: str | os.PathLike, out: Path, settings: Mapping[str, Any]) -> BundleRun:
    """Segment the scans of a folder, of a data list, or of one file, with a model."""
    scans = Path(os.path.abspath(os.path.expanduser(scans)))
    where = {"data_list_file_path" if scans.suffix == ".json" else "dataset_dir": str(scans)}
    files = [config_path("inference.json", _configs("pgl_segmentation"))]
    return BundleRun("", files, {**where, "model_path": str(model), "output_dir": str(out), **settings})


def evaluation(model: Path, data: Data | None, out: Path, settings: Mapping[str, Any]) -> BundleRun:
    """Score a model on labelled cases; without them, on those that its training held out."""
    files = [config_path("evaluate.json", _configs("pgl_segmentation"))]
    where = {} if data is None else data.settings
    return BundleRun("evaluating", files, {**where, "model_path": str(model), "output_dir": str(out), **settings})


def result_of_pretraining(out: Path) -> list[str]:
    """What a pre-training has written, and whether it learned."""
    rows = [row for row in read_csv(out / "metrics.csv") if row.get("val_loss")]
    files = [out / "models" / name for name in ("pgl_encoder.pt", "pgl_decoder.pt")]
    texts = [f"Wrote {', '.join(str(file) for file in files if file.is_file())}."]
    if rows:
        first, last = float(rows[0]["val_loss"]), float(rows[-1]["val_loss"])
        texts.append(f"Loss on scans held out: {last:.3g} after {rows[-1]['step']} steps, {first:.3g} before.")
    return texts


def result_of_fine_tuning(out: Path) -> list[str]:
    """What a fine-tuning has written, and how good it is."""
    model = weights_file(out, "model.pt")
    dice = read_json(model.with_suffix(".json")).get("val_mean_dice")
    said = "No case was held out to validate on." if dice is None else f"Mean Dice on validation cases: {dice:.3f}."
    return [f"Wrote {model}.", said]


def result_of_evaluation(out: Path) -> list[str]:
    """What an evaluation has written, and its scores."""
    dice = read_json(out / "summary.json")[AVERAGE]["dice"]["mean"]
    return [f"Wrote {out / 'summary.json'}, cases.csv and pictures.", f"Mean Dice: {number_text(dice)}."]


def recorded(path: str | os.PathLike) -> dict[str, Any]:
    """What is recorded beside a file of weights, or beside those in the folder of a training."""
    record = weights_file(path, "model.pt", "fold_0/models/model.pt", "pgl_encoder.pt").with_suffix(".json")
    if not record.is_file():
        raise FileNotFoundError(
            f"{record} is missing, the record beside the weights: copy both files, never one alone."
        )
    return read_json(record)
