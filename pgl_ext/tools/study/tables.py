"""The tables of a study: tidy files, the form of the paper, and in words what can be told apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.evaluation.summary import AVERAGE
from pgl_ext.files import write_csv, write_text
from pgl_ext.tools.study.cells import Cell, labels_text
from pgl_ext.tools.study.plan import Study
from pgl_ext.tools.study.results import REPORTED, Results, organ_means, pretraining_costs

__all__ = ["NOTES", "Block", "missing_text", "paper_tables", "verdicts", "write_tables"]

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


def verdicts(study: Study, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """For each share of labels, in a sentence, which methods differ from the reference and which cannot be told apart.

    A method is better or worse where, of its average Dice, ``p_holm`` is below 0.05 and the interval leaves out 0, as
    ranks and mean may differ in sign. That is about these networks; where the sign is not the same in every seed, the
    sentence says so, since others of the same methods may differ otherwise.
    """
    compared = [row for row in rows if row["metric"] == "dice" and row["organ"] == AVERAGE and row["paired_seeds"]]
    groups: dict[float, dict[str, list[str]]] = {}
    for row in compared:
        methods = sum(other["labels"] == row["labels"] for other in compared)
        text = f"{row['method']} ({_number(row['difference'], 3, '+')}, {_interval(row, 3)})"
        groups.setdefault(row["labels"], {}).setdefault(_verdict(row, methods), []).append(text)
    return [
        f"{labels_text(labels)}, average Dice: "
        + "; ".join(f"{group} {study.reference}: {', '.join(texts)}" for group, texts in found.items())
        + "."
        for labels, found in groups.items()
    ]


def _verdict(row: Mapping[str, Any], methods: int) -> str:
    # The least p of n pairs, adjusted for as many methods.
    if 2.0 ** (1 - row["paired_cases"]) * methods > _SIGNIFICANT:
        return "on too few test cases to be told apart from"
    if row["p_holm"] < _SIGNIFICANT and row["ci95_low"] * row["ci95_high"] > 0:
        group = "worse than" if row["difference"] < 0 else "better than"
        return group if row["agreeing_seeds"] == row["paired_seeds"] else f"{group}, but not in every seed,"
    return "not distinguishable from"


@dataclass
class Block:
    """A table of texts.

    Args:
        title: above it.
        head: of its columns.
        rows: one per method.
    """

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paper_tables(study: Study, results: Results, rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The tables of the paper: for each share of labels and metric methods by organs, and how the average differs."""
    blocks = []
    costs = pretraining_costs(results)
    unit = [next(unit for _, unit in costs.values())] if costs else []
    for labels in sorted(results.scores):
        for metric in REPORTED:
            name, digits, _ = METRICS[metric]
            some = [row for row in rows if row["labels"] == labels and row["metric"] == metric]
            organs = [organ for organ in dict.fromkeys(row["organ"] for row in some) if organ != AVERAGE]
            head = ["method", AVERAGE, f"minus {study.reference}", "95 % interval", "p", "p (Holm)", *organs, *unit]
            block = Block(f"{name}, {labels_text(labels)}", head, [])
            for method in dict.fromkeys(row["method"] for row in some):
                found = {row["organ"]: row for row in some if row["method"] == method}
                average, *scores = (_score(found[organ], digits) for organ in (AVERAGE, *organs))
                cost = [f"{costs[method][0]:.3g}" if method in costs else ""] if unit else []
                block.rows.append([method, average, *_difference(found[AVERAGE], digits), *scores, *cost])
            blocks.append(block)
    return blocks


def _difference(row: Mapping[str, Any], digits: int) -> list[str]:
    p = [f"{row[name]:.3g}" if math.isfinite(row[name]) else "" for name in ("p", "p_holm")]
    return [_number(row["difference"], digits, "+"), _interval(row, digits), *p]


def _score(row: Mapping[str, Any], digits: int) -> str:
    spread = f" ± {row['sd']:.{digits}f}" if math.isfinite(row["sd"]) else ""
    return (_number(row["mean"], digits) or "n/a") + spread


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else ""


def _interval(row: Mapping[str, Any], digits: int) -> str:
    ends = [_number(row[name], digits, "+") for name in ("ci95_low", "ci95_high")]
    return " to ".join(ends) if all(ends) else ""


# --- files ----------------------------------------------------------------------------------------------------------


def write_tables(study: Study, results: Results, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``study.csv``, ``cells.csv``, ``table.csv`` and ``table.md``, those of them that have a row."""
    share = "labelled_cases" if isinstance(study.labels[0], int) else "label_fraction"
    costs = pretraining_costs(results)
    comparison = [{share if name == "labels" else name: value for name, value in row.items()} for row in rows]
    tables = {
        "study.csv": _score_rows(results, share),
        "cells.csv": [_cell_row(cell, noted, results, share) for cell, noted in results.cells],
        "table.csv": [{**row, "pretraining_cost": costs.get(row["method"], (None,))[0]} for row in comparison],
    }
    for name, found in tables.items():
        if found:
            write_csv(study.folder / name, found)
    parts = [f"# {study.title}", study.note, *verdicts(study, rows)]
    parts += [block.markdown() for block in paper_tables(study, results, rows)]
    parts += [NOTES, missing_text(results)]
    write_text(study.folder / "table.md", "\n\n".join(part for part in parts if part) + "\n")


def missing_text(results: Results) -> str:
    """In words, which cells the tables lack."""
    if not results.missing:
        return ""
    return f"Not finished, and missing here: {'; '.join(map(str, results.missing))}."


def _score_rows(results: Results, share: str) -> list[dict[str, Any]]:
    return [
        {share: labels, "method": method, "seed": seed, "case": case, "organ": organ}
        | {metric: values[case, organ] for metric, values in scores.items()}
        for labels, methods in sorted(results.scores.items())
        for method, seeds in methods.items()
        for seed, scores in sorted(seeds.items())
        for case, organ in scores["dice"]
    ]


def _cell_row(cell: Cell, noted: Mapping[str, Any], results: Results, share: str) -> dict[str, Any]:
    row = {"cell": cell.name, "method": cell.method, share: cell.labels, "seed": cell.seed, "lr": cell.lr}
    scores = {} if cell.is_pretraining else results.scores[cell.labels][cell.method][cell.seed]
    means = {
        metric: organ_means(scores[metric], list(scores[metric]))[AVERAGE] if scores else None for metric in REPORTED
    }
    noted = {name: noted.get(name) for name in ("val_mean_dice", "steps", "pairs", "seconds", "cost", "unit")}
    return row | {f"mean_{metric}": value for metric, value in means.items()} | noted
