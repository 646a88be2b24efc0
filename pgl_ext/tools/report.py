"""One self-contained HTML file of a study: pre-training, fine-tuning runs, scores, comparison and pictures."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from pgl_ext import __version__
from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.evaluation.summary import AVERAGE, case_means, interval_text, notable_cases, number_text
from pgl_ext.files import read_json, write_text
from pgl_ext.segmentation.cases import draw_case
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.compare import comparison_tables, read_comparison, read_scores, verdicts
from pgl_ext.transforms.load import LoadVolumed

__all__ = ["case_pictures", "render_page", "write_report"]

_RUNS_PER_PICTURE = 3
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass
class _Run:
    """What one fine-tuning run and its evaluation left behind.

    Args:
        name: of the run.
        folder: its output folder, with that of the evaluation in ``evaluation`` below.
        model: what is recorded beside the model.
        summary: of the evaluation.
    """

    name: str
    folder: Path
    model: dict[str, Any]
    summary: dict[str, Any]

    @property
    def start(self) -> str:
        encoder = self.model.get("pretrained_encoder")
        return f"encoder {Path(encoder).name}" if encoder else "random weights"

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """The entries of the organs and of their average."""
        return {**self.summary["organs"], AVERAGE: self.summary[AVERAGE]}


def write_report(
    out: str | os.PathLike,
    runs: Mapping[str, str | os.PathLike],
    pretraining: str | os.PathLike | None = None,
    comparison: str | os.PathLike | None = None,
    title: str = "Few-label segmentation",
    note: str = "",
) -> Path:
    """Write the report; pictures are embedded, so that it opens anywhere, offline.

    Args:
        out: HTML file to write.
        runs: output folder of each fine-tuning run by its name; its evaluation lies in ``evaluation`` below.
        pretraining: output folder of the pre-training.
        comparison: folder that ``pgl_ext compare`` wrote.
        title: of the page.
        note: a remark in the page's first lines, such as what the data are.

    Returns:
        the file.

    Raises:
        FileNotFoundError: a run has no model or no finished evaluation, or a comparison is not there.
        ValueError: the runs were evaluated on different organs.
    """
    first, *others = evaluated = [_read_run(name, Path(folder)) for name, folder in runs.items()]
    for run in others:
        if list(run.scores) != list(first.scores):
            raise ValueError(
                f"run {run.name!r} has the organs {list(run.summary['organs'])}, run {first.name!r} has "
                f"{list(first.summary['organs'])}: report only runs of one task together."
            )
    encoder = Path(pretraining or "") / "models" / "pgl_encoder.json"
    return render_page(
        "report.html",
        out,
        title=title,
        note=note,
        runs=evaluated,
        cases=case_pictures({run.name: run.folder / "evaluation" for run in evaluated}),
        best=lambda row, metric: _best(evaluated, row, metric),
        pretraining=None if pretraining is None else Path(pretraining),
        encoder=read_json(encoder) if pretraining is not None and encoder.is_file() else {},
        comparison=None if comparison is None else _comparison(Path(comparison)),
    )


def case_pictures(evaluations: Mapping[str, Path], chosen: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Pictures of the best, median and worst case of the first evaluation, by mean Dice, as all runs segment them.

    And of cases chosen by name, as in figure 8 of the PGL paper.

    They are drawn from the predictions in the evaluations' folders, and from the scans and label maps where the first
    evaluation found them.

    Args:
        evaluations: output folder of each evaluation by the name of its run, all of one task.
        chosen: names of further cases.

    Returns:
        For each case its ``heading``, ``pictures`` (data URLs; each of the reference and up to three runs), ``runs``
        that they show, and ``remarks`` on what is missing.
    """
    dice = {name: _dice_of_cases(folder) for name, folder in evaluations.items()}
    first = next(iter(dice), None)
    notable = notable_cases(dice[first]) if dice else {}
    entries = []
    for case in dict.fromkeys([*notable.values(), *(chosen if dice else ())]):
        words = " and ".join(word for word, name in notable.items() if name == case).capitalize()
        words = f"{words} case of {first} by mean Dice" if words else "Chosen case"
        paths = {name: folder / "predictions" / f"{case}.nii.gz" for name, folder in evaluations.items()}
        runs = [name for name, path in paths.items() if path.is_file()]
        absent = ", ".join(name for name in paths if name not in runs)
        entry = {"heading": f"{words}: {case}", "pictures": [], "runs": ", ".join(runs)}
        entry["remarks"] = [f"Without a prediction of this case: {absent}."] if absent else []
        try:
            for start in range(0, len(runs), _RUNS_PER_PICTURE):
                shown = runs[start : start + _RUNS_PER_PICTURE]
                columns = {f"{name}\nmean Dice {number_text(dice[name].get(case))}": paths[name] for name in shown}
                entry["pictures"].append(_draw(evaluations[first], case, columns))
        except (OSError, ValueError) as error:
            entry["remarks"].append(f"There is no picture: {error}")
        entries.append(entry)
    return entries


def _dice_of_cases(evaluation: Path) -> dict[str, float]:
    scores = read_scores(evaluation, ["dice"])
    return case_means([{"case": case, **values} for (case, _), values in scores.items()], "dice")


def _draw(evaluation: Path, case: str, predictions: Mapping[str, Path]) -> str | None:
    """A data URL of a case's reference beside predictions, by title of the column."""
    summary = read_json(evaluation / "summary.json")
    item = summary.get("files", {}).get(case)
    if item is None:
        raise ValueError(f"{evaluation} does not say where the scan lies, as of an older version: evaluate again.")
    files = {"reference": item["label"], **predictions}
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "case.png"
        loaded = LoadVolumed(list(files))({**item, **files})
        maps = {column: loaded[column] for column in files}
        draw_case(item, maps, SegmentationTask(**summary["task"]), picture, case)
        return _picture(picture)


def render_page(template: str, out: str | os.PathLike, **content: Any) -> Path:
    """Write a page of ``templates/``.

    Args:
        template: its file.
        out: HTML file to write.
        content: what the template shows; ``title`` and ``note`` are the head of every page.

    Returns:
        the file.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(picture=_picture, score=number_text, interval=interval_text)
    page = environment.get_template(template).render(version=__version__, today=date.today().isoformat(), **content)
    write_text(Path(out), page)
    return Path(out)


def _read_run(name: str, folder: Path) -> _Run:
    model, summary = folder / "models" / "model.json", folder / "evaluation" / "summary.json"
    model = model if model.is_file() else folder / "fold_0" / "models" / "model.json"
    for path, step in ((model, "run training"), (summary, "run evaluating --output_dir RUN/evaluation")):
        if not path.is_file():
            raise FileNotFoundError(f"run {name!r} has no {path}: finish '{step}' first.")
    return _Run(name, folder, read_json(model), read_json(summary))


def _comparison(folder: Path) -> dict[str, Any]:
    """What ``pgl_ext compare`` found: sentences, tables and the picture."""
    rows = read_comparison(folder)
    return {"verdicts": verdicts(rows), "tables": comparison_tables(rows), "picture": folder / "compare.png"}


def _best(runs: list[_Run], row: str, metric: str) -> str | None:
    """Name of the run with the best mean of a metric; None where there is no difference."""
    means = {run.name: run.scores[row][metric]["mean"] for run in runs}
    means = {name: mean for name, mean in means.items() if mean is not None}
    if len(set(means.values())) < 2:
        return None
    best = max if METRICS[metric].higher_is_better else min
    return best(means, key=means.__getitem__)


def _picture(path: Path) -> str | None:
    """A PNG file as a data URL; None where it is missing."""
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
