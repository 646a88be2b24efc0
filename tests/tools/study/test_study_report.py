from __future__ import annotations

import csv
import html.parser
import json
import math

import numpy as np
import pytest
from made_studies import finish, make_study

from pgl_ext.evaluation.metrics import METRICS
from pgl_ext.evaluation.summary import AVERAGE
from pgl_ext.evaluation.verdict import paired_statistics
from pgl_ext.tools.study.figures import draw_figures, plot_learning_curves
from pgl_ext.tools.study.report import cost_table, paper_tables, verdicts, write_study_report, write_tables
from pgl_ext.tools.study.results import Results
from pgl_ext.tools.study.run import choose_rates, planned_runs
from pgl_ext.tools.study.runs import Rates

RNG = np.random.default_rng(0)
CASES = 8
# By method, seed and organ. B gains, C does not.
BASE = {"liver": RNG.uniform(0.6, 0.8, CASES), "spleen": RNG.uniform(0.5, 0.7, CASES)}
SHIFTS = {"A": 0.0, "B": 0.05, "C": 0.0}
DICE = {
    (method, seed): {organ: (v + shift + RNG.normal(0, 0.02, CASES)).round(4) for organ, v in BASE.items()}
    for method, shift in SHIFTS.items()
    for seed in (0, 1, 2)
}


@pytest.fixture
def study(tmp_path):
    methods = {"A": {"encoder": None}, "B": {}, "C": {}}
    entries = {"methods": methods, "reference": "A", "ablations": ["B", "C"], "labelled_cases": [3]}
    return make_study(tmp_path, **entries, seeds=[0, 1, 2])


def finish_all(study, without=()):
    for run in study.runs({}):
        if run.name not in without:
            finish(run, None if run.is_pretraining else DICE[run.method, run.seed])


def results_of(study) -> Results:
    return Results(study, study.runs({}))


def rows_of(study) -> dict[tuple[str, str, str], dict]:
    rows = results_of(study).rows
    return {(row["metric"], row["method"], row["organ"]): row for row in rows}


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- statistics -----------------------------------------------------------------------------------------------------


def test_mean_and_spread_over_seeds(study):
    finish_all(study)
    rows = rows_of(study)
    for method in SHIFTS:
        for organ in BASE:
            means = [DICE[method, seed][organ].mean() for seed in (0, 1, 2)]
            assert rows["dice", method, organ]["mean"] == pytest.approx(np.mean(means))
            assert rows["dice", method, organ]["sd"] == pytest.approx(np.std(means, ddof=1))
        means = [np.mean([DICE[method, seed][organ].mean() for organ in BASE]) for seed in (0, 1, 2)]
        assert rows["dice", method, AVERAGE]["mean"] == pytest.approx(np.mean(means))
        assert rows["dice", method, AVERAGE]["sd"] == pytest.approx(np.std(means, ddof=1))


def averages_of(method: str) -> np.ndarray:
    """Mean Dice of the organs, (seeds, cases)."""
    return np.array([np.mean(list(DICE[method, seed].values()), axis=0) for seed in (0, 1, 2)])


def test_differences_are_paired_by_seed_and_case(study):
    finish_all(study)
    rows, p = rows_of(study), {}
    for method in ("B", "C"):
        row, expected = rows["dice", method, AVERAGE], paired_statistics(averages_of("A"), averages_of(method))
        for name in ("difference", "ci95_low", "ci95_high", "p"):
            assert row[name] == pytest.approx(expected[name])
        p[method] = expected["p"]
        assert (row["paired_seeds"], row["paired_cases"]) == (3, CASES)
    smaller, larger = sorted(p, key=p.get)
    assert rows["dice", smaller, AVERAGE]["p_holm"] == pytest.approx(min(1, 2 * p[smaller]))
    assert rows["dice", larger, AVERAGE]["p_holm"] == pytest.approx(max(min(1, 2 * p[smaller]), p[larger]))
    # Organs are not adjusted, and the reference is not compared with itself.
    assert math.isnan(rows["dice", "B", "liver"]["p_holm"])
    assert math.isnan(rows["dice", "A", AVERAGE]["difference"])


