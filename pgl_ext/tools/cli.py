"""The command line: ``pgl COMMAND``, or ``python -m pgl_ext COMMAND``.

Typer, of the libraries for command lines, gives help pages with groups, types, errors and shell completion from the
functions below; fire, which MONAI brings, guesses types from values and gives neither groups nor completion.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from pgl_ext import __version__

# Commands import what they run when they are called: PyTorch and MONAI take seconds, which --help must not.

app = typer.Typer(
    name="pgl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Self-supervised pre-training for 3D medical segmentation: pretrain, gain, segment.",
)

_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
_MAIN, _MORE = "The way from scans to a result", "Tools"


class Architecture(str, Enum):
    """Networks that have an overlay."""

    resnet50 = "resnet50"
    dynunet = "dynunet"
    segresnet = "segresnet"


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
PretrainedOption = Annotated[
    Path | None,
    typer.Option("--pretrained", help="Weights: a file, or the folder of 'pgl pretrain'.", rich_help_panel="Network"),
]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"pgl {__version__}")
        raise typer.Exit


@app.command(rich_help_panel=_MAIN)
def plan(
    data: Annotated[Path, typer.Argument(help="Scans or labelled cases: a folder, or a JSON data list.")],
    out: Annotated[Path | None, typer.Option(help="YAML file to write; without it the plan is printed.")] = None,
    pretrained: PretrainedOption = None,
    architecture: ArchitectureOption = None,
    preset: PresetOption = None,
    data_list_key: Key = "training",
) -> None:
    """Choose the settings for a data set: spacing, intensities, structures, patch.

    Takes seconds; all that it chose, and why, is in the YAML file that it writes. 'pretrain', 'finetune' and 'gain'
    make a plan themselves unless one is given.
    """
    from pgl_ext.files import write_text
    from pgl_ext.tools.bundles import bundle_folder
    from pgl_ext.tools.plan import expected_time, read_data
    from pgl_ext.tools.workflows import Pretrained

    weights = None if pretrained is None else Pretrained(pretrained)
    made = _plan(None, read_data(data, data_list_key), architecture, preset, weights, {})
    made.head += expected_time(made, bundle_folder("pgl_segmentation") / "configs")
    if out is None:
        print(made.text(), end="")
    else:
        write_text(out, made.text())
        _end(f"Wrote {out}.", f"pgl pretrain {data} PRETRAINED --plan {out}")


@app.command(context_settings=_SETTINGS, rich_help_panel=_MAIN)
def pretrain(
    context: typer.Context,
    scans: Scans,
    out: Out,
    method: Annotated[
        str, typer.Option(help="Overlay in configs/methods, or pgl: the paper's.", rich_help_panel="Network")
    ] = "pgl_mae",
    architecture: ArchitectureOption = None,
    preset: PresetOption = None,
    plan: PlanFile = None,
    gpus: Annotated[int, typer.Option(help="Processes, one for each GPU.", rich_help_panel="Running")] = 1,
    data_list_key: Key = "training",
) -> None:
    """Pre-train a network on unlabelled scans.

    Any setting of the bundle can be given too, as in --max_epochs 20.
    """
    from pgl_ext.tools.plan import read_data
    from pgl_ext.tools.workflows import pretraining, result_of_pretraining

    settings, data = _given(context), read_data(scans, data_list_key, labelled=False)
    made = _plan(plan, data, architecture, preset, None, settings)
    pretraining(data, _absolute(out), made, method, settings, gpus).run()
    _end(*result_of_pretraining(_absolute(out)), f"pgl gain CASES GAIN --pretrained {out}")


@app.command(context_settings=_SETTINGS, rich_help_panel=_MAIN)
def finetune(
    context: typer.Context,
    cases: Cases,
    out: Out,
    pretrained: PretrainedOption = None,
    architecture: ArchitectureOption = None,
    preset: PresetOption = None,
    plan: PlanFile = None,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Of the cases: a network for each, trained on the others, scored on it.")
    ] = None,
    data_list_key: Key = "training",
) -> None:
    """Train a segmentation network on labelled cases, from pre-trained weights or from random ones.

    With --folds 5 it trains five, scores each case by the one that has not seen it, and goes on where it was stopped;
    'pgl segment' averages them. Any setting of the bundle can be given too, as in --labelled_cases 5.
    """
    from pgl_ext.tools.folds import train_folds
    from pgl_ext.tools.plan import read_data
    from pgl_ext.tools.workflows import Pretrained, fine_tuning, result_of_fine_tuning

    settings, data = _given(context), read_data(cases, data_list_key, labelled=True)
    weights = None if pretrained is None else Pretrained(pretrained)
    if weights is not None:
        weights.check(settings)
    made, folder = _plan(plan, data, architecture, preset, weights, settings), _absolute(out)
    if folds is None:
        fine_tuning(data, folder, made, weights, settings).run()
        result = result_of_fine_tuning(folder)
    else:
        result = train_folds(data, folder, made, weights, settings, folds)
    _end(*result, f"pgl segment {out} SCANS SEGMENTED")


@app.command(context_settings=_SETTINGS, rich_help_panel=_MAIN)
def gain(
    context: typer.Context,
    cases: Cases,
    out: Out,
    pretrained: Annotated[Path, typer.Option("--pretrained", help="Weights: a file, or the folder of 'pgl pretrain'.")],
    seeds: Annotated[int, typer.Option(help="Trainings of each start; fewer than 3 give no verdict.")] = 5,
    labelled_cases: Annotated[
        int | None, typer.Option("--labelled_cases", help="To train on; default: all that are not held out.")
    ] = None,
    test_cases: Annotated[
        int | None,
        typer.Option("--test_cases", help="To hold out; default: a third, at least 5; under 12 cases each third once."),
    ] = None,
    preset: PresetOption = None,
    plan: PlanFile = None,
    jobs: Annotated[int | None, typer.Option(help="Trainings at a time; default: one on each GPU, or one.")] = None,
    data_list_key: Key = "training",
) -> None:
    """Does pre-training pay on these cases? Random against pre-trained weights, each with its own recipe.

    Ends with one sentence: the difference in Dice on cases held out, with its interval. Goes on where it was stopped.
    Any setting of the fine-tunings can be given too, as in --max_epochs 8.
    """
    from pgl_ext.tools.gain import gain_study, run_gain
    from pgl_ext.tools.plan import read_data
    from pgl_ext.tools.workflows import Pretrained

    settings, data = _given(context), read_data(cases, data_list_key, labelled=True)
    weights = Pretrained(pretrained)
    weights.check(settings)
    values = {name: yaml.safe_load(value) for name, value in settings.items()}
    made, folder = _plan(plan, data, None, preset, weights, settings), _absolute(out)
    file = gain_study(data, folder, made, weights, seeds, test_cases, labelled_cases, values)
    print(f"$ pgl study {file} --out {folder}", flush=True)
    _end(*run_gain(file, folder, jobs), f"pgl segment {out} SCANS SEGMENTED")


@app.command(context_settings=_SETTINGS, rich_help_panel=_MAIN)
def segment(context: typer.Context, model: Model, scans: Scans, out: Out, data_list_key: Key = "test") -> None:
    """Segment scans: label maps on the scans' own grids, volumes in ml, pictures.

    Any setting of the bundle can be given too, as in --flip_axes "[0]".
    """
    from pgl_ext.tools.workflows import inference, model_file

    inference(model_file(model), scans, _absolute(out), {"data_list_key": data_list_key, **_given(context)}).run()
    _end(
        f"Wrote label maps and pictures to {out}.",
        f"pgl evaluate {model} CASES EVALUATION, where cases have label maps",
    )


@app.command(context_settings=_SETTINGS, rich_help_panel=_MAIN)
def evaluate(context: typer.Context, model: Model, cases: Cases, out: Out, data_list_key: Key = "test") -> None:
    """Score a model on labelled cases: Dice, IoU and surface distances of each case and structure."""
    from pgl_ext.tools.plan import read_data
    from pgl_ext.tools.workflows import evaluation, model_file, result_of_evaluation

    data = read_data(cases, data_list_key, labelled=True)
    evaluation(model_file(model), data, _absolute(out), _given(context)).run()
    _end(*result_of_evaluation(_absolute(out)), f"pgl compare {out} OTHER_EVALUATION")


@app.command(context_settings=_SETTINGS, rich_help_panel=_MORE)
def probe(
    context: typer.Context,
    cases: Cases,
    out: Out,
    pretrained: PretrainedOption = None,
    architecture: ArchitectureOption = None,
    preset: PresetOption = None,
    plan: PlanFile = None,
    test_key: Annotated[
        str, typer.Option("--test_data_list_key", help="List of the cases to score on.")
    ] = "validation",
    data_list_key: Key = "training",
) -> None:
    """How good are an encoder's features before fine-tuning? A linear classifier on some labelled cases, in minutes.

    Without --pretrained: of random weights, to compare with. Any setting can be given too, as in --labelled_cases 3.
    """
    from pgl_ext.tools import workflows
    from pgl_ext.tools.plan import read_data

    settings, data = _given(context), read_data(cases, data_list_key, labelled=True)
    weights = None if pretrained is None else workflows.Pretrained(pretrained)
    if weights is not None:
        weights.check(settings)
    made = _plan(plan, data, architecture, preset, weights, settings)
    values = {"test_data_list_key": test_key, **settings}
    workflows.probe(data, _absolute(out), made, weights, values).run()
    _end(*workflows.result_of_evaluation(_absolute(out)), f"pgl compare {out} OTHER_PROBE")


# --- tools ----------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=_MORE)
def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Folders of evaluations; several with commas between them are seeds of one run.")
    ],
    names: Annotated[str | None, typer.Option(help="Of the runs, with commas between them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for compare.csv and compare.png.")] = None,
    common: Annotated[bool, typer.Option("--common", help="Compare the cases that all runs have.")] = False,
) -> None:
    """Compare evaluations with the first, over seeds and cases."""
    from pgl_ext.tools.compare import compare_runs

    print(compare_runs(runs, _words(names), out, common))


@app.command(rich_help_panel=_MORE)
def report(
    out: Annotated[Path, typer.Argument(help="HTML file to write.")],
    runs: Annotated[
        str, typer.Option(help="NAME=FOLDER,NAME=FOLDER: fine-tunings, each evaluated in FOLDER/evaluation.")
    ],
    pretraining: Annotated[Path | None, typer.Option(help="Folder of the pre-training.")] = None,
    comparison: Annotated[Path | None, typer.Option(help="Folder that 'pgl compare' wrote.")] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Few-label segmentation",
    note: Annotated[str, typer.Option(help="Remark below the title.")] = "",
) -> None:
    """Write one HTML file of fine-tunings with their evaluations, that opens anywhere, offline."""
    from pgl_ext.tools.report import write_report

    pairs = [pair.partition("=") for pair in runs.split(",")]
    if not all(name and folder for name, _, folder in pairs):
        raise ValueError(f"runs must be NAME=FOLDER,NAME=FOLDER, got {runs!r}.")
    print(write_report(out, {name: folder for name, _, folder in pairs}, pretraining, comparison, title, note))


@app.command(context_settings=_SETTINGS, rich_help_panel=_MORE)
def study(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Study file; studies/README.md says what is in it.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; default: one on each GPU, or one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Only list the runs and estimate the time.")] = False,
) -> None:
    """Compare pre-training methods: methods x labelled cases x seeds, each pre-trained, fine-tuned and evaluated.

    What is finished is not run again, and what was interrupted goes on. Any entry of the file can be given, as in
    --pretraining#settings#max_epochs 2.
    """
    from pgl_ext.tools.study.run import planned_runs, run_study

    values = {name: yaml.safe_load(value) for name, value in _given(context).items()}
    given = (file, out, None, jobs, values)
    print(planned_runs(*given) if dry_run else run_study(*given)[0])


@app.command(rich_help_panel=_MORE)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of a pre-training, or an encoder or decoder file.")],
    out: Annotated[Path, typer.Argument(help="File to write, ending in .pt or .safetensors.")],
    part: Annotated[str, typer.Option(help="encoder or decoder.")] = "encoder",
    layout: Annotated[str, typer.Option(help="Names of tensors: pgl, monai_resnet or flexible_unet.")] = "pgl",
) -> None:
    """Write the encoder or decoder of a checkpoint to a file of its own, with its record beside it."""
    from pgl_ext.tools.export import export_decoder, export_encoder

    if part not in ("encoder", "decoder") or (part == "decoder" and layout != "pgl"):
        raise ValueError(
            f"part is {part!r} and layout {layout!r}: part is encoder or decoder, of which the first has layouts."
        )
    print(export_encoder(checkpoint, out, layout) if part == "encoder" else export_decoder(checkpoint, out))


@app.command(rich_help_panel=_MORE)
def package(
    bundles: Annotated[list[str] | None, typer.Argument(help="Folders of bundles; default: both.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("dist"),
    model: Annotated[Path | None, typer.Option(help="Model file that comes with pgl_segmentation.")] = None,
    encoder: Annotated[Path | None, typer.Option(help="Encoder file that comes with every bundle.")] = None,
    model_url: Annotated[str | None, typer.Option(help="Where a model of over 25 MB can be downloaded.")] = None,
    encoder_url: Annotated[str | None, typer.Option(help="The same of the encoder.")] = None,
    data_license: Annotated[Path | None, typer.Option(help="Text file on the training data and its terms.")] = None,
    overlays: Annotated[
        str | None, typer.Option(help="Of pgl_segmentation's train.json, with commas between them: for MONAI Label.")
    ] = None,
) -> None:
    """Write self-contained bundles, as folders and zip files, that the MONAI Model Zoo takes as they are."""
    from pgl_ext.tools.packaging import package_bundles

    paths = package_bundles(
        bundles or [], out, model, encoder, model_url, encoder_url, data_license, _words(overlays) or ()
    )
    print("\n".join(map(str, paths)))


@app.command(rich_help_panel=_MORE)
def info(file: Annotated[Path, typer.Argument(help="File of weights, or the folder that a training wrote.")]) -> None:
    """Print what is recorded beside weights: network, preparation of scans, training."""
    from pgl_ext.tools.workflows import recorded

    print(yaml.safe_dump(recorded(file), sort_keys=False, allow_unicode=True), end="")


@app.command(rich_help_panel=_MORE)
def config(
    bundle: Annotated[str | None, typer.Argument(help="pgl_pretrain, pgl_segmentation or studies.")] = None,
    names: Annotated[
        list[str] | None, typer.Argument(help="Of its configs, or files in the working directory.")
    ] = None,
) -> None:
    """Print the path of a config, as --config_file of 'monai.bundle run' takes it; without names, which there are."""
    from pgl_ext.tools.bundles import config_names, config_paths

    if bundle is None or not names:
        print("\n".join(config_names(bundle)))
    else:
        paths = config_paths(bundle, names)
        print(paths[0] if len(paths) == 1 else paths)


@app.command(rich_help_panel=_MORE)
def phantom(
    out: Out,
    cases: Annotated[int, typer.Option(help="Number of training cases.")] = 12,
    seed: Annotated[int, typer.Option(help="The same seed gives the same cases.")] = 0,
    test_cases: Annotated[int, typer.Option("--test_cases", help="Number of cases listed as test.")] = 0,
) -> None:
    """Generate phantom torso CTs with label maps and a Decathlon-style dataset.json."""
    from pgl_ext.tools.phantom import write_dataset

    print(write_dataset(out, cases, seed=seed, test_cases=test_cases))


def _renamed(old: str, new: str) -> None:
    @app.command(old, hidden=True, context_settings=_SETTINGS)
    def say() -> None:
        raise ValueError(f"{old!r} is now 'pgl {new}': see 'pgl {new.split()[0]} --help'.")


_renamed("export_encoder", "export CHECKPOINT OUT")
_renamed("export_decoder", "export CHECKPOINT OUT --part decoder")


# --- helpers --------------------------------------------------------------------------------------------------------


def _plan(
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


def _given(context: typer.Context) -> dict[str, str]:
    """Settings of the bundle among the options."""
    from pgl_ext.tools.launch import option_settings

    return option_settings(context.args)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


def _words(text: str | None) -> list[str] | None:
    return None if text is None else text.split(",")


def _end(*texts: str) -> None:
    *results, following = texts
    print("\n".join([*results, f"Next: {following}"]))


def main() -> None:
    try:
        app()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
