"""The commands that lead from scans to a result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pgl_ext.tools.cli.options import (
    PRETRAINED,
    SETTINGS,
    ArchitectureOption,
    Cases,
    Key,
    Model,
    Out,
    PlanFile,
    PresetOption,
    PretrainedOption,
    Scans,
    absolute,
    data_of,
    end_with,
    given_settings,
    plan_for,
    weights_for,
)

app = typer.Typer()
PANEL = "The way from scans to a result"


@app.command(rich_help_panel=PANEL)
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
    made = plan_for(None, read_data(data, data_list_key), architecture, preset, weights, {})
    made.head += expected_time(made, bundle_folder("pgl_segmentation") / "configs")
    if out is None:
        print(made.text(), end="")
    else:
        write_text(out, made.text())
        end_with(f"Wrote {out}.", f"pgl pretrain {data} PRETRAINED --plan {out}")


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
def pretrain(
    context: typer.Context,
    scans: Scans,
    out: Out,
    method: Annotated[
        str, typer.Option(help="Overlay in configs/methods, or pgl: the paper's.", rich_help_panel="Network")
    ] = "pgl_mae",
    pretrained: PretrainedOption = None,
    architecture: ArchitectureOption = None,
    preset: PresetOption = None,
    plan: PlanFile = None,
    gpus: Annotated[int, typer.Option(help="Processes, one for each GPU.", rich_help_panel="Running")] = 1,
    data_list_key: Key = "training",
) -> None:
    """Pre-train a network on unlabelled scans, from random weights or going on from pre-trained ones.

    Any setting of the bundle can be given too, as in --max_epochs 20.
    """
    from pgl_ext.tools.workflows import pretraining, result_of_pretraining

    settings = given_settings(context)
    data = data_of(scans, data_list_key, False, settings)
    weights = weights_for(pretrained, settings)
    made = plan_for(plan, data, architecture, preset, weights, settings)
    pretraining(data, absolute(out), made, method, settings, gpus, weights).run()
    end_with(*result_of_pretraining(absolute(out)), f"pgl gain CASES GAIN --pretrained {out}")


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
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
    from pgl_ext.tools.workflows import fine_tuning, result_of_fine_tuning

    settings = given_settings(context)
    data, weights = data_of(cases, data_list_key, True, settings), weights_for(pretrained, settings)
    made, folder = plan_for(plan, data, architecture, preset, weights, settings), absolute(out)
    if folds is None:
        fine_tuning(data, folder, made, weights, settings).run()
        result = result_of_fine_tuning(folder)
    else:
        result = train_folds(data, folder, made, weights, settings, folds)
    end_with(*result, f"pgl segment {out} SCANS SEGMENTED")


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
def gain(
    context: typer.Context,
    cases: Cases,
    out: Out,
    pretrained: Annotated[Path, PRETRAINED],
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
    from pgl_ext.tools.launch import option_value

    settings = given_settings(context)
    data, weights = data_of(cases, data_list_key, True, settings), weights_for(pretrained, settings)
    values = {name: option_value(name, value) for name, value in settings.items()}
    made, folder = plan_for(plan, data, None, preset, weights, settings), absolute(out)
    file = gain_study(data, folder, made, weights, seeds, test_cases, labelled_cases, values)
    print(f"$ pgl study {file} --out {folder}", flush=True)
    end_with(*run_gain(file, folder, jobs), f"pgl segment {out} SCANS SEGMENTED")


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
def segment(context: typer.Context, model: Model, scans: Scans, out: Out, data_list_key: Key = "test") -> None:
    """Segment scans: label maps on the scans' own grids, volumes in ml, pictures.

    Any setting of the bundle can be given too, as in --flip_axes "[0]".
    """
    from pgl_ext.tools.workflows import inference, model_file

    inference(
        model_file(model), scans, absolute(out), {"data_list_key": data_list_key, **given_settings(context)}
    ).run()
    end_with(
        f"Wrote label maps and pictures to {out}.",
        f"pgl evaluate {model} CASES EVALUATION, where cases have label maps",
    )


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
def evaluate(context: typer.Context, model: Model, cases: Cases, out: Out, data_list_key: Key = "test") -> None:
    """Score a model on labelled cases: Dice, IoU and surface distances of each case and structure."""
    from pgl_ext.tools.workflows import evaluation, model_file, result_of_evaluation

    settings = given_settings(context)
    data = data_of(cases, data_list_key, True, settings)
    evaluation(model_file(model), data, absolute(out), settings).run()
    end_with(*result_of_evaluation(absolute(out)), f"pgl compare {out} OTHER_EVALUATION")