def test_other_metrics(study):
    finish_all(study)
    rows = rows_of(study)
    of_dice_by_metric = {"iou": lambda d: d / (2 - d), "hd95_mm": lambda d: 10 - d}
    of_dice_by_metric |= {"hd_mm": lambda d: 20 - d, "nsd": lambda d: d / 2}
    for metric, of_dice in of_dice_by_metric.items():
        means = [of_dice(DICE["B", seed]["liver"]).mean() for seed in (0, 1, 2)]
        assert rows[metric, "B", "liver"]["mean"] == pytest.approx(np.mean(means), abs=1e-5)


def test_only_seeds_that_both_have_are_paired(study):
    finish_all(study, without=("fine_tuning/B/3_cases/seed_1",))
    row = rows_of(study)["dice", "B", "liver"]
    expected = np.mean([DICE["B", seed]["liver"] - DICE["A", seed]["liver"] for seed in (0, 2)])
    assert row["difference"] == pytest.approx(expected)
    assert (row["seeds"], row["paired_seeds"]) == (2, 2)


@pytest.mark.parametrize(("spurious_seeds", "of_the_case"), [((), None), ((1,), 1 - 2 / 3), ((0, 1, 2), 1)])
def test_a_case_without_an_organ(study, spurious_seeds, of_the_case):
    """The reference predicts it in some seeds, method B in none."""
    finish_all(study)
    absent = 3
    for method, seed in DICE:
        dice = {organ: values.copy() for organ, values in DICE[method, seed].items()}
        dice["spleen"][absent] = 0 if method == "A" and seed in spurious_seeds else math.nan
        finish(study.fine_tuning(method, 3, seed), dice)
    rows = rows_of(study)
    others = np.delete(np.arange(CASES), absent)
    means = [DICE["B", seed]["spleen"][others].mean() for seed in (0, 1, 2)]
    assert rows["dice", "B", "spleen"]["mean"] == pytest.approx(np.mean(means))
    differences = np.mean([DICE["B", seed]["spleen"] - DICE["A", seed]["spleen"] for seed in (0, 1, 2)], axis=0)[others]
    if of_the_case is not None:
        differences = np.append(differences, of_the_case)
    assert rows["dice", "B", "spleen"]["difference"] == pytest.approx(differences.mean())
    assert rows["dice", "B", "spleen"]["paired_cases"] == len(differences)
    # The average of that case is its liver's.
    cases = [np.mean(list(DICE["B", seed].values()), axis=0) for seed in (0, 1, 2)]
    for seed in (0, 1, 2):
        cases[seed][absent] = DICE["B", seed]["liver"][absent]
    assert rows["dice", "B", AVERAGE]["mean"] == pytest.approx(np.mean(cases))


