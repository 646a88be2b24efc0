"""Options that several commands have, and what is made of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

# Commands import what they run when they are called: PyTorch and MONAI take seconds, which --help must not.

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Of commands that take any setting of a bundle."""


class Architecture(str, Enum):
    """Networks that have an overlay."""

    resnet50 = "resnet50"
    dynunet = "dynunet"
    segresnet = "segresnet"
    segresnet_ds = "segresnet_ds"
    unet = "unet"
    swinunetr = "swinunetr"
    mednext = "mednext"
    resenc = "resenc"


class Preset(str, Enum):
    """Sizes and lengths: of the paper's scale, or for a CPU."""

    small = "small"
    full = "full"


Out = Annotated[Path, typer.Argument(help="Folder to write.")]
Cases = Annotated[Path, typer.Argument(help="Labelled cases: a folder, or a JSON data list (Decathlon, nnU-Net).")]
Model = Annotated[Path, typer.Argument(help="A model file, or the folder of 'pgl finetune' or 'pgl gain'.")]
Scans = Annotated[Path, typer.Argument(help="Scans: a folder, a JSON data list, or one file.")]
Key = Annotated[str, typer.Option("--data_list_key", help="List in the JSON to take.", rich_help_panel="Data")]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="Plan to follow, as 'pgl plan' writes it.", rich_help_panel="Data")
]
ArchitectureOption = Annotated[
    Architecture | None,
    typer.Option(
        "--architecture", help="Network; default: that of plan or weights, else dynunet.", rich_help_panel="Network"
    ),
]
PresetOption = Annotated[
    Preset | None,
    typer.Option("--preset", help="Sizes and lengths; default: small without a GPU.", rich_help_panel="Network"),
]
PRETRAINED = typer.Option(
    "--pretrained",
    help="Weights: a file, also a published one, or the folder of 'pgl pretrain'.",
    rich_help_panel="Network",
)
PretrainedOption = Annotated[Path | None, PRETRAINED]
ClusterOption = Annotated[
    str | None,
    typer.Option(help="Send the work there as jobs: slurm, local (this machine), or auto.", rich_help_panel="Cluster"),
]
ResourcesOption = Annotated[
    str | None,
    typer.Option(
        help='Of a job, as submitit calls them: "{timeout_min: 600, gpus_per_node: 1, slurm_partition: gpu}".',
        rich_help_panel="Cluster",
    ),
]


def plan_for(
    file: Path | None,
    data: Any,
    architecture: Architecture | None,
    preset: Preset | None,
    weights: Any,
    given: Mapping[str, str],
) -> Any:
    """The plan in a file, or else one made for the data."""
    from pgl_ext.tools.plan import Plan
    from pgl_ext.tools.workflows import plan_of

    if file is not None:
        if architecture or preset:
            raise ValueError(f"--plan {file} says what architecture and preset are: edit it, or leave them out.")
        return Plan.load(file)
    small = None if preset is None else preset is Preset.small
    return plan_of(data, (architecture or Architecture.dynunet).value, small, weights, given)


def given_settings(context: typer.Context) -> dict[str, str]:
    """Settings of the bundle among the options; what looks like a misspelt option of the command itself is refused."""
    from pgl_ext.tools.launch import option_settings

    settings = option_settings(context.args)
    own = [option.removeprefix("--") for parameter in context.command.params for option in parameter.opts]
    for name in settings:
        if like := get_close_matches(name, own, 1, cutoff=0.8):
            raise ValueError(f"pgl {context.info_name} has no option --{name}: did you mean --{like[0]}?")
    return settings


def data_of(path: Path, key: str, labelled: bool | None, settings: Mapping[str, str]) -> Any:
    """The scans or cases that a folder or a list holds; the settings may name channels."""
    from pgl_ext.tools.data import read_data
    from pgl_ext.tools.launch import option_value

    names = option_value("channel_names", settings.get("channel_names", "[]"))
    return read_data(path, key, labelled, names)


def weights_for(pretrained: Path | None, settings: Mapping[str, str]) -> Any:
    """Pre-trained weights, or None; settings that contradict their record are refused."""
    from pgl_ext.tools.workflows import Pretrained

    weights = None if pretrained is None else Pretrained(pretrained)
    if weights is not None:
        weights.check(settings)
    return weights


def cluster_for(name: str | None, out: Path, resources: str | None) -> Any:
    """Where jobs are sent, their logs going below a folder; None without --cluster."""
    from pgl_ext.tools.cluster import Cluster

    if name is None:
        if resources is not None:
            raise ValueError("--resources are those of jobs on a cluster: give --cluster auto too.")
        return None
    given = yaml.safe_load(resources or "{}")
    if not isinstance(given, dict):
        raise ValueError(f'--resources is {resources!r}: give names and values, as in "{{timeout_min: 600}}".')
    return Cluster(absolute(out) / "jobs", name, given)


def absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


def words(text: str | None) -> list[str] | None:
    return None if text is None else text.split(",")


def end_with(*texts: str) -> None:
    *results, following = texts
    print("\n".join([*results, f"Next: {following}"]))
