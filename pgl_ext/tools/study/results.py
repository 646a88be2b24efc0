"""What the finished cells of a study left, and how the methods compare with the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgl_ext.evaluation.compare import Scores, by_organ, common_keys, paired_scores, paired_statistics, read_scores
from pgl_ext.evaluation.summary import AVERAGE, finite_mean
from pgl_ext.tools.study.cells import Cell, labels_text
from pgl_ext.tools.study.plan import Study

__all__ = ["REPORTED", "Results", "comparison_rows", "holm", "organ_means", "pretraining_costs", "read_results"]

REPORTED = ("dice", "iou", "hd95_mm")
"""Columns of ``cases.csv`` that a study reports."""


@dataclass
class Results:
    """What the finished cells of a study left.

    Args:
        cells: finished ones, with what they noted.
        scores: of each fine-tuning, by share of labels, method and seed.
        missing: cells that are not finished.
    """

    cells: list[tuple[Cell, dict[str, Any]]]
    scores: dict[float, dict[str, dict[int, Scores]]]
    missing: list[Cell]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """The cases and organs of all evaluations."""
        return common_keys(
            {
                f"{method}, {labels_text(labels)}, seed {seed}": scores["dice"]
                for labels, methods in self.scores.items()
                for method, seeds in methods.items()
                for seed, scores in seeds.items()
            }
        )


def read_results(cells: Sequence[Cell]) -> Results:
    """Read what the finished ones among all cells of a study left.

    Raises:
        ValueError: an evaluation cannot be read.
    """
    scores: dict[float, dict[str, dict[int, Scores]]] = {}
    for cell in cells:
        if cell.is_finished and not cell.is_pretraining:
            found = read_scores(cell.folder / "evaluation", REPORTED)
            scores.setdefault(cell.labels, {}).setdefault(cell.method, {})[cell.seed] = found
    finished = [(cell, cell.result()) for cell in cells if cell.is_finished]
    return Results(finished, scores, [cell for cell in cells if not cell.is_finished])


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for their number by Holm's step-down method; NaN is neither counted nor adjusted.

    Of m values in ascending order, the k-th becomes ``max over j <= k of min(1, (m - j + 1) p_j)``.
    """
    values = np.asarray(p, dtype=np.float64)
    order = [index for index in np.argsort(values) if math.isfinite(values[index])]
    adjusted, largest = np.full(values.shape, math.nan), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted.tolist()


def comparison_rows(study: Study, results: Results) -> list[dict[str, Any]]:
    """Each method's scores, and how they differ from the reference's, by share of labels, metric and organ.

    Returns:
        Rows with ``mean`` over the test cases and its mean and standard deviation (``sd``, of a sample) over seeds; for
        methods other than the reference what :func:`pgl_ext.evaluation.compare.paired_statistics` finds of the cases' scores, each
        averaged over the seeds that both have; in how many of these the difference has the sign of the mean one
        (``agreeing_seeds``); and for the average over organs ``p_holm``, adjusted for the number of
        methods that are compared with the reference at that share of labels.
    """
    rows, keys = [], results.keys if results.scores else []
    for labels, methods in sorted(results.scores.items()):
        for metric in REPORTED:
            found = [
                row
                for method in study.methods
                if method in methods
                for row in _method_rows(methods, method, study.reference, metric, keys)
            ]
            averages = [row for row in found if row["organ"] == AVERAGE and row["method"] != study.reference]
            for row, adjusted in zip(averages, holm([row["p"] for row in averages]), strict=True):
                row["p_holm"] = adjusted
            rows += [{"labels": labels, "metric": metric, **row} for row in found]
    return rows


def _method_rows(
    methods: Mapping[str, Mapping[int, Scores]],
    method: str,
    reference: str,
    metric: str,
    keys: Sequence[tuple[str, str]],
) -> list[dict[str, Any]]:
    own, others = (
        {seed: {metric: found[metric]} for seed, found in methods.get(name, {}).items()} for name in (method, reference)
    )
    by_seed = [{seed: organ_means(scores[metric], keys) for seed, scores in some.items()} for some in (own, others)]
    means = list(by_seed[0].values())
    shared = [seed for seed in own if seed in others]
    pairs: Mapping[str, tuple] = {}
    if shared and method != reference:
        pairs = paired_scores(*([some[seed] for seed in shared] for some in (others, own)), keys)[metric]
    rows = []
    for organ in means[0]:
        values = [found[organ] for found in means if math.isfinite(found[organ])]
        statistics = paired_statistics(*pairs.get(organ, ([], [])))
        signs = [np.sign(by_seed[0][seed][organ] - by_seed[1][seed][organ]) for seed in shared]
        rows.append(
            {
                "organ": organ,
                "method": method,
                "seeds": len(means),
                "mean": float(np.mean(values)) if values else math.nan,
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
                "paired_seeds": len(shared) if pairs else 0,
                "agreeing_seeds": signs.count(np.sign(statistics["difference"])) if pairs else 0,
                "paired_cases": statistics["n"],
                **{name: statistics[name] for name in ("difference", "ci95_low", "ci95_high", "p")},
                "p_holm": math.nan,
            }
        )
    return rows


def organ_means(scores: Mapping[tuple[str, str], float], keys: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Mean over the cases of each organ, and of the cases' averages over their organs."""
    values = {organ: np.array(found) for organ, found in by_organ(scores, keys).items()}
    averages = np.array([finite_mean(case) for case in np.array(list(values.values())).T])
    return {organ: finite_mean(found) for organ, found in {**values, AVERAGE: averages}.items()}


def pretraining_costs(results: Results) -> dict[str, tuple[float, str]]:
    """Mean cost of a method's pre-training over its seeds, with the unit."""
    costs: dict[str, list[tuple[float, str]]] = {}
    for cell, noted in results.cells:
        if cell.is_pretraining:
            costs.setdefault(cell.method, []).append((noted["cost"], noted["unit"]))
    return {method: (float(np.mean([cost for cost, _ in found])), found[0][1]) for method, found in costs.items()}