def test_evaluations_on_other_cases_are_not_compared(study):
    finish_all(study)
    finish(study.fine_tuning("B", 3, 1), {organ: values[:5] for organ, values in DICE["B", 1].items()})
    with pytest.raises(ValueError, match=r"B, 3 labelled cases, seed 1 lacks case_5 \(liver\)"):
        rows_of(study)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_files(study):
    finish_all(study)
    results = results_of(study)
    write_tables(results)
    scores = read_csv(study.folder / "study.csv")
    assert len(scores) == 3 * 3 * 2 * CASES
    found = {(row["method"], row["seed"], row["case"], row["organ"]): float(row["dice"]) for row in scores}
    assert found["C", "2", "case_6", "spleen"] == DICE["C", 2]["spleen"][6]
    assert set(scores[0]) == {"labelled_cases", "method", "seed", "case", "organ", *METRICS}

    runs = {row["run"]: row for row in read_csv(study.folder / "runs.csv")}
    assert len(runs) == 3 * 3 + 2 * 3
    average = np.mean([DICE["B", 1][organ].mean() for organ in BASE])
    assert float(runs["fine_tuning/B/3_cases/seed_1"]["mean_dice"]) == pytest.approx(average, abs=1e-6)
    assert runs["pretraining/B/seed_1"]["pairs"] == "160"
    assert runs["pretraining/B/seed_1"]["cost"] == "0.5"

    table = read_csv(study.folder / "table.csv")
    assert len(table) == len(METRICS) * 3 * 3
    assert {row["pretraining_cost"] for row in table if row["method"] == "B"} == {"0.5"}

    text = (study.folder / "table.md").read_text()
    means = [np.mean([DICE["B", seed][organ].mean() for organ in BASE]) for seed in (0, 1, 2)]
    assert f"| B | {np.mean(means):.3f} ± {np.std(means, ddof=1):.3f} | +0.0" in text
    assert "### HD95 (mm), 3 labelled cases" in text
    assert "### HD (mm), 3 labelled cases" in text
    assert "not adjusted" in text
    assert "missing" not in text


def test_cost_of_each_method(study):
    """The means of what the runs noted; a method without pre-training has no cost of it."""
    for run in study.runs({}):
        noted = {"cost": 1.0 + run.seed, "unit": "GPU-hours"}
        if run.is_pretraining:
            finish(run, **noted)
        else:
            timing = {"seconds_per_case": 0.03 * (run.seed + 1), "device": "NVIDIA H100"}
            finish(run, DICE[run.method, run.seed], **noted, **(timing if run.method != "C" else {}))
    table = cost_table(results_of(study))
    assert table.head == ["method", "pre-training, GPU-hours", "fine-tuning, GPU-hours", "ms for a test scan", "device"]
    assert table.rows == [
        ["A", "n/a", "2.00", "60", "NVIDIA H100"],
        ["B", "2.00", "2.00", "60", "NVIDIA H100"],
        ["C", "2.00", "2.00", "n/a", ""],
    ]


def test_words_say_what_cannot_be_told_apart(study):
    finish_all(study)
    (verdict,) = verdicts(results_of(study))
    assert verdict.startswith("3 labelled cases, average Dice: better than A: B (+0.0")
    assert "; not distinguishable from A: C (" in verdict


def test_pictures_show_the_gains_of_the_table(study, monkeypatch):
    finish_all(study)
    drawn = []
    monkeypatch.setattr("pgl_ext.tools.study.figures.plot_estimates", lambda *args, **_: drawn.append(args))
    results = results_of(study)
    draw_figures(results)
    averages = {m: np.mean([[DICE[m, seed][o] for o in BASE] for seed in (0, 1, 2)]) for m in SHIFTS}
    assert [args[2].name for args in drawn] == ["gains.png", "ablations.png", "organs.png"]
    gains, ablations, organs = (args[0] for args in drawn)
    assert gains == ablations
    assert [(one.method, one.place) for one in gains] == [("B", "3 labelled cases"), ("C", "3 labelled cases")]
    for gain in gains:
        assert gain.value == pytest.approx(averages[gain.method] - averages["A"], abs=1e-6)
        assert gain.low < gain.value < gain.high
    for one in organs:
        assert one.panel == "Dice, 3 labelled cases"
        (row,) = results.select(metric="dice", method=one.method, organ=one.place)
        assert (one.value, one.high - one.low) == pytest.approx((row["mean"], 2 * row["sd"]))


