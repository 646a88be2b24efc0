from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from made_studies import finish, make_study
from scipy.stats import t as student

from pgl_ext.tools.study.efficiency import curve_rows, efficiency_tables
from pgl_ext.tools.study.figures import draw_figures
from pgl_ext.tools.study.report import write_study_report, write_tables
from pgl_ext.tools.study.results import Results

RNG = np.random.default_rng(0)
CASES, SEEDS, END = 8, (0, 1, 2), 60
# Mean Dice by method and number of labels, after 20 and 40 steps and in the end. B is as good as A's end after 40 steps
# with few labels and is not with many; C never is.
LEVELS = {
    ("A", 3): (0.30, 0.40, 0.50),
    ("B", 3): (0.40, 0.52, 0.56),
    ("C", 3): (0.20, 0.30, 0.40),
    ("A", 6): (0.40, 0.50, 0.60),
    ("B", 6): (0.45, 0.55, 0.62),
    ("C", 6): (0.30, 0.40, 0.50),
}
STEPS = (20, 40, END)
OF_CASES = RNG.normal(0, 0.05, (2, CASES))
# (organs, cases) by method, labels, step and seed.
DICE = {
    (*key, step, seed): (level + OF_CASES + RNG.normal(0, 0.01) + RNG.normal(0, 0.01, (2, CASES))).round(4)
    for key, levels in LEVELS.items()
    for step, level in zip(STEPS, levels, strict=True)
    for seed in SEEDS
}


def by_organ(values: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(("liver", "spleen"), values, strict=True))


def make(folder, labels=(3, 6), kept_steps=(20, 40)):
    methods = {"A": {"encoder": None}, "B": {}, "C": {}}
    overrides = {"fine_tuning#settings#kept_steps": list(kept_steps)}
    return make_study(folder, overrides, methods=methods, reference="A", labelled_cases=list(labels), seeds=list(SEEDS))


def finish_all(study, without=()):
    for run in study.runs({}):
        if run.is_pretraining:
            finish(run)
        elif run.name not in without:
            dice = {step: by_organ(DICE[run.method, run.labels, step, run.seed]) for step in STEPS}
            kept = {step: dice[step] for step in study.kept_steps if step in dice}
            finish(run, dice[END], kept, steps=END)


def tables_of(study) -> dict[str, list[dict[str, str]]]:
    tables = efficiency_tables(Results(study, study.runs({})))
    return {table.title: [dict(zip(table.head, row, strict=True)) for row in table.rows] for table in tables}


def averages(method, labels, step) -> np.ndarray:
    """(seeds, cases)"""
    return np.array([DICE[method, labels, step, seed].mean(0) for seed in SEEDS])


def interval_of(second: np.ndarray, first: np.ndarray) -> tuple[float, float, float]:
    """Difference and its interval, by the formulas that studies/README.md states, in plain loops."""
    d = second - first
    s, c, m = *d.shape, d.mean()
    of_seeds = c * sum((d[i].mean() - m) ** 2 for i in range(s)) / (s - 1)
    of_cases = s * sum((d[:, j].mean() - m) ** 2 for j in range(c)) / (c - 1)
    rest = sum((d[i, j] - d[i].mean() - d[:, j].mean() + m) ** 2 for i in range(s) for j in range(c))
    rest /= (s - 1) * (c - 1)
    v = max(of_seeds + of_cases - rest, of_seeds, of_cases) / (s * c)
    df = (s * c * v) ** 2 / (of_seeds**2 / (s - 1) + of_cases**2 / (c - 1) + rest**2 / ((s - 1) * (c - 1)))
    df = min(max(df, min(s - 1, c - 1)), 2 * (s - 1))
    reach = student.ppf(0.975, df) * math.sqrt(v)
    return m, m - reach, m + reach


def texts(second: np.ndarray, first: np.ndarray) -> list[str]:
    difference, low, high = interval_of(second, first)
    return [f"{difference:+.3f}", f"{low:+.3f} to {high:+.3f}"]


def mean_and_sd(values: np.ndarray) -> str:
    means = values.mean(1)
    return f"{means.mean():.3f} ± {means.std(ddof=1):.3f}"


def test_dice_after_steps(tmp_path):
    study = make(tmp_path)
    finish_all(study)
    tables = tables_of(study)
    for labels in (3, 6):
        rows = tables[f"Dice after n steps, {labels} labelled cases"]
        assert [(row["steps"], row["method"]) for row in rows] == [(str(s), m) for s in STEPS for m in "ABC"]
        for row in rows:
            step, method = int(row["steps"]), row["method"]
            values, reference = averages(method, labels, step), averages("A", labels, step)
            assert row["Dice"] == mean_and_sd(values)
            expected = ["", ""] if method == "A" else texts(values, reference)
            assert [row["minus A"], row["95 % interval"]] == expected


def test_steps_to_reach_the_reference(tmp_path):
    study = make(tmp_path)
    finish_all(study)
    rows = tables_of(study)["Steps to reach A's final Dice"]
    assert rows == [
        {"method": "A", "3 labelled cases": "60", "6 labelled cases": "60"},
        {"method": "B", "3 labelled cases": "40", "6 labelled cases": "60"},
        {"method": "C", "3 labelled cases": "-", "6 labelled cases": "-"},
    ]


