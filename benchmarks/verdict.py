"""How often chance alone is called a difference, and how often a true one is found: by scores of equal runs.

    python benchmarks/verdict.py [SCORES.csv]

Draws two groups of seeds of one method, none in both, and asks `pgl_ext.evaluation.verdict` whether they differ; then
again with 0.01, 0.02 and 0.04 added to the Dice of one group. Test cases are taken as they are, or drawn with
replacement. For comparison, in the last row: one run of each, by the Wilcoxon signed-rank test over the cases, which
does not know of seeds.

SCORES.csv, by default `verdict_scores.csv` beside this file, has the columns seed, case, organ and dice. It holds ten
seeds of random weights on 14 labelled cases of MSD Task04, hippocampus, from the repository's folder (the data as
`studies/hippocampus_small.yaml` says, some 40 minutes on one CPU core):

    pgl study studies/hippocampus_labels.yaml --out RUNS --methods "{'random': {'encoder': None}}" \
        --labelled_cases "[14]" --seeds "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"
    cut -d, -f3-6 RUNS/study.csv > benchmarks/verdict_scores.csv
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.stats import wilcoxon

from pgl_ext.evaluation.summary import table
from pgl_ext.evaluation.verdict import paired_statistics, verdict
from pgl_ext.files import read_csv

DRAWS = 2000
GROUPS = (3, 5)
GAINS = (0.0, 0.01, 0.02, 0.04)


def read_scores(path: Path) -> np.ndarray:
    """Mean Dice of the organs, (seeds, cases); NaN where an organ has none takes no part."""
    rows = read_csv(path)
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["seed"], row["case"]), []).append(float(row["dice"] or "nan"))
    seeds, cases = (list(dict.fromkeys(row[name] for row in rows)) for name in ("seed", "case"))
    if len(values) < len(seeds) * len(cases):
        raise ValueError(f"{path} does not have every case for every seed: evaluate all on the same cases.")
    if len(seeds) < 2 * max(GROUPS):
        raise ValueError(f"{path} has {len(seeds)} seeds, two groups of {max(GROUPS)} need {2 * max(GROUPS)}.")
    scores = np.array([[np.nanmean(values[seed, case]) for case in cases] for seed in seeds])
    return scores[:, np.isfinite(scores).all(0)]


def draws(scores: np.ndarray, size: int, resampled: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two groups of ``size`` seeds, (size, cases) each, the same draws each time."""
    rng = np.random.default_rng(0)
    seeds, cases = scores.shape
    for _ in range(DRAWS):
        chosen = rng.permutation(seeds)[: 2 * size]
        columns = rng.integers(cases, size=cases) if resampled else np.arange(cases)
        first, second = np.split(scores[chosen][:, columns], 2)
        yield first, second


def is_different(first: np.ndarray, second: np.ndarray) -> bool:
    found = paired_statistics(first, second)
    return verdict({"B": {**found, "p_holm": found["p"]}}, "A").startswith(("better", "worse"))


def share_called_different(scores: np.ndarray, size: int, resampled: bool, gain: float) -> float:
    """Of the draws, those in which the second group, whose Dice is ``gain`` higher, is called different."""
    if size == 1:
        called = [wilcoxon((b + gain - a)[0]).pvalue < 0.05 for a, b in draws(scores, size, resampled)]
    else:
        called = [is_different(first, second + gain) for first, second in draws(scores, size, resampled)]
    return float(np.mean(called))


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("verdict_scores.csv")
    scores = read_scores(path)
    seeds, cases = scores.shape
    print(
        f"{path.name}: {seeds} seeds, {cases} cases, mean Dice {scores.mean():.3f}, standard deviation over seeds "
        f"{scores.mean(1).std(ddof=1):.4f}; {DRAWS} draws, % called different\n"
    )
    head = ["seeds of each", "cases", "equal", *(f"+{gain:.2f}" for gain in GAINS[1:])]
    rows = []
    for size, resampled in [*((size, resampled) for size in GROUPS for resampled in (False, True)), (1, False)]:
        shares = [share_called_different(scores, size, resampled, gain) for gain in GAINS]
        name = f"{size}" if size > 1 else "1, Wilcoxon over cases"
        rows.append([name, "drawn" if resampled else "as they are", *(f"{100 * share:.1f}" for share in shares)])
    print(table(head, rows))


if __name__ == "__main__":
    main()