def test_dice_of_each_method_by_share_of_labels(tmp_path, monkeypatch):
    """Figure 5 of the paper: absolute values, at each share that there is."""
    study = make_study(tmp_path, methods={"A": {"encoder": None}, "B": {}}, reference="A", labelled_cases=[3, 5])
    for run in study.runs({}):
        shift = 0 if run.is_pretraining else run.labels / 100 + 0.01 * run.seed
        finish(run, None if run.is_pretraining else {organ: v + shift for organ, v in BASE.items()})
    drawn = {}
    monkeypatch.setattr(
        "pgl_ext.tools.study.figures.plot_estimates",
        lambda *args, **style: drawn.update({args[2].name: (args[0], style)}),
    )
    draw_figures(results_of(study))
    estimates, style = drawn["labels.png"]
    assert style == {"differences": False, "lines": True}
    assert [(one.place, one.method) for one in estimates] == [(f"{n} labelled cases", m) for n in (3, 5) for m in "AB"]
    base = np.mean(list(BASE.values()))
    for one, labels in zip(estimates, (3, 3, 5, 5), strict=True):
        sd = np.std([0, 0.01], ddof=1)
        expected = base + labels / 100 + 0.005
        assert (one.value, one.low, one.high) == pytest.approx((expected, expected - sd, expected + sd))


def test_a_loss_is_called_worse(study):
    for run in study.runs({}):
        scores = {} if run.is_pretraining else DICE["A" if run.method == "B" else "B", run.seed]
        finish(run, scores or None)
    (verdict,) = verdicts(results_of(study))
    assert verdict.startswith("3 labelled cases, average Dice: worse than A: B (-0.0")


def test_values_stand_under_their_heads(study):
    """By formulas on the scores themselves; Holm's p is twice the smaller of two."""
    finish_all(study)
    results = results_of(study)
    block = next(b for b in paper_tables(results) if b.title.startswith("Dice"))
    found = {row["method"]: row for row in (dict(zip(block.head, line, strict=True)) for line in block.rows)}
    by_seed = {method: np.array([[DICE[method, seed][o] for o in BASE] for seed in (0, 1, 2)]) for method in SHIFTS}
    for method, scores in by_seed.items():
        means = {"average": scores.mean((1, 2)), **dict(zip(BASE, scores.mean(2).T, strict=True))}
        for name, values in means.items():
            assert found[method][name] == f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
    averages = {method: scores.mean((0, 1)) for method, scores in by_seed.items()}
    p = {method: paired_statistics(averages_of("A"), averages_of(method))["p"] for method in "BC"}
    assert p["B"] < p["C"]
    for method, adjusted in (("B", 2 * p["B"]), ("C", max(p["C"], 2 * p["B"]))):
        assert found[method]["minus A"] == f"{(averages[method] - averages['A']).mean():+.3f}"
        assert (found[method]["p"], found[method]["p (Holm)"]) == (f"{p[method]:.3g}", f"{adjusted:.3g}")
        low, high = map(float, found[method]["95 % interval"].split(" to "))
        assert low < (averages[method] - averages["A"]).mean() < high
        assert found[method]["CPU-core-hours"] == "0.5"


def test_a_gain_that_one_seed_does_not_have_is_none(study):
    """Though every case gains on average."""
    for run in study.runs({}):
        gain = {0: 0.1, 1: 0.1, 2: -0.03}[run.seed] if run.method == "B" else 0.0
        finish(run, None if run.is_pretraining else {organ: values + gain for organ, values in BASE.items()})
    results = results_of(study)
    (row,) = results.select(metric="dice", method="B", organ=AVERAGE)
    assert row["difference"] == pytest.approx(0.17 / 3)
    assert row["ci95_low"] < 0 < row["ci95_high"]
    (text,) = verdicts(results)
    assert "not distinguishable from A: B (+0.057" in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_say_nothing(tmp_path, seeds):
    """In sentences, tables and page, however large the gain."""
    study = make_study(
        tmp_path, methods={"A": {"encoder": None}, "B": {}}, labelled_cases=[3], seeds=list(range(seeds)), reference="A"
    )
    for run in study.runs({}):
        gain = 0.2 if run.method == "B" else 0
        finish(run, None if run.is_pretraining else {organ: values + gain for organ, values in BASE.items()})
    results = results_of(study)
    (row,) = results.select(metric="dice", method="B", organ=AVERAGE)
    assert math.isnan(row["p"])
    assert math.isnan(row["p_holm"])
    (text,) = verdicts(results)
    assert text.endswith("of too few seeds (three at least) to be called different from A: B (+0.200).")
    write_tables(results)
    for page in ((study.folder / "table.md").read_text(), write_study_report(results, [], {}).read_text()):
        assert text in page
        assert "better than A" not in page