def test_what_is_not_finished_is_not_never(tmp_path):
    study = make(tmp_path)
    finish_all(study, without=[f"fine_tuning/C/3_cases/seed_{seed}" for seed in SEEDS])
    rows = tables_of(study)["Steps to reach A's final Dice"]
    assert [row["3 labelled cases"] for row in rows] == ["60", "40", ""]
    assert [row["6 labelled cases"] for row in rows] == ["60", "60", "-"]


def test_labels_to_reach_the_reference(tmp_path):
    study = make(tmp_path)
    finish_all(study)
    title = "Labels to reach: 3 labelled cases beside A, 6 labelled cases"
    rows = tables_of(study)[title]
    reference = averages("A", 6, END)
    for row, method in zip(rows, "ABC", strict=True):
        values = averages(method, 3, END)
        assert row == {
            "method": method,
            "Dice, 3 labelled cases": mean_and_sd(values),
            "Dice, A, 6 labelled cases": mean_and_sd(reference),
            **dict(zip(("difference", "95 % interval"), texts(values, reference), strict=True)),
        }


@pytest.mark.parametrize(
    ("labels", "pairs"),
    [((3, 5), []), ((2, 3, 5, 6), ["2 labelled cases beside A, 5 labelled cases", "3 labelled cases beside A, 6"])],
)
def test_labels_that_are_at_least_twice_as_many(tmp_path, labels, pairs):
    study = make(tmp_path, labels, kept_steps=())
    for run in study.runs({}):
        finish(run, None if run.is_pretraining else by_organ(DICE["A", 3, END, run.seed]))
    titles = list(tables_of(study))
    assert len(titles) == len(pairs)
    for title, pair in zip(titles, pairs, strict=True):
        assert title.startswith(f"Labels to reach: {pair}")


def test_unfinished_studies_and_runs_that_stopped_early(tmp_path):
    """B's seed 1 is not finished, its seed 2 stopped before step 40."""
    study = make(tmp_path)
    finish_all(study, without=("fine_tuning/B/3_cases/seed_1", "fine_tuning/B/3_cases/seed_2"))
    dice = {step: by_organ(DICE["B", 3, step, 2]) for step in STEPS}
    finish(study.fine_tuning("B", 3, 2), dice[END], {20: dice[20]}, steps=30)
    rows = tables_of(study)["Dice after n steps, 3 labelled cases"]
    found = {row["steps"]: row["minus A"] for row in rows if row["method"] == "B"}
    for step, seeds in ((20, [0, 2]), (40, [0]), (END, [0, 2])):
        difference = (averages("B", 3, step) - averages("A", 3, step))[seeds].mean()
        assert found[str(step)] == f"{difference:+.3f}"
    rows = [row for row in curve_rows(Results(study, study.runs({}))) if (row["method"], row["labels"]) == ("B", 3)]
    assert [(row["seed"], row["step"]) for row in rows] == [(0, 20), (0, 40), (0, END), (2, 20), (2, 30)]


def test_files_and_pictures(tmp_path, monkeypatch):
    study = make(tmp_path)
    finish_all(study)
    results = Results(study, study.runs({}))
    write_tables(results)
    with open(study.folder / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["labelled_cases", "method", "seed", "step", "dice"]
    found = {(r["method"], int(r["labelled_cases"]), int(r["step"]), int(r["seed"])): float(r["dice"]) for r in rows}
    assert found == {key: pytest.approx(values.mean(), abs=1e-6) for key, values in DICE.items()}
    drawn = []
    monkeypatch.setattr("pgl_ext.tools.study.figures.save_figure", lambda figure, path: drawn.append((figure, path)))
    draw_figures(results)
    ((figure, path),) = drawn
    assert path == study.folder / "curves.png"
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["3 labelled cases", "6 labelled cases"]
    assert figure.axes[0].get_ylabel() == "Dice of test cases"
    for axes, labels in zip(figure.axes, (3, 6), strict=True):
        lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert {name: line.get_linestyle() for name, line in lines.items()} == {"A": "--", "B": "-", "C": "-"}
        for method, line in lines.items():
            means = [averages(method, labels, step).mean() for step in STEPS]
            assert line.get_xydata() == pytest.approx(np.column_stack([STEPS, means]))
        assert sum(line.get_label().startswith("_") for line in axes.lines) == 9
    text = (study.folder / "table.md").read_text()
    page = write_study_report(results, [], {}).read_text()
    for title in (
        "Dice after n steps, 6 labelled cases",
        "Steps to reach A's final Dice",
        "Labels to reach: 3 labelled",
    ):
        assert f"### {title}" in text
        assert title.replace("'", "&#39;") in page
    assert "not adjusted for the number of methods, steps" in text


def test_without_kept_steps_there_is_no_curve(tmp_path):
    study = make(tmp_path, labels=(3,), kept_steps=())
    finish_all(study)
    results = Results(study, study.runs({}))
    write_tables(results)
    assert not (study.folder / "curves.csv").exists()
    assert efficiency_tables(results) == []
    assert "Steps and labels" not in write_study_report(results, [], {}).read_text()
