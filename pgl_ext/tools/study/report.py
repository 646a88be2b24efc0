"""The tables of a study, sentences on what can be told apart, and its page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.evaluation.summary import AVERAGE, finite_mean, grouped, number_text
from pgl_ext.evaluation.verdict import verdict
from pgl_ext.files import write_csv, write_text
from pgl_ext.tools.report import case_pictures, render_page
from pgl_ext.tools.study.efficiency import EFFICIENCY_NOTES, curve_rows, efficiency_tables
from pgl_ext.tools.study.results import REPORTED, Results
from pgl_ext.tools.study.runs import Run, evaluation_folder, labels_text
from pgl_ext.tools.tables import Table, difference_texts, score_text

__all__ = ["NOTES", "cost_table", "paper_tables", "verdicts", "write_study_report", "write_tables"]

NOTES = """\
Scores are means over the test cases; of several seeds their mean is given and, after ±, their standard deviation.
Differences are paired, by the seeds that both methods have and by case. An organ that a test case lacks has Dice 0
where it is predicted all the same, and else no score, but in differences the perfect one (Dice 1, HD 0) where the
other method or another seed predicts it: so they need not be those of the means. From three seeds on, the 95 % interval
covers other seeds and other test cases: that of Student's t with the variances of both. With fewer it is a bootstrap
over the test cases alone, there is no p, and nothing is called a difference, since single runs differ by their seed. p
is not adjusted; p (Holm) is adjusted for the number of methods. A method is called better or worse than the reference
where, of its average Dice, p (Holm) is below 0.05. NSD is the normalised surface distance, with the tolerance that the
evaluations' summary.json has for each organ. The cost, at the end of a row, is that of one pre-training. The
time for a test scan is the median of the network's passes over all its windows, without reading and writing."""


def verdicts(results: Results) -> list[str]:
    """For each share of labels, in a sentence, which methods differ from the reference and which do not."""
    sentences = []
    for labels in results.study.labels:
        averages = results.select(labels=labels, metric="dice", organ=AVERAGE)
        compared = {row["method"]: row | {"seeds": row["paired_seeds"]} for row in averages if row["paired_seeds"]}
        if compared:
            text = verdict(compared, results.study.reference)
            sentences.append(f"{labels_text(labels)}, average Dice: {text}.")
    return sentences


def paper_tables(results: Results) -> list[Table]:
    """The tables of the paper: for each share of labels and metric methods by organs, and how the average differs."""
    costs, unit = results.costs()
    head = [f"minus {results.study.reference}", "95 % interval", "p", "p (Holm)"]
    tables = []
    for labels, metric in itertools.product(results.study.labels, REPORTED):
        title, digits, _ = METRICS[metric]
        organs = results.organs[:-1]
        table = Table(
            f"{title}, {labels_text(labels)}", ["method", AVERAGE, *head, *organs, *([unit] * bool(unit))], []
        )
        for method in results.study.methods:
            rows = {row["organ"]: row for row in results.select(labels=labels, metric=metric, method=method)}
            if rows:
                average, *scores = (score_text(rows[organ], digits) for organ in (AVERAGE, *organs))
                difference = difference_texts(rows[AVERAGE], digits) if rows[AVERAGE]["paired_seeds"] else [""] * 4
                cost = [f"{costs[method]:.3g}" if method in costs else ""] if unit else []
                table.rows.append([method, average, *difference, *scores, *cost])
        if table.rows:
            tables.append(table)
    return tables


def cost_table(results: Results) -> Table:
    """What each method costs, as section 5.3 of the PGL paper has it: means over the seeds, with the most labels."""
    costs, labels = results.costs()[0], results.study.labels[-1]
    runs = grouped(
        [{**noted, "method": run.method} for run, noted in results.finished if run.labels == labels], "method"
    )
    unit = next((rows[0]["unit"] for rows in runs.values()), "")
    head = ["method", f"pre-training, {unit}", f"fine-tuning, {unit}", "ms for a test scan", "device"]
    table = Table(f"Cost, {labels_text(labels)}", head, [])
    for method in filter(runs.__contains__, results.study.methods):
        seconds = finite_mean(row.get("seconds_per_case") or math.nan for row in runs[method])
        fine_tuning = finite_mean(row["cost"] for row in runs[method])
        hours = [number_text(costs.get(method), 2), number_text(fine_tuning, 2)]
        devices = sorted({row["device"] for row in runs[method] if row.get("device")})
        table.rows.append([method, *hours, number_text(1000 * seconds, 0), ", ".join(devices)])
    return table


