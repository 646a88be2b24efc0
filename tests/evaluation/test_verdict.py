from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, t, ttest_1samp, ttest_ind

from pgl_ext.evaluation.verdict import holm, paired_statistics, verdict

RNG = np.random.default_rng(0)
OF_SEEDS, OF_CASES = RNG.normal(0.03, 0.01, 4), RNG.normal(0, 0.02, 6)
BASE = RNG.uniform(0.5, 0.9, (4, 6))


def statistics_of(differences) -> dict[str, float]:
    differences = np.asarray(differences, dtype=float)
    base = np.random.default_rng(1).uniform(0.5, 0.9, differences.shape)
    return paired_statistics(base, base + differences)


# --- closed forms ---------------------------------------------------------------------------------------------------


def check_t_test(found: dict[str, float], expected) -> None:
    assert found["p"] == pytest.approx(expected.pvalue, rel=1e-6)
    interval = expected.confidence_interval()
    assert (found["ci95_low"], found["ci95_high"]) == pytest.approx(tuple(interval), rel=1e-6)


def test_where_only_seeds_differ_it_is_the_t_test_over_seeds():
    check_t_test(statistics_of(np.tile(OF_SEEDS[:, None], 6)), ttest_1samp(OF_SEEDS, 0))


def test_where_only_cases_differ_it_is_the_t_test_over_cases():
    check_t_test(statistics_of(0.03 + np.tile(OF_CASES, (4, 1))), ttest_1samp(0.03 + OF_CASES, 0))


def test_where_both_add_up_it_is_welch_s_test():
    """The mean of seeds plus cases has the variance and the degrees of freedom of a difference of two samples."""
    expected = ttest_ind(OF_SEEDS, -OF_CASES, equal_var=False)
    check_t_test(statistics_of(OF_SEEDS[:, None] + OF_CASES), expected)


def test_mean_squares_are_those_of_least_squares():
    """Seeds, cases and residuals by regression on indicator variables."""
    seeds, cases = 4, 6
    differences = OF_SEEDS[:, None] + OF_CASES + RNG.normal(0, 0.01, (seeds, cases))
    s, c = (index.ravel() for index in np.indices((seeds, cases)))
    of_seed, of_case = np.eye(seeds)[s], np.eye(cases)[c]

    def rest(columns) -> float:
        fit = columns @ np.linalg.lstsq(columns, differences.ravel(), rcond=None)[0]
        return float(np.square(differences.ravel() - fit).sum())

    error = rest(np.hstack([of_seed, of_case]))
    squares = (rest(of_case) - error) / 3, (rest(of_seed) - error) / 5, error / 15
    total = squares[0] + squares[1] - squares[2]
    assert total > max(squares[:2])
    freedom = total**2 / (squares[0] ** 2 / 3 + squares[1] ** 2 / 5 + squares[2] ** 2 / 15)
    assert 3 < freedom < 6
    reach = t.ppf(0.975, freedom) * math.sqrt(total / (seeds * cases))
    found = statistics_of(differences)
    assert (found["ci95_low"], found["ci95_high"]) == pytest.approx(
        (differences.mean() - reach, differences.mean() + reach)
    )
    assert found["difference"] == pytest.approx(differences.mean())


def test_variance_is_never_less_than_that_of_seeds_or_cases_alone():
    """Here the cases' means are equal, and the mean square of cases, 0, less than that of the error."""
    differences = np.array([[0.03, 0.01], [0.00, 0.02], [0.02, 0.02]])
    differences -= differences.mean(0) - 0.02
    found = statistics_of(differences)
    by_seed = differences.mean(1)
    at_least = t.ppf(0.975, 4) * by_seed.std(ddof=1) / math.sqrt(3)
    assert found["ci95_high"] - found["difference"] >= at_least


# --- what is left out -----------------------------------------------------------------------------------------------


def test_cases_without_a_value_in_any_seed_are_left_out():
    second = BASE + 0.1
    second[1, 2] = math.nan
    expected = paired_statistics(np.delete(BASE, 2, 1), np.delete(second, 2, 1))
    assert expected["n"] == 5
    assert paired_statistics(BASE, second) == expected


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_have_an_interval_over_cases_and_no_p(seeds):
    differences = np.tile(0.1 + OF_CASES, (seeds, 1))
    found = statistics_of(differences)
    assert math.isnan(found["p"])
    assert found["seeds"] == seeds
    interval = bootstrap((0.1 + OF_CASES,), np.mean, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    assert (found["ci95_low"], found["ci95_high"]) == pytest.approx(tuple(interval))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 1), (1, 1)])
