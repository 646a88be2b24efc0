from __future__ import annotations

import html.parser
import json
import shutil
import subprocess

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure

from pgl_ext.evaluation.summary import summarise
from pgl_ext.files import read_csv, write_csv
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.report import case_pictures, write_report

TASK = SegmentationTask({"liver": 1, "spleen <left>": 2})
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    figure.savefig(path)


def make_cases(folder) -> dict[str, dict[str, str]]:
    """Scans and label maps of three cases, by name as an evaluation notes them."""
    folder.mkdir(exist_ok=True)
    cases = {}
    for number in range(3):
        cases[f"case_{number}"] = {key: str(folder / f"{key}_{number}.nii.gz") for key in ("image", "label")}
        label = np.zeros((12, 10, 8), dtype=np.uint8)
        label[2:6, 2:6, 2 + number], label[7:10, 5:8, 2 + number] = 1, 2
        for key, voxels in (("image", 100 * label), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), cases[f"case_{number}"][key])
    return cases


def make_run(folder, dice: float, encoder: str | None = None, order=(0, 1, 2)):
    """The files of a fine-tuning run with its evaluation on three cases, from the worst to the best in an order."""
    files = make_cases(folder.parent / "cases")
    rows = [
        {
            "case": f"case_{number}",
            "organ": organ,
            **{"dice": dice + 0.01 * order.index(number), "iou": 0.5, "hd_mm": 9.0, "hd95_mm": 4.0, "nsd": 0.9},
            "status": "ok",
        }
        for number in range(3)
        for organ in TASK.names
    ]
    summary = summarise(rows)
    content = {
        "cases": 3,
        "average": summary["average"],
        "organs": {name: summary[name] for name in TASK.names},
        "task": TASK.description(),
        "files": files,
    }
    model = {
        "pretrained_encoder": encoder,
        "data": {"training_cases": 2, "validation_cases": 1},
        "steps": 120,
        "val_mean_dice": 0.71,
    }
    for path, value in (("evaluation/summary.json", content), ("models/model.json", model)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(value))
    write_csv(folder / "evaluation" / "cases.csv", rows)
    (folder / "evaluation" / "predictions").mkdir()
    for name, case in files.items():
        shutil.copy(case["label"], folder / "evaluation" / "predictions" / f"{name}.nii.gz")
    for name in ("metrics.png", "evaluation/boxplots.png"):
        picture(folder / name)
    return folder


@pytest.fixture
def report(tmp_path):
    pretraining = tmp_path / "pretraining"
    picture(pretraining / "metrics.png")
    description = {"method": "PGL", "steps": 100, "pairs": 1600, "data": {"training_volumes": 12}}
    (pretraining / "models").mkdir()
    (pretraining / "models" / "pgl_encoder.json").write_text(json.dumps(description))
    comparison = tmp_path / "comparison"
    picture(comparison / "compare.png")
    head = "metric,organ,run,reference,seeds,n,mean_a,mean_b,difference,ci95_low,ci95_high,p,p_holm\n"
    rows = (
        "dice,liver,PGL,random,3,3,0.51,0.76,0.25,0.2,0.31,0.012,\n"
        "dice,average,PGL,random,3,3,0.51,0.76,0.25,0.2,0.31,0.012,0.012\n"
        "hd95_mm,average,PGL,random,1,3,4,4,-1.5,,,,\n"
    )
    (comparison / "compare.csv").write_text(head + rows)
    runs = {
        "random": make_run(tmp_path / "random", 0.5),
        "PGL": make_run(tmp_path / "pgl", 0.75, "out/models/pgl_encoder.pt"),
    }
    return write_report(
        tmp_path / "report.html", runs, pretraining, comparison, "A <study>", "Phantoms & nothing else."
    )


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.text, self.open = [], [], []
        self.tags, self.attributes, self.alternatives, self.loose_tables = set(), set(), [], 0

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.alternatives += [value for name, value in attributes if name == "alt"]
        self.loose_tables += tag == "table" and self.parent != {"class": "scroll"}
        self.parent = dict(attributes)
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_content(report):
    reader = _Reader()
    reader.feed(report.read_text(encoding="utf-8"))
    text = " ".join(" ".join(reader.text).split())
    assert reader.open == []  # every tag is closed, in order
    # Names are text, whatever signs they have.
    assert "A <study>" in text
    assert "spleen <left>" in text
    # Mean of 0.50, 0.51, 0.52, and of 0.75, 0.76, 0.77.
    assert "0.510" in text
    assert "0.760" in text
    assert "encoder pgl_encoder.pt" in text
    assert "random weights" in text
    assert "PGL, 100 steps, 1600 pairs of views of 12 volumes" in text
    assert "PGL minus random" in text
    assert "liver 0.5100 0.7600 +0.2500 +0.2000 to +0.3100 0.012 3" in text
    assert "Average Dice: better than random: PGL (+0.250, +0.200 to +0.310)." in text
    # Of one seed nothing is a difference, and there is no p.
    assert "(three at least) to be called different from random: PGL (-1.500)." in text
    assert "Single runs differ by their seed alone" in text
    assert "average 4.00 4.00 -1.50 n/a 3" in text


