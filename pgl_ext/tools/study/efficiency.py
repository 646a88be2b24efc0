"""How soon, and with how few labels, methods are as good as the reference in the end: rows and tables."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any

from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.evaluation.summary import AVERAGE
from pgl_ext.tools.study.results import Results
from pgl_ext.tools.study.runs import labels_text
from pgl_ext.tools.tables import Table, difference_texts, score_text

__all__ = ["EFFICIENCY_NOTES", "curve_rows", "efficiency_tables", "steps_to_reach"]

EFFICIENCY_NOTES = """\
Steps are those of fine-tuning. The models kept after them, and that of the end, were tested alike, and nothing is
chosen by their scores. The steps to reach a Dice are the first of them after which the mean over the seeds has it,
without interpolation: at most that many were needed. Intervals here are not adjusted for the number of methods, steps
and labels: nothing is called better by them."""

_DIGITS = METRICS["dice"].digits


def curve_rows(results: Results) -> list[dict[str, Any]]:
    """The average Dice over the test cases of each fine-tuning, after each kept step and in the end.

    Returns:
        Rows of ``labels``, ``method``, ``seed``, ``step`` and ``dice``; none where the study keeps no steps.
    """
    if not results.study.kept_steps:
        return []
    ends = {run: noted["steps"] for run, noted in results.finished}
    rows = []
    for run, scores in results.scores.items():
        kept = {step: runs[run] for step, runs in results.kept.items() if run in runs}
        for step, evaluated in {**kept, ends[run]: scores}.items():
            dice = float(results.means([evaluated], "dice")[0, -1])
            rows.append({"labels": run.labels, "method": run.method, "seed": run.seed, "step": step, "dice": dice})
    return rows


def efficiency_tables(results: Results) -> list[Table]:
    """Dice after kept steps, steps to reach the reference's final Dice, and Dice beside the reference's of more labels.

    Those that the study has something for.
    """
    return [*_tables_of_steps(results), *_tables_of_labels(results)]


# --- steps ----------------------------------------------------------------------------------------------------------


def _tables_of_steps(results: Results) -> list[Table]:
    study = results.study
    if not study.kept_steps:
        return []
    reached = Table(f"Steps to reach {study.reference}'s final Dice", ["method"], [[name] for name in study.methods])
    tables = []
    for labels in study.labels:
        rows = _rows_of_steps(results, labels)
        if not rows:
            continue
        head = ["steps", "method", "Dice", f"minus {study.reference}", "95 % interval"]
        reached.head.append(labels_text(labels))
        for method, line in zip(study.methods, reached.rows, strict=True):
            steps = steps_to_reach(results, labels, method)
            line.append(str(steps) if steps else "-" if any(row["method"] == method for row in rows) else "")
        lines = [[str(row["step"]), row["method"], score_text(row, _DIGITS), *_difference(row)] for row in rows]
        tables.append(Table(f"Dice after n steps, {labels_text(labels)}", head, lines))
    return [*tables, reached] if tables else []


def steps_to_reach(results: Results, labels: float, method: str) -> int | None:
    """Of the steps after which models were kept, the first at which a method has the reference's final mean Dice."""
    rows = _rows_of_steps(results, labels)
    final = next((row["mean"] for row in rows if row["is_end"] and row["method"] == results.study.reference), nan)
    return next((row["step"] for row in rows if row["method"] == method and row["mean"] >= final), None)


def _rows_of_steps(results: Results, labels: float) -> list[dict[str, Any]]:
    """The comparison of all methods after each kept step and in the end, with ``step`` and ``is_end``."""
    # That of the longest run, where some stopped early.
    ends = [noted["steps"] for run, noted in results.finished if run.labels == labels]
    rows = []
    for step in (*(step for step in results.study.kept_steps if step < max(ends, default=0)), None):
        methods = results.by_seed(labels, step)
        for row in results.compared(methods, methods[results.study.reference], "dice"):
            if row["organ"] == AVERAGE:
                rows.append({**row, "step": max(ends) if step is None else step, "is_end": step is None})
    return rows


def _difference(row: Mapping[str, Any]) -> list[str]:
    return difference_texts(row, _DIGITS)[:2] if row["paired_seeds"] else ["", ""]


# --- labels ---------------------------------------------------------------------------------------------------------


def _tables_of_labels(results: Results) -> list[Table]:
    """Beside the least labels that are at least twice as many."""
    study = results.study
    tables = []
    for few in study.labels:
        many = next((labels for labels in study.labels if labels >= 2 * few), None)
        of_reference = results.select(labels=many, method=study.reference, metric="dice", organ=AVERAGE)
        if of_reference:
            beside = f"{study.reference}, {labels_text(many)}"
            head = ["method", f"Dice, {labels_text(few)}", f"Dice, {beside}", "difference", "95 % interval"]
            rows = results.compared(results.by_seed(few), results.by_seed(many)[study.reference], "dice")
            texts = [score_text(of_reference[0], _DIGITS)]
            lines = [
                [row["method"], score_text(row, _DIGITS), *texts, *_difference(row)]
                for row in rows
                if row["organ"] == AVERAGE
            ]
            tables.append(Table(f"Labels to reach: {labels_text(few)} beside {beside}", head, lines))
    return tables
