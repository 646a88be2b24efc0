"""Whether one method differs from another by more than the seeds and the test cases explain.

Both are trained with the same number of seeds and tested on the same cases. Seed s of one is paired with seed s of the
other, since the seed draws labelled cases, weights and order for both. The differences of their scores are taken for a
random sample of seeds and of cases, every case under every seed (a two-way random-effects model)::

    D[s, c] = mu + a_s + b_c + e_sc,    s = 1 .. S,  c = 1 .. C

From the mean squares of the analysis of variance, with m_s, m_c and m the means of a seed, of a case and of all,

    MS_seed  = C  sum_s (m_s - m)^2 / (S - 1)
    MS_case  = S  sum_c (m_c - m)^2 / (C - 1)
    MS_error = sum_sc (D[s, c] - m_s - m_c + m)^2 / ((S - 1)(C - 1))

the variance of m is estimated as in studies of several readers and cases (Obuchowski and Rockette 1995; Hillis 2007)::

    V = max(MS_seed + MS_case - MS_error, MS_seed, MS_case) / (S C)

and m / sqrt(V) is compared with Student's t of Satterthwaite's degrees of freedom::

    df = (S C V)^2 / (MS_seed^2 / (S - 1) + MS_case^2 / (C - 1) + MS_error^2 / ((S - 1)(C - 1)))

held between min(S - 1, C - 1), the least that it can be, and 2 (S - 1): where few seeds agree by chance, V is too small
and df would be too large at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import t as student

from pgl_ext.evaluation.summary import confidence_interval, finite_mean, interval_text, number_text

__all__ = ["LEAST_SEEDS", "SINGLE_RUNS", "holm", "paired_statistics", "verdict"]

LEAST_SEEDS = 3
"""Pairs of seeds below which nothing is called a difference."""

SINGLE_RUNS = (
    "Single runs differ by their seed alone, so that nothing here can be called a difference: give at least three "
    "seeds of each, as many of one as of the other. Until then intervals are over cases only, and there is no p."
)

_SIGNIFICANT = 0.05


def paired_statistics(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Compare the scores of two methods, as the module says.

    Args:
        first: of the reference, (S, C), a row for each seed and a column for each case. Cases that are NaN in a seed of
            either are left out.
        second: of the other method, (S, C), seeds and cases in the same order.

    Returns:
        ``seeds`` (S), ``n`` (cases), ``mean_a``, ``mean_b``, ``difference`` (the mean of second - first), both ends of
        its 95 % interval ``ci95_low`` and ``ci95_high``, and ``p``, two-sided. Of fewer than three seeds the interval
        is a bootstrap over the cases' means, and p NaN; of fewer than two cases both are.

    Raises:
        ValueError: the scores differ in shape.
    """
    if np.shape(first) != np.shape(second) or np.ndim(first) != 2:
        raise ValueError(
            f"scores must be two arrays of one shape (seeds, cases), got {np.shape(first)} and {np.shape(second)}."
        )
    pairs = np.array([first, second], dtype=np.float64)
    pairs = pairs[..., np.isfinite(pairs).all((0, 1)) & (pairs.shape[1] > 0)]
    differences = pairs[1] - pairs[0]
    mean_a, mean_b, difference = (finite_mean(values.flat) for values in (*pairs, differences))
    seeds, cases = differences.shape
    p = math.nan
    if seeds < LEAST_SEEDS or cases < 2:
        low, high = confidence_interval(differences.mean(0) if seeds else [])
    else:
        error, freedom = _standard_error(differences)
        reach = error * student.ppf(0.975, freedom)
        low, high = difference - reach, difference + reach
        p = 2 * student.sf(abs(difference) / error, freedom) if error else float(difference == 0)
    values = {"mean_a": mean_a, "mean_b": mean_b, "difference": difference, "ci95_low": low, "ci95_high": high, "p": p}
    return {"seeds": seeds, "n": cases, **{name: float(value) for name, value in values.items()}}


def _standard_error(differences: np.ndarray) -> tuple[float, float]:
    """Standard error of the mean of differences (S, C), at least two of each, and its degrees of freedom."""
    seeds, cases = differences.shape
    by_seed, by_case = differences.mean(1, keepdims=True), differences.mean(0, keepdims=True)
    residuals = differences - by_seed - by_case + differences.mean()
    freedoms = np.array([seeds - 1, cases - 1, (seeds - 1) * (cases - 1)])
    sums = [cases * by_seed.var() * seeds, seeds * by_case.var() * cases, np.square(residuals).sum()]
    of_seeds, of_cases, of_error = squares = np.array(sums) / freedoms
    total = max(of_seeds + of_cases - of_error, of_seeds, of_cases)
    freedom = total**2 / np.sum(squares**2 / freedoms) if total else 1.0
    return math.sqrt(total / differences.size), float(np.clip(freedom, freedoms[:2].min(), 2 * freedoms[0]))


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for their number by Holm's step-down method; NaN is neither counted nor adjusted.

    Of m values in ascending order, the k-th becomes ``max over j <= k of min(1, (m - j + 1) p_j)``.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)  # NaN last
    factors = np.isfinite(values).sum() - np.arange(len(values))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * values[order]))
    return adjusted.tolist()


def verdict(rows: Mapping[str, Mapping[str, float]], reference: str, higher_is_better: bool = True) -> str:
    """Say which methods differ from the reference and which cannot be told apart from it.

    Args:
        rows: by method, what :func:`paired_statistics` found, and ``p_holm``, adjusted for the number of methods.
        reference: name of the method that they are compared with.
        higher_is_better: whether a positive difference is a gain.

    Returns:
        Parts of a sentence with semicolons between them; empty where there is no row.
    """
    parts: dict[str, list[str]] = {}
    for method, row in rows.items():
        numbers = number_text(row["difference"], sign="+")
        if row["seeds"] < LEAST_SEEDS:
            words = "of too few seeds (three at least) to be called different from"
        else:
            numbers += f", {interval_text((row['ci95_low'], row['ci95_high']), sign='+')}"
            words = "not distinguishable from"
            if row["p_holm"] < _SIGNIFICANT:
                words = "better than" if (row["difference"] > 0) == higher_is_better else "worse than"
        parts.setdefault(words, []).append(f"{method} ({numbers})")
    return "; ".join(f"{words} {reference}: {', '.join(methods)}" for words, methods in parts.items())