def test_nothing_lies_outside_the_file(report):
    reader = _Reader()
    reader.feed(report.read_text(encoding="utf-8"))
    assert len(reader.links) == 10  # icon, comparison, three cases, box plots and curves each, pre-training
    assert all(link.startswith("data:") for link in reader.links)
    assert "@import" not in report.read_text(encoding="utf-8")
    assert "url(" not in report.read_text(encoding="utf-8")


def test_names_are_text_and_tables_scroll(tmp_path):
    name = """"><script>alert('1')</script><i onclick="x"""
    runs = {name: make_run(tmp_path / "a", 0.5), "b": make_run(tmp_path / "b", 0.5)}
    case = name.replace("/", "")
    for run in runs.values():
        folder = run / "evaluation"
        summary = json.loads((folder / "summary.json").read_text())
        summary["files"][case] = summary["files"].pop("case_0")
        (folder / "summary.json").write_text(json.dumps(summary))
        rows = read_csv(folder / "cases.csv")
        write_csv(folder / "cases.csv", [{**row, "case": row["case"].replace("case_0", case)} for row in rows])
        (folder / "predictions" / "case_0.nii.gz").rename(folder / "predictions" / f"{case}.nii.gz")
    reader = _Reader()
    reader.feed(write_report(tmp_path / "report.html", runs, title=name, note=name).read_text(encoding="utf-8"))
    assert reader.open == []
    assert not reader.tags & {"script", "i"}
    assert reader.attributes <= {"alt", "charset", "class", "colspan", "content", "href", "lang", "name", "rel", "src"}
    assert name in reader.alternatives
    assert name in reader.text
    assert any(case in text for text in reader.text)
    assert reader.loose_tables == 0


# --- cases ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn instead of pictures: for each its title and the titles of its columns."""
    pictures = []

    def draw(item, maps, task, path, title):
        assert next(iter(maps)) == "reference"
        assert title.split("_")[1] in item["image"]
        pictures.append((title, [column.replace("\n", " ") for column in maps]))
        path.write_bytes(b"picture")

    monkeypatch.setattr("pgl_ext.tools.report.draw_case", draw)
    return pictures


def evaluations(tmp_path, **orders) -> dict:
    return {name: make_run(tmp_path / name, 0.5, order=order) / "evaluation" for name, order in orders.items()}


def test_cases_are_those_of_the_first_run(tmp_path, drawn):
    entries = case_pictures(evaluations(tmp_path, a=(2, 0, 1), b=(0, 1, 2)))
    assert [entry["heading"] for entry in entries] == [
        f"{word} case of a by mean Dice: case_{number}" for word, number in (("Best", 1), ("Median", 0), ("Worst", 2))
    ]
    assert drawn == [
        ("case_1", ["reference", "a mean Dice 0.520", "b mean Dice 0.510"]),
        ("case_0", ["reference", "a mean Dice 0.510", "b mean Dice 0.500"]),
        ("case_2", ["reference", "a mean Dice 0.500", "b mean Dice 0.520"]),
    ]
    assert not any(entry["remarks"] for entry in entries)


