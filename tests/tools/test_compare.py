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
from pgl_ext.evaluation.verdict import holm, paired_statistics
from pgl_ext.files import write_csv
from pgl_ext.tools.cli import main
from pgl_ext.tools.compare import compare_runs, comparison_tables, paired_scores, read_comparison, read_scores, verdicts

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


# --- runs -----------------------------------------------------------------------------------------------------------


def write_seeds(folder: Path, name: str, shift: float, seeds: int = 3) -> str:
    """Runs of several seeds, which differ by chance, with commas between them; their Dice is the base's, shifted."""
    rng = np.random.default_rng(len(name))
    runs = []
    for seed in range(seeds):
        dice = {organ: values + shift + rng.normal(0, 0.004, 8) for organ, values in BASE.items()}
        runs.append(write_run(folder / f"{name}_{seed}", dice))
    return ",".join(runs)


def test_one_run_each_is_never_a_difference(runs, tmp_path):
    """However large and regular the gain, and in text and file alike."""
    text = compare_runs(runs, out=tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 2 * 3
    for organ in (*BASE, AVERAGE):
        row = rows["dice", "pgl", organ]
        assert float(row["difference"]) == pytest.approx(GAIN.mean(), abs=1e-6)
        assert float(row["ci95_low"]) < GAIN.mean() < float(row["ci95_high"])
        assert (row["seeds"], row["p"], row["p_holm"]) == ("1", "", "")
        assert float(rows["hd95_mm", "pgl", organ]["difference"]) == pytest.approx(-10 * GAIN.mean(), abs=1e-5)
    assert float(rows["dice", "pgl", "liver"]["mean_a"]) == pytest.approx(BASE["liver"].mean(), abs=1e-6)
    assert f"{GAIN.mean():+.4f}" in text
    assert "8 cases, paired; differences are to random" in text
    assert f"of too few seeds (three at least) to be called different from random: pgl ({GAIN.mean():+.3f})" in text
    assert "give at least three seeds of each" in text
    assert "95 % CI of cases  cases" in text
    assert "Holm" not in text
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000


@pytest.mark.parametrize("seeds", [(2, 2), (3, 2), (1, 3)])
def test_nor_are_fewer_than_three_pairs_of_seeds(tmp_path, seeds):
    runs = [write_seeds(tmp_path, name, shift, n) for name, shift, n in zip("ab", (0, 0.2), seeds, strict=True)]
    text = compare_runs(runs, names=["A", "B"], out=tmp_path / "out")
    row = read_rows(tmp_path / "out")["dice", "B", AVERAGE]
    assert (row["seeds"], row["p"]) == (str(seeds[0] if len(set(seeds)) == 1 else 1), "")
    assert float(row["difference"]) == pytest.approx(0.2, abs=0.01)
    assert "to be called different from A: B (+" in text


def test_three_seeds_each(tmp_path):
    """The numbers are those of paired_statistics; p is adjusted for the two runs that are compared."""
    runs = [write_seeds(tmp_path, name, shift) for name, shift in (("a", 0), ("bb", 0.05), ("ccc", 0))]
    text = compare_runs(runs, names=["A", "B", "C"], out=tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    dice = [
        np.array([[read_scores(run)[f"case_{n}", "liver"]["dice"] for n in range(8)] for run in one.split(",")])
        for one in runs
    ]
    for name, other in zip("BC", dice[1:], strict=True):
        expected = paired_statistics(dice[0], other)
        row = rows["dice", name, "liver"]
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, abs=1e-5)
        assert row["p_holm"] == ""
    p = [float(rows["dice", name, AVERAGE]["p"]) for name in "BC"]
    adjusted = [float(rows["dice", name, AVERAGE]["p_holm"]) for name in "BC"]
    assert adjusted == pytest.approx(holm(p), rel=1e-4)
    assert adjusted[0] < 0.05 < adjusted[1]
    assert "Average Dice: better than A: B (+0.05" in text
    assert "; not distinguishable from A: C (" in text
    assert "Average HD95 (mm): better than A: B (-0.5" in text
    assert "p (Holm)" in text
    assert "three seeds" not in text


def test_the_picture_shows_the_differences_of_the_table(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("pgl_ext.tools.compare.plot_estimates", lambda *args: drawn.append(args))
    compare_runs(runs, out=tmp_path / "out")
    ((estimates, colors, path),) = drawn
    assert (path.name, list(colors)) == ("compare.png", ["random", "pgl"])
    assert [one.place for one in estimates] == [*BASE, AVERAGE] * 2
    for estimate in estimates:
        dice = estimate.panel == "Dice minus random\n(higher is better)"
        assert dice or estimate.panel == "HD95 (mm) minus random\n(lower is better)"
        factor = 1 if dice else -10
        assert estimate.points == pytest.approx(factor * GAIN, abs=1e-4)
        assert estimate.value == pytest.approx(factor * GAIN.mean(), abs=1e-4)
        assert estimate.low < estimate.value < estimate.high


def test_files_of_before_seeds_counted_are_read(tmp_path):
    """Their p, over cases alone, is not taken for one over seeds."""
    head = "metric,organ,run,reference,n,mean_a,mean_b,difference,ci95_low,ci95_high,p\n"
    (tmp_path / "compare.csv").write_text(head + "dice,average,PGL,random,8,0.5,0.75,0.25,0.2,0.3,0.0078\n")
    rows = read_comparison(tmp_path)
    assert (rows[0]["seeds"], rows[0]["difference"]) == (1, 0.25)
    sentences = verdicts(rows)
    assert "of too few seeds" in sentences[0]
    assert "three seeds of each" in sentences[1]
    (table,) = comparison_tables(rows)
    assert table.rows == [["average", "0.5000", "0.7500", "+0.2500", "+0.2000 to +0.3000", "8"]]


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
            {(f"case_{n}", "tumour"): {"dice": value, "hd95_mm": 50 * (1 - value)} for n, value in enumerate(seed)}
            for seed in run
        ]
        for run in (a, b)
    ]
    keys = list(runs[0][0])
    for dice, hd95, values in zip(*(paired_scores(*runs, m, keys) for m in ("dice", "hd95_mm")), expected, strict=True):
        for organ in (0, 1):  # the tumour, and the average
            np.testing.assert_allclose(dice[:, organ].mean(0), values)
            np.testing.assert_allclose(hd95[:, organ].mean(0), 50 * (1 - np.array(values)), atol=1e-9)


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


def test_seeds_that_cannot_be_paired_are_averaged(tmp_path):
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
    command = ["pgl", "compare", *runs, "--names", "random start,PGL", "--out", "out"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "differences are to random start" in capsys.readouterr().out
    assert (tmp_path / "out" / "compare.csv").is_file()
    fewer = write_run(tmp_path / "fewer", BASE, cases=range(6))
    for common, expected in ((["--common"], "0"), ([], "error: the runs have other cases")):
        monkeypatch.setattr(sys, "argv", ["pgl", "compare", *map(str, (runs[0], fewer)), *common])
        with pytest.raises(SystemExit, match=expected):
            main()


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