def test_as_many_seeds_as_both_have(study):
    finish_all(study, without=("fine_tuning/B/3_cases/seed_1",))
    (text,) = verdicts(results_of(study))
    assert "of too few seeds (three at least) to be called different from A: B (+0.0" in text
    assert "not distinguishable from A: C (" in text


def test_one_case_says_nothing(study):
    for run in study.runs({}):
        scores = {} if run.is_pretraining else DICE[run.method, run.seed]
        finish(run, {organ: values[:1] for organ, values in scores.items()} or None)
    (text,) = verdicts(results_of(study))
    assert "not distinguishable from A: B (" in text
    assert "better" not in text


def test_what_is_missing_is_said(study):
    missing = "fine_tuning/C/3_cases/seed_2"
    finish_all(study, without=(missing,))
    results = results_of(study)
    write_tables(results)
    text = (study.folder / "table.md").read_text()
    assert "Not finished, and missing here: C, 3 labelled cases, seed 2." in text


def test_no_run_at_all(study):
    results = results_of(study)
    assert results.rows == []
    assert paper_tables(results) == []
    write_tables(results)
    draw_figures(results)
    assert "nothing to compare" in write_study_report(results, [], {}).read_text()


# --- learning rates -------------------------------------------------------------------------------------------------


def test_learning_rates_are_chosen_on_validation_cases(tmp_path):
    methods = {"A": {"encoder": None}, "B": {}, "C": {}, "D": {}}
    rates = {"pretraining#learning_rates": [0.3, 1.0, 3.0]}
    study = make_study(tmp_path, rates, methods=methods, reference="A")
    validation = {"B": (0.5, 0.7, 0.6), "C": (0.7, 0.5, 0.7), "D": (0.7, 0.5)}
    for method, scores in validation.items():
        for run, score in zip(study.selection()[method].values(), scores, strict=False):
            # What the test cases say must not matter.
            finish(run, None, val_mean_dice=score, mean_dice=1 - score)
    rates, rows = choose_rates(study)
    # Of equal ones the smaller; D is not finished.
    assert rates == {"B": Rates(1.0), "C": Rates(0.3)}
    assert [row["lr"] for row in rows if row["chosen"]] == [1.0, 0.3]
    assert len(rows) == 8
    assert "fine_tuning/B_lr_1/5_cases/seed_1" in [run.name for run in study.runs(rates)]
    assert not any("/D" in run.name for run in study.runs(rates))


def test_without_validation_there_is_no_choice(tmp_path):
    study = make_study(tmp_path, {"pretraining#learning_rates": [0.3]})
    finish(study.selection()["PGL"][Rates(0.3)], None, val_mean_dice=None)
    with pytest.raises(ValueError, match="learning rate of 'PGL' cannot be chosen"):
        choose_rates(study)


# --- page and pictures ----------------------------------------------------------------------------------------------


class _Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page(study):
    finish_all(study)
    results = results_of(study)
    draw_figures(results)
    chosen = [{"method": "B", "lr": 0.3, "fine_tuning_lr": None, "val_mean_dice": 0.712, "chosen": True}]
    failures = {"fine_tuning/C/3_cases/seed_0": "error: <no space>"}
    page = write_study_report(results, chosen, failures).read_text()
    reader = _Links()
    reader.feed(page)
    assert reader.open == []
    assert len(reader.links) == 4  # icon and three pictures
    assert all(link.startswith("data:") for link in reader.links)
    for text in ("not distinguishable from A: C", "0.712", "failed: error: &lt;no space&gt;", "CPU-core-hours"):
        assert text in page


