"""Pictures of a study and its page: one HTML file that opens anywhere, offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgl_ext.evaluation.summary import AVERAGE
from pgl_ext.figures.curves import MetricsFile
from pgl_ext.tools.report import render_page
from pgl_ext.tools.study.cells import Cell, labels_text
from pgl_ext.tools.study.figures import Curve, Estimate, method_colors, plot_bars, plot_gains, plot_learning_curves
from pgl_ext.tools.study.plan import Study
from pgl_ext.tools.study.results import Results
from pgl_ext.tools.study.tables import NOTES, missing_text, paper_tables, verdicts

__all__ = ["draw_figures", "write_study_report"]

Rows = Sequence[Mapping[str, Any]]

_PICTURES = ("gains.png", "organs.png", "ablations.png", "learning_curves.png")


def draw_figures(study: Study, results: Results, rows: Rows) -> None:
    """Draw the pictures of a study, where there is anything to draw.

    Of the comparison's rows these are ``gains.png``, ``organs.png`` and ``ablations.png``, of the finished fine-tunings
    ``learning_curves.png``.
    """
    for name in _PICTURES:  # of a study that was in this folder before
        (study.folder / name).unlink(missing_ok=True)
    dice = [row for row in rows if row["metric"] == "dice"]
    colors = method_colors(study.methods, study.reference)
    names = [labels_text(labels) for labels in study.labels]
    gains = _gains(study, dice)
    if gains:
        plot_gains(gains, names, colors, study.reference, study.folder / "gains.png")
    organs = list(dict.fromkeys(row["organ"] for row in dice))
    panels = {labels_text(labels): _organ_scores(study, dice, labels, organs) for labels in study.labels}
    panels = {title: scores for title, scores in panels.items() if scores}
    if panels:
        plot_bars(panels, organs, colors, "Dice", study.folder / "organs.png")
    ablations = {method: gains[method] for method in study.ablations if method in gains}
    if ablations:
        title = f"average Dice minus {study.reference}"
        plot_bars({"": ablations}, names, colors, title, study.folder / "ablations.png")
    curves = _learning_curves(study, results)
    if curves:
        plot_learning_curves(curves, colors, study.reference, study.folder / "learning_curves.png")


def _learning_curves(study: Study, results: Results) -> dict[str, dict[str, list[Curve]]]:
    """By share of labels, in words, and method the validations of each fine-tuning that had some."""
    found: dict[str, dict[str, list[Curve]]] = {}
    for labels in study.labels:
        for method in study.methods:
            cells = [cell for cell, _ in results.cells if cell.labels == labels and cell.method == method]
            curves = [curve for curve in map(_validations, cells) if len(curve[0])]
            if curves:
                found.setdefault(labels_text(labels), {})[method] = curves
    return found


def _validations(cell: Cell) -> Curve:
    try:
        return MetricsFile(cell.folder / "metrics.csv")("val_mean_dice")
    except (OSError, ValueError):  # nothing was logged: that is no reason to go without tables
        return np.array([]), np.array([])


def _gains(study: Study, dice: Rows) -> dict[str, list[Estimate]]:
    """By method its gain in the average for each share of labels, NaN where there is none."""
    found: dict[str, dict[float, Estimate]] = {}
    for row in dice:
        if row["organ"] == AVERAGE and row["paired_seeds"]:
            estimate = tuple(row[name] for name in ("difference", "ci95_low", "ci95_high"))
            found.setdefault(row["method"], {})[row["labels"]] = estimate
    nothing = (float("nan"),) * 3
    return {method: [some.get(labels, nothing) for labels in study.labels] for method, some in found.items()}


def _organ_scores(study: Study, dice: Rows, labels: float, organs: Sequence[str]) -> dict[str, list[Estimate]]:
    """By method its mean of each organ, from one standard deviation over seeds below to one above."""
    scores: dict[str, list[Estimate]] = {}
    for method in study.methods:
        some = {row["organ"]: row for row in dice if row["labels"] == labels and row["method"] == method}
        if some:
            ends = [(row["mean"], row["mean"] - row["sd"], row["mean"] + row["sd"]) for row in map(some.get, organs)]
            scores[method] = ends
    return scores


def write_study_report(
    study: Study, results: Results, rows: Rows, learning_rates: Rows, failures: Mapping[str, str]
) -> Path:
    """Write ``report.html``.

    Args:
        study: whose report it is.
        results: of its finished cells.
        rows: of the comparison.
        learning_rates: which were tried, with the validation's Dice and which was chosen.
        failures: why cells failed, by name.

    Returns:
        the file.
    """
    return render_page(
        "study.html",
        study.folder / "report.html",
        title=study.title,
        note=study.note,
        study=study,
        verdicts=verdicts(study, rows),
        blocks=paper_tables(study, results, rows),
        notes=NOTES,
        missing=missing_text(results),
        failures=failures,
        learning_rates=learning_rates,
        cells=results.cells,
    )
