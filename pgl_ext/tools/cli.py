"""Command line: ``python -m pgl_ext COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import fire
import yaml

from pgl_ext.settings import parse_bool

# Commands import what they run when they are called: PyTorch and MONAI take seconds, which --help must not.


def phantom(out: str, cases: int = 12, seed: int = 0, test_cases: int = 0) -> str:
    """Generate phantom torso CTs with label maps and a Decathlon-style dataset.json.

    Args:
        out: folder to write.
        cases: number of training cases.
        seed: the same seed gives the same cases.
        test_cases: number of further cases listed as test.
    """
    from pgl_ext.tools.phantom import write_dataset

    return str(write_dataset(out, cases, seed=seed, test_cases=test_cases))


def export_encoder(checkpoint: str, out: str, layout: str = "pgl") -> str:
    """Write the encoder of a training checkpoint to a file of its own, with its description beside it.

    Args:
        checkpoint: file written during pre-training, or an encoder file.
        out: file to write, ending in .pt or .safetensors.
        layout: pgl (keys encoder.*), monai_resnet (keys of MONAI's resnet50) or flexible_unet (of its FlexibleUNet).
    """
    from pgl_ext.tools.export import export_encoder as export

    return str(export(checkpoint, out, layout))


def export_decoder(checkpoint: str, out: str) -> str:
    """Write the decoder of a method that pre-trains one to a file of its own, with its description beside it.

    Args:
        checkpoint: file written during pre-training, or a decoder file.
        out: file to write, ending in .pt or .safetensors.
    """
    from pgl_ext.tools.export import export_decoder as export

    return str(export(checkpoint, out))


def compare(*runs: str, names: str | None = None, out: str | None = None, common: bool = False) -> str:
    """Compare evaluations with the first, over seeds and cases: paired differences, confidence intervals, p.

    Args:
        runs: output folders of evaluations; several with commas between them are seeds of one run, in the same order
            for all. Of fewer than three seeds each nothing is called a difference.
        names: of the runs, with commas between them.
        out: folder for compare.csv and compare.png.
        common: compare the cases that all runs have, instead of stopping where they differ.
    """
    from pgl_ext.tools.compare import compare_runs

    return compare_runs(runs, _words(names), out, parse_bool(common, "common"))


def report(
    out: str, runs: str, pretraining: str | None = None, comparison: str | None = None, title: str = "", note: str = ""
) -> str:
    """Write one HTML file of fine-tuning runs with their evaluations, that opens anywhere, offline.

    Args:
        out: HTML file to write.
        runs: NAME=FOLDER,NAME=FOLDER: output folders of fine-tuning, each with its evaluation in FOLDER/evaluation.
        pretraining: output folder of the pre-training.
        comparison: folder that `compare` wrote.
        title: of the page.
        note: a remark below the title.
    """
    from pgl_ext.tools.report import write_report

    pairs = [pair.partition("=") for pair in _words(runs)]
    if not all(name and folder for name, _, folder in pairs):
        raise ValueError(f"runs must be NAME=FOLDER,NAME=FOLDER, got {runs!r}.")
    folders = {name: folder for name, _, folder in pairs}
    return str(write_report(out, folders, pretraining, comparison, title or "Few-label segmentation", note))


def study(
    file: str, out: str, bundles: str | None = None, jobs: int | None = None, dry_run: bool = False, **overrides: object
) -> str:
    """Compare pre-training methods: methods x labelled cases x seeds, each pre-trained, fine-tuned and evaluated.

    What is finished is not run again, and what was interrupted goes on. Any entry of the study file can be overridden,
    as in --pretraining#settings#max_epochs 2.

    Args:
        file: study file.
        out: folder of the study.
        bundles: folder of pgl_pretrain and pgl_segmentation; by default those that come with the package.
        jobs: runs at a time; by default one on each GPU, or one.
        dry_run: only list the runs and estimate the time.
    """
    from pgl_ext.tools.study.run import run_study

    # fire leaves true, null and the like as text.
    values = {name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in overrides.items()}
    return run_study(file, out, bundles, jobs, parse_bool(dry_run, "dry_run"), values)


def config(bundle: str | None = None, *names: str) -> str:
    """Print the path of a config of a bundle, for --config_file of `monai.bundle run`, or which configs there are.

    Args:
        bundle: pgl_pretrain or pgl_segmentation; studies has the study files.
        names: of its configs, or of files in the working directory; several are printed as a list. None: list them.
    """
    from pgl_ext.tools.bundles import config_names, config_paths

    if not names:
        return "\n".join(config_names(bundle))
    paths = config_paths(bundle, names)
    return paths[0] if len(paths) == 1 else str(paths)


def package(
    *bundles: str,
    out: str = "dist",
    model: str | None = None,
    encoder: str | None = None,
    model_url: str | None = None,
    encoder_url: str | None = None,
    data_license: str | None = None,
    overlays: str | None = None,
) -> str:
    """Write self-contained bundles, as folders and as zip files, that the MONAI Model Zoo takes as they are.

    Args:
        bundles: folders of bundles; by default both.
        out: folder to write.
        model: model file of fine-tuning that comes with pgl_segmentation.
        encoder: encoder file of pre-training that comes with every bundle.
        model_url: where the model can be downloaded; over 25 MB it is then left out of the package.
        encoder_url: the same of the encoder.
        data_license: text file on the data that the weights were trained on, and its terms.
        overlays: of pgl_segmentation's train.json, with commas between them, to be part of it: for MONAI Label.
    """
    from pgl_ext.tools.packaging import package_bundles

    names = _words(overlays) or ()
    paths = package_bundles(bundles, out, model, encoder, model_url, encoder_url, data_license, names)
    return "\n".join(map(str, paths))


def _words(text: str | Sequence[str] | None) -> Sequence[str] | None:
    """Words with commas between them, which fire may have made a tuple of."""
    return text.split(",") if isinstance(text, str) else text


def main() -> None:
    commands = (phantom, export_encoder, export_decoder, compare, report, study, config, package)
    try:
        fire.Fire({command.__name__: command for command in commands}, name="pgl_ext")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