def test_cases_are_those_of_the_most_labels_and_the_first_seed(tmp_path, monkeypatch):
    """The reference is first; so the cases are its best, median and worst."""
    methods = {"A": {"encoder": None}, "B": {}, "C": {}}
    study = make_study(
        tmp_path, methods=methods, reference="B", labelled_cases=[3, 5], seeds=[1, 2], pictured_cases=["case_11"]
    )
    for run in study.runs({}):
        if run.name != "fine_tuning/C/5_cases/seed_1":
            finish(run, None if run.is_pretraining else BASE)
    shown = []
    monkeypatch.setattr("pgl_ext.tools.study.report.case_pictures", lambda *given: shown.append(given) or [])
    assert "The same cases" not in write_study_report(results_of(study), [], {}).read_text()
    folders = {name: study.folder / "fine_tuning" / name / "5_cases/seed_1/evaluation" for name in "BA"}
    ((shown_folders, names),) = shown
    assert list(shown_folders.items()) == list(folders.items())
    assert names == study.pictured_cases == ["case_11"]
    with pytest.raises(ValueError, match=r"pictured_cases is \['case_1'\], but test cases are case_10, .*: name some"):
        make_study(tmp_path, methods=methods, reference="B", pictured_cases=["case_1"])


def test_learning_curves_are_those_of_the_fine_tunings(study, monkeypatch):
    finish_all(study)
    curves = {0: {40: 0.3, 80: 0.6}, 1: {40: 0.5, 80: 0.7}, 2: {40: 0.4}}  # the last one stopped early
    for run in study.runs({}):
        if not run.is_pretraining and run.method != "C":
            rows = [f"{step},{dice}" for step, dice in curves[run.seed].items()]
            (run.folder / "metrics.csv").write_text("\n".join(["step,val_mean_dice", "10,", *rows]) + "\n")
    drawn = []
    monkeypatch.setattr("pgl_ext.tools.study.figures.plot_learning_curves", lambda *args: drawn.append(args))
    results = results_of(study)
    draw_figures(results)
    ((panels, colors, reference, axis, path),) = drawn
    (axes,) = plot_learning_curves(panels, colors, reference, axis, path).axes
    assert axes.get_ylabel() == "Dice of validation cases"
    assert axes.get_title(loc="left") == "3 labelled cases"
    means = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert {name: line.get_linestyle() for name, line in means.items()} == {"A": "--", "B": "-"}
    assert means["B"].get_xydata().tolist() == [[40, pytest.approx(0.4)]]
    assert [len(line.get_xdata()) for line in axes.lines if line.get_label().startswith("_")] == [2, 2, 1, 2, 2, 1]
    assert path == study.folder / "learning_curves.png"
    assert path.stat().st_size > 5000


# --- dry run --------------------------------------------------------------------------------------------------------


def test_dry_run_lists_and_estimates(study, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pgl_ext.tools.study.run.checked_fingerprints", lambda _: {}
    )  # made-up runs have made-up fingerprints
    finish(study.fine_tuning("A", 3, 0), seconds=120)
    text = planned_runs(tmp_path / "study.yaml", study.folder, jobs=1)
    assert "  02:00  fine_tuning/A/3_cases/seed_0\n" in text
    assert "  to do  pretraining/B/seed_0\n" in text
    assert "1 of 15 runs finished; time left with 1 at a time: not known" in text
    finish(study.pretraining("B", 0), seconds=600)
    text = planned_runs(tmp_path / "study.yaml", study.folder, jobs=2)
    # 8 fine-tunings of 2 minutes and 5 pre-trainings of 10, two at a time.
    assert "2 of 15 runs finished; time left with 2 at a time: 33:00" in text
    assert not (study.folder / "study.csv").exists()
    assert json.loads((study.folder / "pretraining/B/seed_0/run.json").read_text())["seconds"] == 600