# --- files ----------------------------------------------------------------------------------------------------------


def write_tables(results: Results, tried: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write ``table.md``, and those of ``study.csv``, ``runs.csv``, ``table.csv``, ``curves.csv`` and
    ``learning_rates.csv`` that have a row.

    Args:
        results: of the finished runs.
        tried: learning rates, with the validation's Dice and which was chosen.
    """
    study, (costs, _) = results.study, results.costs()
    share = "labelled_cases" if isinstance(study.labels[0], int) else "label_fraction"
    comparison = [row | {"pretraining_cost": costs.get(row["method"])} for row in results.rows]
    tables = {
        "study.csv": _score_rows(results),
        "runs.csv": [_run_row(run, noted, results) for run, noted in results.finished],
        "table.csv": comparison,
        "curves.csv": curve_rows(results),
        "learning_rates.csv": tried,
    }
    for name, rows in tables.items():
        (study.folder / name).unlink(missing_ok=True)  # of a study that was in this folder before
        if rows:
            write_csv(study.folder / name, [{share if n == "labels" else n: v for n, v in row.items()} for row in rows])
    parts = [f"# {study.title}", study.note, *verdicts(results)]
    parts += [*(table.markdown() for table in (*paper_tables(results), cost_table(results))), NOTES]
    further = efficiency_tables(results)
    parts += [*(table.markdown() for table in further), EFFICIENCY_NOTES if further else "", results.missing_text()]
    write_text(study.folder / "table.md", "\n\n".join(part for part in parts if part) + "\n")


def _score_rows(results: Results) -> list[dict[str, Any]]:
    return [
        {"labels": run.labels, "method": run.method, "seed": run.seed, "case": case, "organ": organ}
        | {metric: values[metric] for metric in REPORTED}
        for run, scores in results.scores.items()
        for (case, organ), values in scores.items()
    ]


def _run_row(run: Run, noted: Mapping[str, Any], results: Results) -> dict[str, Any]:
    row = {"run": run.name, "method": run.method, "labels": run.labels, "seed": run.seed}
    row |= {"lr": run.rates.pretraining, "fine_tuning_lr": run.rates.fine_tuning}
    scores = results.scores.get(run)
    for metric in REPORTED:
        row[f"mean_{metric}"] = None if scores is None else results.means([scores], metric)[0, -1]
    names = ("val_mean_dice", "steps", "pairs", "seconds", "cost", "unit", "seconds_per_case", "device")
    return row | {name: noted.get(name) for name in names}


def write_study_report(results: Results, tried: Sequence[Mapping[str, Any]], failures: Mapping[str, str]) -> Path:
    """Write ``report.html``: one file that opens anywhere, offline, with the pictures that lie in the folder.

    Args:
        results: of the finished runs.
        tried: learning rates, with the validation's Dice and which was chosen.
        failures: why runs failed, by name.

    Returns:
        the file.
    """
    study = results.study
    pictured = [run for run in results.scores if (run.labels, run.seed) == (study.labels[-1], study.seeds[0])]
    pictured.sort(key=lambda run: run.method != study.reference)
    return render_page(
        "study.html",
        study.folder / "report.html",
        title=study.title,
        note=study.note,
        cases=case_pictures({run.method: evaluation_folder(run.folder) for run in pictured}, study.pictured_cases),
        results=results,
        verdicts=verdicts(results),
        tables=[*paper_tables(results), cost_table(results)],
        notes=NOTES,
        efficiency=efficiency_tables(results),
        efficiency_notes=EFFICIENCY_NOTES,
        failures=failures,
        tried=tried,
    )