def test_too_little_to_say_anything(shape):
    found = statistics_of(np.full(shape, 0.1))
    assert all(math.isnan(found[name]) for name in ("ci95_low", "ci95_high", "p"))
    assert (found["seeds"], found["n"]) == (shape[0], shape[1] if shape[0] else 0)


def test_equal_runs_do_not_differ():
    found = paired_statistics(BASE, BASE)
    assert (found["difference"], found["ci95_low"], found["ci95_high"], found["p"]) == (0, 0, 0, 1)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape \(seeds, cases\), got \(4, 6\) and \(4, 5\)"):
        paired_statistics(BASE, BASE[:, :5])


# --- coverage -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "cases"), [(3, 9), (3, 20), (5, 20), (10, 5)])
@pytest.mark.parametrize(
    ("of_seeds", "of_cases"), [(0, 0), (0.05, 0), (0.3, 0), (0, 0.3), (0.05, 0.05), (0.3, 0.3), (0.05, 3)]
)
def test_chance_is_called_a_difference_in_one_of_twenty_draws_at_most(seeds, cases, of_seeds, of_cases):
    """Methods that do not differ, with these variances of seeds and cases; that of the error is 1."""
    check_how_often_chance_is_called_a_difference(seeds, cases, of_seeds, of_cases)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "cases"), [(3, 8), (5, 5), (5, 11)])
@pytest.mark.parametrize(("of_cases", "of_networks"), [(0, 0.3), (0, 3), (3, 3)])
def test_also_where_each_seed_is_a_cross_validation(seeds, cases, of_cases, of_networks):
    """A seed's cases are scored by three networks, each of which has a variance of its own."""
    check_how_often_chance_is_called_a_difference(seeds, cases, 0.05, of_cases, of_networks)


def check_how_often_chance_is_called_a_difference(seeds, cases, of_seeds, of_cases, of_networks=0.0):
    rng = np.random.default_rng(7)
    draws, called = 2000, 0
    for _ in range(draws):
        by_seed, by_case = rng.normal(0, of_seeds**0.5, (seeds, 1)), rng.normal(0, of_cases**0.5, cases)
        differences = by_seed + by_case + rng.normal(0, 1, (seeds, cases))
        if of_networks:
            folds = [rng.permutation(np.arange(cases) % 3) for _ in range(seeds)]
            differences += [rng.normal(0, of_networks**0.5, 3)[fold] for fold in folds]
        found = paired_statistics(np.zeros((seeds, cases)), differences)
        assert (found["p"] < 0.05) == (not found["ci95_low"] <= 0 <= found["ci95_high"])
        called += found["p"] < 0.05
    # Three standard errors of the simulation above 6 %.
    assert called / draws < 0.06 + 3 * math.sqrt(0.06 * 0.94 / draws)


# --- many methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.04, 0.01, math.nan, 0.03], [0.06, 0.03, math.nan, 0.06]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([math.nan], [math.nan]),
        ([], []),
    ],
)
def test_holm_by_hand(p, expected):
    np.testing.assert_allclose(holm(p), expected)


def row(difference: float, p: float, seeds: int = 3) -> dict[str, float]:
    interval = {"ci95_low": difference - 0.01, "ci95_high": difference + 0.01}
    return {"seeds": seeds, "difference": difference, **interval, "p_holm": p}


def test_words():
    rows = {
        "B": row(0.02, 0.049),
        "C": row(0.005, 0.3),
        "D": row(-0.02, 0.01),
        "E": row(0.03, 0.001),
        "F": row(0.2, math.nan, 2),
        "G": row(0.2, math.nan),
    }
    assert verdict(rows, "A").split("; ") == [
        "better than A: B (+0.020, +0.010 to +0.030), E (+0.030, +0.020 to +0.040)",
        "not distinguishable from A: C (+0.005, -0.005 to +0.015), G (+0.200, +0.190 to +0.210)",
        "worse than A: D (-0.020, -0.030 to -0.010)",
        "of too few seeds (three at least) to be called different from A: F (+0.200)",
    ]
    assert verdict({"B": row(-2, 0.01)}, "A", higher_is_better=False).startswith("better than A: B (-2.000")
    assert verdict({}, "A") == ""
