from __future__ import annotations

import csv
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from pgl_ext.evaluation.summary import AVERAGE
from pgl_ext.files import write_csv
from pgl_ext.tools.cli import main
from pgl_ext.tools.compare import compare_runs, paired_scores, paired_statistics, plot_differences

RNG = np.random.default_rng(0)
BASE = {"liver": RNG.uniform(0.6, 0.9, 8), "spleen": RNG.uniform(0.5, 0.8, 8)}
GAIN = np.array([0.05, 0.02, -0.01, 0.04, 0.06, 0.03, 0.07, 0.08])


def write_run(folder: Path, dice: Mapping[str, Sequence[float]], cases: Sequence[int] = range(8)) -> str:
    """A run whose HD95 is 10 (1 - Dice) mm; NaN becomes an empty cell, as evaluations write it."""
    rows = [
        {"case": f"case_{number}", "organ": organ, "dice": values[number], "hd95_mm": 10 * (1 - values[number])}
        for number, (organ, values) in itertools.product(cases, dice.items())
    ]
    write_csv(folder / "cases.csv", rows)
    return str(folder)


def read_rows(folder: Path) -> dict[tuple[str, str, str], dict]:
    with open(folder / "compare.csv", newline="") as file:
        return {(row["metric"], row["run"], row["organ"]): row for row in csv.DictReader(file)}


@pytest.fixture
def runs(tmp_path):
    better = {organ: values + GAIN for organ, values in BASE.items()}
    return write_run(tmp_path / "random", BASE), write_run(tmp_path / "pgl", better)


# --- statistics -----------------------------------------------------------------------------------------------------


def brute_force_p(differences: np.ndarray) -> float:
    """Two-sided p of the Wilcoxon signed-rank test by trying all signs."""
    ranks = np.abs(differences).argsort().argsort() + 1
    observed = abs((ranks * np.sign(differences)).sum())
    sums = [abs((ranks * signs).sum()) for signs in itertools.product((1, -1), repeat=len(ranks))]
    return float(np.mean(np.array(sums) >= observed))


def test_p_is_that_of_all_signs():
    found = paired_statistics(BASE["liver"], BASE["liver"] + GAIN)
    assert found["p"] == pytest.approx(brute_force_p(GAIN))
    assert found["n"] == 8


def test_statistics_by_hand():
    found = paired_statistics([1, 2, math.nan, 4], [2, 2, 5, 6])
    assert found["n"] == 3
    assert found["mean_a"] == pytest.approx(7 / 3)
    assert found["mean_b"] == pytest.approx(10 / 3)
    assert found["difference"] == pytest.approx(1)
    assert 0 <= found["ci95_low"] < 1 < found["ci95_high"] <= 2
    assert math.isnan(found["p"])  # only two pairs differ


@pytest.mark.parametrize(
    ("first", "second"),
    [([0.5] * 9, [0.5] * 9), ([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]), ([1], [2]), ([math.nan], [1]), ([], [])],
)
def test_no_p_where_there_is_nothing_to_test(first, second):
    assert math.isnan(paired_statistics(first, second)["p"])


def test_pairing_finds_what_means_hide():
    base = np.random.default_rng(1).uniform(0, 1, 12)
    found = paired_statistics(base, base + np.linspace(0.005, 0.015, 12))
    assert found["ci95_low"] > 0
    assert found["p"] < 0.001


# --- runs -----------------------------------------------------------------------------------------------------------


