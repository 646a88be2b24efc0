"""The tables of a study, sentences on what can be told apart, and its page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.evaluation.summary import AVERAGE, number_text
from pgl_ext.files import write_csv, write_text
from pgl_ext.tools.report import render_page
from pgl_ext.tools.study.results import REPORTED, Results
from pgl_ext.tools.study.runs import Run, labels_text

__all__ = ["NOTES", "Block", "paper_tables", "verdicts", "write_study_report", "write_tables"]

NOTES = """\
Scores are means over the test cases; of several seeds their mean is given and, after ±, their standard deviation.
Differences are paired: a case's scores are averaged over the seeds that both methods have, and differences are taken
case by case, with a 95 % bootstrap interval over the test cases. An organ that a test case lacks has Dice 0 where it is
predicted all the same, and else no score, but in differences the perfect one (Dice 1, HD95 0) where the other method or
another seed predicts it: so they need not be those of the means. p is that of the two-sided Wilcoxon signed-rank test
and not adjusted; p (Holm) is adjusted for the number of methods. Neither knows what other seeds or other labelled
cases would change. A method is called better or worse than the reference where, of its average Dice, p (Holm) is below
0.05 and the interval leaves out 0. The cost, at the end of a row, is that of one pre-training."""

_SIGNIFICANT = 0.05


def verdicts(results: Results) -> list[str]:
    """For each share of labels, in a sentence, which methods differ from the reference and which cannot be told apart.

    That is about these networks, as :data:`NOTES` says; where the sign is not the same in every seed, the sentence says
    so, since others of the same methods may differ otherwise.
    """
    sentences = []
    for labels in results.study.labels:
        averages = [rows[AVERAGE] for rows in results.tables.get((labels, "dice"), {}).values()]
        compared = [row for row in averages if row["paired_seeds"]]
        verdicts: dict[str, list[str]] = {}
        for row in compared:
            text = f"{row['method']} ({_number(row['difference'], 3, '+')}, {_interval(row, 3)})"
            verdicts.setdefault(_verdict(row, len(compared)), []).append(text)
        if compared:
            parts = [f"{verdict} {results.study.reference}: {', '.join(texts)}" for verdict, texts in verdicts.items()]
            sentences.append(f"{labels_text(labels)}, average Dice: {'; '.join(parts)}.")
    return sentences


def _verdict(row: Mapping[str, Any], methods: int) -> str:
    # The least p of n pairs, adjusted for as many methods.
    if 2.0 ** (1 - row["paired_cases"]) * methods > _SIGNIFICANT:
        return "on too few test cases to be told apart from"
    if row["p_holm"] < _SIGNIFICANT and row["ci95_low"] * row["ci95_high"] > 0:
        verdict = "worse than" if row["difference"] < 0 else "better than"
        return verdict if row["agreeing_seeds"] == row["paired_seeds"] else f"{verdict}, but not in every seed,"
    return "not distinguishable from"


class Block(NamedTuple):
    """A table of texts: its title, the heads of its columns, and a row per method."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paper_tables(results: Results) -> list[Block]:
    """The tables of the paper: for each share of labels and metric methods by organs, and how the average differs."""
    costs, unit = results.costs()
    blocks = []
    for (labels, metric), methods in results.tables.items():
        name, digits, _ = METRICS[metric]
        organs = results.organs[:-1]
        difference = [f"minus {results.study.reference}", "95 % interval", "p", "p (Holm)"]
        cost_head = [unit] if unit else []
        block = Block(f"{name}, {labels_text(labels)}", ["method", AVERAGE, *difference, *organs, *cost_head], [])
        for method, rows in methods.items():
            average, *scores = (_score(rows[organ], digits) for organ in (AVERAGE, *organs))
            cost = [f"{costs[method]:.3g}" if method in costs else ""] if unit else []
            block.rows.append([method, average, *_difference(rows[AVERAGE], digits), *scores, *cost])
        blocks.append(block)
    return blocks


def _difference(row: Mapping[str, Any], digits: int) -> list[str]:
    p = [f"{row[name]:.3g}" if math.isfinite(row[name]) else "" for name in ("p", "p_holm")]
    return [_number(row["difference"], digits, "+"), _interval(row, digits), *p]


def _score(row: Mapping[str, Any], digits: int) -> str:
    spread = f" ± {row['sd']:.{digits}f}" if math.isfinite(row["sd"]) else ""
    return number_text(row["mean"], f".{digits}f") + spread


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else ""


def _interval(row: Mapping[str, Any], digits: int) -> str:
    ends = [_number(row[name], digits, "+") for name in ("ci95_low", "ci95_high")]
    return " to ".join(ends) if all(ends) else ""


# --- files ----------------------------------------------------------------------------------------------------------


def write_tables(results: Results, tried: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write ``table.md``, and ``study.csv``, ``runs.csv``, ``table.csv`` and ``learning_rates.csv`` that have a row.

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
        "learning_rates.csv": tried,
    }
    for name, rows in tables.items():
        (study.folder / name).unlink(missing_ok=True)  # of a study that was in this folder before
        if rows:
            write_csv(study.folder / name, [{share if n == "labels" else n: v for n, v in row.items()} for row in rows])
    parts = [f"# {study.title}", study.note, *verdicts(results)]
    parts += [*(block.markdown() for block in paper_tables(results)), NOTES, results.missing_text()]
    write_text(study.folder / "table.md", "\n\n".join(part for part in parts if part) + "\n")


def _score_rows(results: Results) -> list[dict[str, Any]]:
    return [
        {"labels": run.labels, "method": run.method, "seed": run.seed, "case": case, "organ": organ}
        | {metric: values[case, organ] for metric, values in scores.items()}
        for run, scores in results.scores.items()
        for case, organ in scores["dice"]
    ]


def _run_row(run: Run, noted: Mapping[str, Any], results: Results) -> dict[str, Any]:
    row = {"run": run.name, "method": run.method, "labels": run.labels, "seed": run.seed, "lr": run.lr}
    for metric in REPORTED:
        row[f"mean_{metric}"] = results.means[run][metric][AVERAGE] if run in results.means else None
    return row | {name: noted.get(name) for name in ("val_mean_dice", "steps", "pairs", "seconds", "cost", "unit")}


def write_study_report(results: Results, tried: Sequence[Mapping[str, Any]], failures: Mapping[str, str]) -> Path:
    """Write ``report.html``: one file that opens anywhere, offline, with the pictures that lie in the folder.

    Args:
        results: of the finished runs.
        tried: learning rates, with the validation's Dice and which was chosen.
        failures: why runs failed, by name.

    Returns:
        the file.
    """
    return render_page(
        "study.html",
        results.study.folder / "report.html",
        title=results.study.title,
        note=results.study.note,
        results=results,
        verdicts=verdicts(results),
        blocks=paper_tables(results),
        notes=NOTES,
        failures=failures,
        tried=tried,
    )
