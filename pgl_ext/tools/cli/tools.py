"""Commands beside the way: comparisons, reports, studies, weights, bundles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from pgl_ext.tools.cli.options import (
    SETTINGS,
    ArchitectureOption,
    Cases,
    ClusterOption,
    Key,
    Out,
    PlanFile,
    PresetOption,
    PretrainedOption,
    ResourcesOption,
    absolute,
    cluster_for,
    data_of,
    end_with,
    given_settings,
    plan_for,
    weights_for,
    words,
)

app = typer.Typer()
PANEL = "Tools"


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
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

    settings = given_settings(context)
    data, weights = data_of(cases, data_list_key, True, settings), weights_for(pretrained, settings)
    made = plan_for(plan, data, architecture, preset, weights, settings)
    values = {"test_data_list_key": test_key, **settings}
    workflows.probe(data, absolute(out), made, weights, values).run()
    end_with(*workflows.result_of_evaluation(absolute(out)), f"pgl compare {out} OTHER_PROBE")


@app.command(rich_help_panel=PANEL)
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

    print(compare_runs(runs, words(names), out, common))


@app.command(rich_help_panel=PANEL)
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


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
def study(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Study file; studies/README.md says what is in it.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; default: one on each GPU, or one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Only list the runs and estimate the time.")] = False,
    cluster: ClusterOption = None,
    resources: ResourcesOption = None,
    only: Annotated[str | None, typer.Option(help="One run, by its path in OUT, and no tables.")] = None,
) -> None:
    """Compare pre-training methods: methods x labelled cases x seeds, each pre-trained, fine-tuned and evaluated.

    What is finished is not run again, and what was interrupted goes on. Any entry of the file can be given, as in
    --pretraining#settings#max_epochs 2.
    """
    from pgl_ext.tools.launch import option_value
    from pgl_ext.tools.study.run import planned_runs, run_one, run_study

    values = {name: option_value(name, value) for name, value in given_settings(context).items()}
    given = (file, out, None, jobs, values)
    if dry_run:
        print(planned_runs(*given))
    elif only is not None:
        print(run_one(file, out, only, values))
    else:
        print(run_study(*given, cluster_for(cluster, out, resources))[0])


@app.command(rich_help_panel=PANEL)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of a pre-training, or an encoder or decoder file.")],
    out: Annotated[Path, typer.Argument(help="File to write, ending in .pt or .safetensors, for nnU-Net in .pth.")],
    to: Annotated[str, typer.Option(help="Program that it is for: pgl, monai or nnunet.")] = "pgl",
    part: Annotated[str, typer.Option(help="encoder or decoder; nnunet takes both.")] = "encoder",
    plans: Annotated[
        Path | None, typer.Option(help="nnUNetPlans.json of the data set, which a configuration is added to.")
    ] = None,
) -> None:
    """Write the encoder or decoder of a checkpoint to a file of its own, its record beside it; or both for nnU-Net.

    For 'nnUNetv2_train ID 3d_pgl FOLD -p pglPlans -pretrained_weights OUT', pglPlans.json is written beside it.
    """
    from pgl_ext.tools.export import PROGRAMS, export_decoder, export_encoder, export_nnunet

    if to not in PROGRAMS or part not in ("encoder", "decoder") or (plans and to != "nnunet"):
        raise ValueError(
            f"to is {to!r}, part {part!r} and plans {plans}: to must be one of {', '.join(PROGRAMS)}, part encoder or "
            "decoder, and plans are for nnunet."
        )
    if to == "nnunet":
        print(export_nnunet(checkpoint, out, plans))
    else:
        print(export_encoder(checkpoint, out, to) if part == "encoder" else export_decoder(checkpoint, out))


@app.command(rich_help_panel=PANEL)
def package(
    bundles: Annotated[list[str] | None, typer.Argument(help="Folders of bundles; default: both.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("dist"),
    model: Annotated[Path | None, typer.Option(help="Model file that comes with pgl_segmentation.")] = None,
    encoder: Annotated[Path | None, typer.Option(help="Encoder file that comes with every bundle.")] = None,
    model_url: Annotated[str | None, typer.Option("--model_url", help="Address of a model of over 25 MB.")] = None,
    encoder_url: Annotated[str | None, typer.Option("--encoder_url", help="The same of the encoder.")] = None,
    data_license: Annotated[
        Path | None, typer.Option("--data_license", help="Text on the training data and its terms.")
    ] = None,
    overlays: Annotated[
        str | None, typer.Option(help="Of pgl_segmentation's train.json, with commas between them: for MONAI Label.")
    ] = None,
) -> None:
    """Write self-contained bundles, as folders and zip files, that the MONAI Model Zoo takes as they are."""
    from pgl_ext.tools.packaging import package_bundles

    paths = package_bundles(
        bundles or [], out, model, encoder, model_url, encoder_url, data_license, words(overlays) or ()
    )
    print("\n".join(map(str, paths)))


@app.command(rich_help_panel=PANEL)
def info(file: Annotated[Path, typer.Argument(help="File of weights, or the folder that a training wrote.")]) -> None:
    """Print what is recorded beside weights: network, preparation of scans, training."""
    from pgl_ext.tools.workflows import recorded

    print(yaml.safe_dump(recorded(file), sort_keys=False, allow_unicode=True), end="")


@app.command(rich_help_panel=PANEL)
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


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
def cache(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(metavar="CACHE|SCANS", help="A cache to look at; or, with OUT, scans to fill one with.")
    ],
    out: Annotated[Path | None, typer.Argument(help="Cache to fill, for 'pgl pretrain --cache_dir OUT'.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of a cache, and remove what is damaged.")] = False,
    plan: PlanFile = None,
    data_list_key: Key = "training",
    cluster: ClusterOption = None,
    resources: ResourcesOption = None,
    shards: Annotated[int, typer.Option(min=1, help="Jobs that share the work.", rich_help_panel="Cluster")] = 16,
    shard: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Say what a cache holds and whether it is as it was written; or fill one, here or by jobs of a cluster.

    What is cached already is left alone, so that the same command goes on where it was stopped. Any setting of
    pre-training can be given too, as in --spacing "[2, 2, 2]".
    """
    from pgl_ext.tools.caches import cache_report, fill_cache, fill_in_shards
    from pgl_ext.tools.plan import read_data
    from pgl_ext.tools.workflows import pretraining

    settings = given_settings(context)
    if out is None:
        if settings:
            raise ValueError(f"settings such as --{next(iter(settings))} are for filling a cache: give SCANS and OUT.")
        print(cache_report(source, verify))
        return
    data, folder = read_data(source, data_list_key, labelled=False), absolute(out)
    made = plan_for(plan, data, None, None, None, settings)
    workflow = pretraining(data, folder, made, "pgl", {"cache_dir": str(folder), **settings})
    where = cluster_for(cluster, out, resources)
    if where is None:
        number, count = map(int, (shard or "0/1").split("/"))
        print(fill_cache(workflow, data.items, (number, count)))
        return
    options = [text for name, value in settings.items() for text in (f"--{name}", value)]
    options += ["--plan", str(folder / "plan.yaml"), "--data_list_key", data_list_key]
    line = [sys.executable, "-m", "pgl_ext", "cache", str(absolute(source)), str(folder), *options]
    fill_in_shards(line, shards, where)
    end_with(cache_report(folder), f"pgl pretrain {source} PRETRAINED --cache_dir {out} --plan {out}/plan.yaml")


@app.command(rich_help_panel=PANEL)
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
    @app.command(old, hidden=True, context_settings=SETTINGS)
    def say() -> None:
        raise ValueError(f"{old!r} is now 'pgl {new}': see 'pgl {new.split()[0]} --help'.")


_renamed("export_encoder", "export CHECKPOINT OUT")
_renamed("export_decoder", "export CHECKPOINT OUT --part decoder")