def test_table_of_two_runs(runs, tmp_path):
    text = compare_runs(runs, out=tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 2 * 3
    for organ in (*BASE, AVERAGE):
        row = rows["dice", "pgl", organ]
        assert float(row["difference"]) == pytest.approx(GAIN.mean(), abs=1e-6)
        assert float(row["p"]) == pytest.approx(brute_force_p(GAIN), abs=1e-6)
        assert float(row["ci95_low"]) < GAIN.mean() < float(row["ci95_high"])
        assert float(rows["hd95_mm", "pgl", organ]["difference"]) == pytest.approx(-10 * GAIN.mean(), abs=1e-5)
    assert float(rows["dice", "pgl", "liver"]["mean_a"]) == pytest.approx(BASE["liver"].mean(), abs=1e-6)
    assert f"{GAIN.mean():+.4f}" in text
    assert "8 cases, paired; differences are to random" in text
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000


def test_the_picture_shows_the_differences_of_the_table(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("pgl_ext.tools.compare.plot_differences", lambda *args: drawn.append(args))
    compare_runs(runs, out=tmp_path / "out")
    ((differences, intervals, path, reference),) = drawn
    assert (path.name, reference) == ("compare.png", "random")
    for organ in (*BASE, AVERAGE):
        assert differences["dice"]["pgl"][organ] == pytest.approx(GAIN, abs=1e-5)
        assert differences["hd95_mm"]["pgl"][organ] == pytest.approx(-10 * GAIN, abs=1e-5)
        mean, low, high = intervals["dice"]["pgl"][organ]
        assert mean == pytest.approx(GAIN.mean(), abs=1e-5)
        assert low < mean < high


NAN = math.nan


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # Seeds by cases: Dice of one organ, NaN where it is in neither reference nor prediction.
        ([[NAN, 0.2]], [[0.0, 0.4]], ([1, 0.2], [0, 0.4])),
        ([[0.0, 0.2]], [[NAN, 0.4]], ([0, 0.2], [1, 0.4])),
        ([[NAN, 0.2]], [[NAN, 0.4]], ([NAN, 0.2], [NAN, 0.4])),
        ([[0.0, 0.2]], [[0.0, 0.4]], ([0, 0.2], [0, 0.4])),
        # One seed of three that predicts what is not there is not three of three.
        ([[NAN, 0.3]] * 3, [[NAN, 0.6], [0.0, 0.6], [NAN, 0.3]], ([1, 0.3], [2 / 3, 0.5])),
        ([[NAN, 0.3]] * 3, [[0.0, 0.3]] * 3, ([1, 0.3], [0, 0.3])),
        ([[NAN, 0.3], [0.0, 0.3]], [[NAN, 0.3]], ([0.5, 0.3], [1, 0.3])),
    ],
)
def test_absent_beside_a_score_is_perfect(a, b, expected):
    runs = [
        [
            {
                "dice": {(f"case_{number}", "tumour"): value for number, value in enumerate(seed)},
                "hd95_mm": {(f"case_{number}", "tumour"): 50 * (1 - value) for number, value in enumerate(seed)},
            }
            for seed in run
        ]
        for run in (a, b)
    ]
    found = paired_scores(*runs, list(runs[0][0]["dice"]))
    for organ in ("tumour", AVERAGE):
        for dice, hd95, values in zip(found["dice"][organ], found["hd95_mm"][organ], expected, strict=True):
            np.testing.assert_allclose(dice, values)
            np.testing.assert_allclose(hd95, 50 * (1 - np.array(values)), atol=1e-9)