def test_cases_chosen_by_name_follow(tmp_path, drawn):
    (folder,) = evaluations(tmp_path, a=(0, 1, 2)).values()
    rows = (folder / "cases.csv").read_text().splitlines()
    (folder / "cases.csv").write_text("\n".join(row for row in rows if "case_1" not in row))
    entries = case_pictures({"a": folder}, ["case_1", "case_2"])
    assert [entry["heading"] for entry in entries] == [
        "Best case of a by mean Dice: case_2",
        "Median and worst case of a by mean Dice: case_0",
        "Chosen case: case_1",
    ]
    assert [title for title, _ in drawn] == ["case_2", "case_0", "case_1"]


def test_many_runs_have_several_pictures(tmp_path, drawn):
    entries = case_pictures(evaluations(tmp_path, **dict.fromkeys("abcd", (0, 1, 2))))
    assert [len(entry["pictures"]) for entry in entries] == [2, 2, 2]
    assert [[column[0] for column in columns] for _, columns in drawn[:2]] == [list("rabc"), list("rd")]


def test_what_is_missing_of_cases_is_said(tmp_path, drawn):
    folders = evaluations(tmp_path, a=(0, 1, 2), b=(0, 1, 2))
    (folders["b"] / "predictions" / "case_2.nii.gz").unlink()
    (tmp_path / "cases" / "label_0.nii.gz").unlink()
    best, median, worst = case_pictures(folders)
    assert best["remarks"] == ["Without a prediction of this case: b."]
    assert [title for title, _ in drawn] == ["case_2", "case_1"]
    assert median["remarks"] == []
    assert "label_0.nii.gz" in worst["remarks"][0]
    assert worst["pictures"] == []


def test_an_evaluation_of_an_older_version_has_no_pictures(tmp_path, drawn):
    run = make_run(tmp_path / "a", 0.5)
    path = run / "evaluation" / "summary.json"
    content = json.loads(path.read_text())
    del content["files"]
    path.write_text(json.dumps(content))
    page = write_report(tmp_path / "report.html", {"a": run}).read_text(encoding="utf-8")
    assert "does not say where the scan lies" in page
    assert drawn == []


# --- what cannot be reported ----------------------------------------------------------------------------------------


def test_an_unfinished_run_is_named(tmp_path):
    run = make_run(tmp_path / "run", 0.5)
    (run / "evaluation" / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run 'mine' has no .*summary.json: finish 'run evaluating"):
        write_report(tmp_path / "report.html", {"mine": run})
    assert not (tmp_path / "report.html").exists()


def test_runs_of_different_tasks(tmp_path):
    first, second = make_run(tmp_path / "a", 0.5), make_run(tmp_path / "b", 0.5)
    path = second / "evaluation" / "summary.json"
    content = json.loads(path.read_text())
    del content["organs"]["liver"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="only runs of one task"):
        write_report(tmp_path / "report.html", {"a": first, "b": second})


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_in_a_browser(report, tmp_path):
    """No error in the console, no request to anywhere, and all pictures are decoded."""
    page = report.with_name("page.html")
    # The page has no script of its own; this one tells in the title what the browser decoded, and what it asked for.
    script = """<script>onload = () => document.title = JSON.stringify([
        [...document.images].map(image => image.naturalWidth > 0),
        performance.getEntriesByType("resource").map(entry => entry.name)])</script>"""
    page.write_text(report.read_text(encoding="utf-8") + script, encoding="utf-8")
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"),
    ]
    result = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in result.stderr
    title = result.stdout.split("<title>")[1].split("</title>")[0]
    decoded, requests = json.loads(title)
    assert decoded == [True] * 9
    assert [url for url in requests if not url.startswith("data:")] == []