def test_an_organ_that_one_run_alone_finds_where_it_is_not_counts(tmp_path):
    a = write_run(tmp_path / "a", {"liver": [0.8, 0.6], "tumour": [NAN, 0.2]}, range(2))
    b = write_run(tmp_path / "b", {"liver": [0.9, 0.7], "tumour": [0.0, 0.4]}, range(2))
    compare_runs([a, b], out=tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert rows["dice", "b", "tumour"]["n"] == "2"
    assert rows["dice", "b", "tumour"]["p"] == ""
    assert float(rows["dice", "b", "tumour"]["difference"]) == pytest.approx((-1 + 0.2) / 2)
    # Differences of (0.1 - 1) / 2 and of (0.1 + 0.2) / 2.
    assert float(rows["dice", "b", AVERAGE]["difference"]) == pytest.approx(-0.15)


def test_average_is_of_the_organs_that_have_a_score_in_a_case(tmp_path):
    a = write_run(tmp_path / "a", {"liver": [0.8, 0.6], "tumour": [NAN, 0.2]}, range(2))
    b = write_run(tmp_path / "b", {"liver": [0.9, 0.7], "tumour": [NAN, 0.4]}, range(2))
    compare_runs([a, b], out=tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert rows["dice", "b", "tumour"]["n"] == "1"
    assert float(rows["dice", "b", AVERAGE]["difference"]) == pytest.approx((0.1 + 0.15) / 2)


def test_what_only_one_run_was_evaluated_on_is_not_absent_in_the_other(tmp_path):
    a = write_run(tmp_path / "a", {"liver": [0.8, 0.6], "tumour": [0.1, 0.2]}, range(2))
    b = write_run(tmp_path / "b", {"liver": [0.9, 0.7], "tumour": [0.3, 0.4]}, range(2))
    path = Path(b) / "cases.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    compare_runs([a, b], out=tmp_path / "out", common=True)
    row = read_rows(tmp_path / "out")["dice", "b", "tumour"]
    assert row["n"] == "1"
    assert float(row["difference"]) == pytest.approx(0.2)


def test_seeds_are_averaged_case_by_case(tmp_path):
    seeds = [write_run(tmp_path / f"seed{n}", {"liver": BASE["liver"] + shift}) for n, shift in enumerate((0.0, 0.1))]
    reference = write_run(tmp_path / "reference", {"liver": BASE["liver"]})
    texts = [
        compare_runs([reference, run], names=["none", "PGL"], out=tmp_path / name)
        for name, run in (("comma", ",".join(seeds)), ("list", seeds))
    ]
    assert texts[0] == texts[1]
    row = read_rows(tmp_path / "comma")["dice", "PGL", "liver"]
    assert float(row["difference"]) == pytest.approx(0.05)


def test_other_cases_are_listed_or_left_out(runs, tmp_path):
    fewer = write_run(tmp_path / "fewer", BASE, cases=range(6))
    with pytest.raises(ValueError, match="other cases") as caught:
        compare_runs([runs[0], fewer])
    message = str(caught.value)
    assert f"{fewer} lacks case_6 (liver), case_6 (spleen), case_7 (liver), case_7 (spleen)\n" in message
    assert f"{runs[0]} lacks" not in message
    assert "--common true" in message
    assert "6 cases, paired" in compare_runs([runs[0], fewer], common=True)


def test_bad_runs(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.cases\.csv does not exist"):
        compare_runs([runs[0], str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="at least two runs, got 1"):
        compare_runs(runs[:1])
    with pytest.raises(ValueError, match="names must be 2 different ones"):
        compare_runs(runs, names=["a", "a"])
    other = write_run(tmp_path / "other", {"brain": BASE["liver"]})
    with pytest.raises(ValueError, match="no case and organ in common"):
        compare_runs([runs[0], other], common=True)
    (tmp_path / "other" / "cases.csv").write_text("case,organ,dice\na,b,1\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['hd95_mm'\]"):
        compare_runs([runs[0], other])
    (tmp_path / "other" / "cases.csv").write_text("case,organ,dice,hd95_mm\na,b,1,1\na,b,1,1\n")
    with pytest.raises(ValueError, match="more than once"):
        compare_runs([runs[0], other])


def test_command(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["pgl_ext", "compare", *runs, "--names", "random start,PGL", "--out", "out"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    assert "differences are to random start" in capsys.readouterr().out
    assert (tmp_path / "out" / "compare.csv").is_file()
    fewer = write_run(tmp_path / "fewer", BASE, cases=range(6))
    for common, expected in (("true", None), ("false", "error: the runs have other cases")):
        monkeypatch.setattr(sys, "argv", ["pgl_ext", "compare", runs[0], fewer, "--common", common])
        if expected is None:
            main()
        else:
            with pytest.raises(SystemExit, match=expected):
                main()


def test_picture_shows_every_difference(tmp_path):
    differences = {"dice": {"PGL": {"liver": GAIN, "spleen": [math.nan, 0.1]}}}
    intervals = {"dice": {"PGL": {"liver": (0.04, 0.02, 0.06), "spleen": (0.1, math.nan, math.nan)}}}
    (axes,) = plot_differences(differences, intervals, tmp_path / "d.png", "random").axes
    drawn = [collection.get_offsets()[:, 1].tolist() for collection in axes.collections]
    assert drawn == [GAIN.tolist(), [0.1]]
    assert any(list(line.get_ydata()) == [0.02, 0.06] for line in axes.lines)
    assert "minus random" in axes.get_ylabel()
    assert (tmp_path / "d.png").stat().st_size > 5000


# --- references -----------------------------------------------------------------------------------------------------


def write_referenced(folder: Path, dice: Sequence[float], volumes: Sequence[float]) -> str:
    """A run whose larynx has these Dice and reference volumes, NaN where it is not annotated; its liver is perfect."""
    rows = [
        {"case": f"case_{number}", "organ": organ, "dice": value, "hd95_mm": 1.0, "reference_ml": volume}
        for number, (larynx, ml) in enumerate(zip(dice, volumes, strict=True))
        for organ, value, volume in (("larynx", larynx, ml), ("liver", 1.0, 1500.0))
    ]
    write_csv(folder / "cases.csv", rows)
    return str(folder)


def test_what_one_run_has_as_not_annotated_takes_no_part(tmp_path):
    partly = write_referenced(tmp_path / "a", [math.nan, 0.8, 0.8], [math.nan, 20, 20])
    spurious = write_referenced(tmp_path / "b", [0.0, 0.6, 0.6], [0, 20, 20.01])
    compare_runs([partly, spurious], out=tmp_path)
    larynx, average = (read_rows(tmp_path)["dice", "b", organ] for organ in ("larynx", AVERAGE))
    assert (larynx["n"], float(larynx["difference"])) == ("2", pytest.approx(-0.2))
    assert (average["n"], float(average["difference"])) == ("3", pytest.approx(-0.2 / 3))


def test_other_references_are_refused(tmp_path):
    """As of several patients whose scans have one name."""
    runs = [write_referenced(tmp_path / name, [0.8, 0.8], [20, ml]) for name, ml in (("a", 20), ("b", 25))]
    with pytest.raises(
        ValueError, match=r"references of other volumes for case_1 \(larynx\): they were evaluated with"
    ):
        compare_runs(runs)


def test_no_organ_that_all_have(tmp_path):
    write_csv(
        tmp_path / "a" / "cases.csv", [{"case": "1", "organ": "x", "dice": "", "hd95_mm": "", "reference_ml": ""}]
    )
    with pytest.raises(ValueError, match="no organ is annotated in all runs"):
        compare_runs([str(tmp_path / "a")] * 2, names=["a", "b"])
