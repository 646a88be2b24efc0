from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from programs import SEGMENTATION_CONFIGS

from pgl_ext.evaluation.figures import plot_scores
from pgl_ext.evaluation.handler import CASE_COLUMNS, EvaluationReport
from pgl_ext.evaluation.metrics import organ_scores
from pgl_ext.evaluation.summary import AVERAGE, case_means, confidence_interval, summarise
from pgl_ext.files import release_folder
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.report import case_pictures
from pgl_ext.transforms.checks import BadVolumesError
from pgl_ext.weights import InputRecord, ModelRecord

CONFIG = SEGMENTATION_CONFIGS / "evaluate.json"
ORGANS = {"fat": [3], "muscle": [7]}
SHAPE = (26, 22, 14)


def oblique_affine() -> np.ndarray:
    """Axes that point left, posterior and up, all turned by 20 degrees, with voxels of 1.1 x 1.3 x 2.7 mm."""
    c, s = math.cos(math.radians(20)), math.sin(math.radians(20))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([-1.1, -1.3, 2.7])
    affine[:3, 3] = [40, 30, -12]
    return affine


AFFINES = [np.diag([1.0, 1.0, 2.0, 1.0]), oblique_affine(), np.diag([-1.5, 1.0, 1.0, 1.0])]


@pytest.fixture
def data_list(tmp_path):
    """Three cases whose organs are what their normalised intensity says: below 0 none, below 1 fat, else muscle."""
    entries = []
    for number, affine in enumerate(AFFINES):
        folder = tmp_path / "data" / f"patient {number}"
        folder.mkdir(parents=True)
        image = np.random.default_rng(number).normal(size=SHAPE).astype(np.float32) * 50
        normalised = (image - image.mean()) / image.std()
        label = np.select([normalised < 0, normalised < 1], [0, 3], 7).astype(np.uint8)
        nib.save(nib.Nifti1Image(image, affine), folder / "scan.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "label.nii.gz")
        entries.append({key: f"patient {number}/{key.replace('image', 'scan')}.nii.gz" for key in ("image", "label")})
    path = tmp_path / "data" / "dataset.json"
    path.write_text(json.dumps({"test": entries}))
    return path


class ByIntensity(torch.nn.Conv3d):
    """Logits that are largest for the right class."""

    def __init__(self) -> None:
        super().__init__(1, 3, 1)
        with torch.no_grad():
            self.weight.copy_(torch.tensor([0.0, 1, 2]).view(3, 1, 1, 1, 1))
            self.bias.copy_(torch.tensor([0.0, 0, -1]))


RECORD = ModelRecord(
    task={"organs": ORGANS, "background_values": [0], "multi_label": False},
    network={"family": "resnet", "arguments": {"in_channels": 1, "out_channels": 3}},
    input=InputRecord(patch_size=[16, 16, 16]),
)


def evaluator(tmp_path: Path, data_list: Path | None, recorded: Mapping = {}, **overrides):
    """The evaluator of the bundle with a network that is right by construction."""
    model = tmp_path / "models" / "model.pt"
    model.parent.mkdir(exist_ok=True)
    model.with_suffix(".json").write_text(json.dumps(replace(RECORD, **recorded).to_json()))
    parser = ConfigParser()
    parser.read_config(CONFIG)
    settings = {"model_path": str(model), "output_dir": str(tmp_path / "out")}
    settings["data_list_file_path"] = None if data_list is None else str(data_list)
    settings |= {"network": ByIntensity(), "device": torch.device("cpu"), **overrides}
    for key, value in settings.items():
        parser[key.replace("#", "::")] = value
    return parser.get_parsed_content("evaluator")


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- the bundle -----------------------------------------------------------------------------------------------------


def test_the_model_knows_which_field_says_what_is_annotated(tmp_path, data_list):
    content = json.loads(data_list.read_text())
    for entry in content["test"]:
        entry["contoured"] = ["muscle"]
    data_list.write_text(json.dumps(content))
    evaluator(tmp_path, data_list, recorded={"annotated_key": "contoured"}).run()
    found = {(row["organ"], row["status"]) for row in read_csv(tmp_path / "out" / "cases.csv")}
    assert found == {("fat", "not annotated"), ("muscle", "ok")}


@pytest.mark.parametrize("of_list", [False, True])
def test_cases_of_folds_are_scored_by_the_network_that_has_not_seen_them(tmp_path, data_list, of_list):
    """Only the network of fold 1 is right, which held out one of the three; on a list, both are averaged."""
    cases = json.loads(data_list.read_text())["test"]
    for fold, held_out in enumerate((cases[:2], cases[2:])):
        folder = tmp_path / "run" / f"fold_{fold}"
        (folder / "models").mkdir(parents=True)
        (folder / "split.json").write_text(json.dumps({"test": held_out}))
        (folder / "models" / "model.json").write_text(json.dumps(RECORD.to_json()))
    right, wrong = ByIntensity(), ByIntensity()
    wrong.weight.data.zero_()
    settings = {"dataset_dir": str(data_list.parent), "network": torch.nn.ModuleList([wrong, right])}
    evaluator(tmp_path, data_list if of_list else None, model_path=str(tmp_path / "run"), **settings).run()
    dice = {row["case"]: [] for row in read_csv(tmp_path / "out" / "cases.csv")}
    for row in read_csv(tmp_path / "out" / "cases.csv"):
        dice[row["case"]].append(float(row["dice"]))
    files = json.loads((tmp_path / "out" / "summary.json").read_text())["files"]
    if of_list:
        assert [case["models"] for case in files.values()] == [[0, 1]] * 3
        assert min(dice["patient 0_scan"]) > 0
    else:
        assert {name: case["models"] for name, case in files.items()} == {
            "patient 0_scan": [0],
            "patient 1_scan": [0],
            "patient 2_scan": [1],
        }
        assert dice == {"patient 0_scan": [0, 0], "patient 1_scan": [0, 0], "patient 2_scan": [1, 1]}


@pytest.mark.parametrize("flip_axes", [[], [0, 1, 2]])
def test_a_network_that_is_right_scores_perfectly_on_any_grid(tmp_path, data_list, flip_axes):
    evaluator(tmp_path, data_list, flip_axes=flip_axes).run()
    out = tmp_path / "out"
    rows = read_csv(out / "cases.csv")
    assert tuple(rows[0]) == CASE_COLUMNS
    names = [f"patient {number}_scan" for number in range(3)]
    assert [(row["case"], row["organ"]) for row in rows] == [(case, organ) for case in names for organ in ORGANS]
    for row in rows:
        assert [float(row[key]) for key in ("dice", "iou", "hd_mm", "hd95_mm", "nsd")] == [1, 1, 0, 0, 1]
        assert row["status"] == "ok"
    for number, (name, affine) in enumerate(zip(names, AFFINES, strict=True)):
        predicted = nib.load(out / "predictions" / f"{name}.nii.gz")
        label = nib.load(data_list.parent / f"patient {number}" / "label.nii.gz")
        assert np.array_equal(np.asarray(predicted.dataobj), np.asarray(label.dataobj))
        assert predicted.get_data_dtype() == np.uint8
        np.testing.assert_allclose(predicted.affine, affine, atol=1e-5)
        volumes = [float(row["reference_ml"]) for row in rows if row["case"] == name]
        voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
        counts = [np.sum(np.asarray(label.dataobj) == value) for value in (3, 7)]
        assert volumes == pytest.approx([count * voxel_ml for count in counts], rel=1e-4)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["cases"] == 3
    assert list(summary["organs"]) == list(ORGANS)
    assert summary[AVERAGE]["dice"] == {"mean": 1.0, "std": 0.0, "n": 3, "ci95": [1.0, 1.0]}
    assert summary["flip_axes"] == flip_axes
    assert [row["organ"] for row in read_csv(out / "summary.csv")] == [*ORGANS, AVERAGE]
    pictures = ["boxplots.png", *(f"overlays/{name}.png" for name in ("best", "median", "worst"))]
    assert all((out / name).stat().st_size > 5000 for name in pictures)
    # A report finds all that it draws.
    for entry in case_pictures({"a": out, "b": out}):
        assert [picture[:15] for picture in entry["pictures"]] == ["data:image/png;"]
        assert entry["remarks"] == []


def test_time_of_the_network(tmp_path, data_list):
    """For a case, whatever windows it takes; not that of reading, scoring and drawing."""

    class Slow(ByIntensity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return super().forward(x)

    for overlap in (0.0, 0.5):  # windows of 16 on volumes of 26 x 22 x 14 voxels: 2 x 2 x 1 and 3 x 2 x 1
        out = tmp_path / str(overlap)
        evaluator(tmp_path, data_list, network=Slow(), overlap=overlap, sw_batch_size=1, output_dir=str(out)).run()
        summary = json.loads((out / "summary.json").read_text())
        windows = 4 if overlap == 0 else 6
        assert 0.05 * windows <= summary["seconds_per_case"] < 0.05 * windows + 2
        assert summary["device"] == f"{torch.get_num_threads()} CPU threads"


def test_best_and_worst_are_what_they_are_called(tmp_path, data_list, monkeypatch):
    """All, two thirds and one third of the voxels that are found to be muscle are so in the reference."""
    titles = {}
    monkeypatch.setattr("pgl_ext.figures.overlays.plot_overlay", lambda *args: titles.update({args[4].stem: args[5]}))
    content = json.loads(data_list.read_text())
    for number, entry in enumerate(content["test"]):
        path = data_list.parent / entry["label"]
        label = nib.load(path)
        values = np.asarray(label.dataobj).copy()
        muscle = np.flatnonzero(values == 7)
        values.flat[muscle[np.arange(len(muscle)) % 3 < number]] = 0
        nib.save(nib.Nifti1Image(values, label.affine), path)
    evaluator(tmp_path, data_list).run()
    rows = read_csv(tmp_path / "out" / "cases.csv")
    means = case_means([{**row, "dice": float(row["dice"])} for row in rows], "dice")
    assert means["patient 2_scan"] < means["patient 1_scan"] < means["patient 0_scan"]
    for title, number in (("best", 0), ("median", 1), ("worst", 2)):
        name = f"patient {number}_scan"
        assert titles[title] == f"{title}: {name}, mean Dice {means[name]:.3f}"
    (row,) = (row for row in read_csv(tmp_path / "out" / "summary.csv") if row["organ"] == AVERAGE)
    assert min(means.values()) <= float(row["dice_ci95_low"]) < float(row["dice_mean"]) < float(row["dice_ci95_high"])


def test_both_names_of_the_workflow_run_the_evaluator():
    config = ConfigParser.load_config_file(CONFIG)
    assert config["run"] == "%evaluating"
    assert config["evaluating"][-1] == "$@evaluator.run()"


def test_an_earlier_report_is_kept(tmp_path, data_list):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cases.csv").write_text("precious")
    with pytest.raises(FileExistsError, match=r"earlier evaluation.*--output_dir"):
        evaluator(tmp_path, data_list).run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cases.csv"]


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_an_evaluation_goes_on_where_it_was_stopped(tmp_path, data_list, finished):
    """With the very files of one that was not; all but the last of the finished cases are not segmented again."""
    blurred = ByIntensity()
    blurred.bias.data += torch.tensor([0.0, 0.1, -0.2])
    evaluator(tmp_path, data_list, network=blurred).run()
    whole, out = tmp_path / "whole", tmp_path / "out"
    out.rename(whole)

    engine = evaluator(tmp_path, data_list, network=blurred)
    stop = Events.ITERATION_COMPLETED(once=finished) if finished < 3 else Events.EPOCH_COMPLETED
    engine._event_handlers[Events.EPOCH_COMPLETED].clear()

    @engine.on(stop)
    def _stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run()
    release_folder(out)
    engine = evaluator(tmp_path, data_list, network=blurred, resume=True)
    engine.run()
    assert engine.state.iteration == 3 - (finished - 1)
    paths = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) == paths
    for path in paths:
        one, other = ((folder / path).read_bytes() for folder in (out, whole))
        if path.name == "summary.json":  # but for the time it took
            one, other = ({**json.loads(content), "seconds_per_case": None} for content in (one, other))
        assert one == other, path


def test_a_complete_evaluation_has_nothing_to_go_on_with(tmp_path, data_list):
    """A job that is started again and again until it has succeeded."""
    evaluator(tmp_path, data_list).run()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    engine = evaluator(tmp_path, data_list, resume=True)
    engine.run()
    assert engine.state.iteration == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(FileExistsError, match="earlier evaluation"):
        evaluator(tmp_path, data_list, resume=True, tolerance_mm=1).run()


def test_what_was_stopped_of_another_model_is_not_gone_on_with(tmp_path, data_list):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "finished_cases.jsonl").write_text("[{}, {}, []]\n")
    with pytest.raises(ValueError, match=r"part of an evaluation of another model, task or setting.*--resume false"):
        evaluator(tmp_path, data_list, resume=True).run()


def test_a_full_disk_ends_in_one_line_and_keeps_what_is_finished(tmp_path, data_list, monkeypatch):
    engine = evaluator(tmp_path, data_list)
    calls = []

    def fsync(number):
        calls.append(number)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(
        OSError, match=r"Cannot write .*nii\.gz: No space left on device\. Make room in .*--resume true"
    ):
        engine.run()
    monkeypatch.undo()
    release_folder(tmp_path / "out")
    engine = evaluator(tmp_path, data_list, resume=True)
    engine.run()
    assert engine.state.iteration < 3
    assert len(read_csv(tmp_path / "out" / "cases.csv")) == 6


def test_all_bad_cases_are_named_before_anything_is_written(tmp_path, data_list):
    folder = data_list.parent
    label = nib.load(folder / "patient 0" / "label.nii.gz")
    wrong = np.asarray(label.dataobj).copy()
    wrong[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(wrong, label.affine), folder / "patient 0" / "label.nii.gz")
    (folder / "patient 2" / "scan.nii.gz").write_bytes(b"not a scan")
    with pytest.raises(BadVolumesError) as caught:
        evaluator(tmp_path, data_list).run()
    assert "2 of 3 volumes" in str(caught.value)
    assert "9 (1 voxels)" in str(caught.value)
    assert "patient 2/scan.nii.gz" in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- one case -------------------------------------------------------------------------------------------------------


def report(tmp_path: Path, cases: list[dict], **settings) -> EvaluationReport:
    return EvaluationReport(tmp_path / "out", SegmentationTask(ORGANS), cases, **settings)


def predicted(*masks: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.from_numpy(np.stack(masks)), affine=torch.from_numpy(oblique_affine()))


def test_scores_are_those_of_the_masks_with_the_spacing_of_the_affine(tmp_path):
    rng = np.random.default_rng(0)
    fat, muscle = rng.random((2, *SHAPE)) > 0.7
    labels = torch.from_numpy(rng.choice([0, 3, 7], (1, *SHAPE)))
    rows = report(tmp_path, [{"name": "a"}]).add("a", predicted(fat, muscle), labels)
    for row, mask, value in zip(rows, (fat, muscle), (3, 7), strict=True):
        expected = organ_scores(mask, labels[0].numpy() == value, (1.1, 1.3, 2.7))
        assert (row["case"], row["status"]) == ("a", expected.pop("status"))
        assert {key: row[key] for key in expected} == pytest.approx(expected)


def test_organs_that_are_not_annotated_take_no_part(tmp_path):
    labels = torch.zeros(1, *SHAPE)
    labels[0, :5] = 3
    fat, muscle = labels[0].numpy() == 3, np.ones(SHAPE, dtype=bool)
    rows = report(tmp_path, [{"name": "a", "annotated": ["fat"]}]).add("a", predicted(fat, muscle), labels)
    assert [row["status"] for row in rows] == ["ok", "not annotated"]
    assert math.isnan(rows[1]["dice"])
    assert case_means(rows, "dice") == {"a": 1.0}
    # The same of a case whose muscle is known to be empty.
    rows = report(tmp_path, [{"name": "a"}]).add("a", predicted(fat, muscle), labels)
    assert [row["status"] for row in rows] == ["ok", "spurious"]
    assert case_means(rows, "dice") == {"a": 0.5}


def test_voxels_to_ignore_are_scored_in_neither(tmp_path):
    """As if the volume ended before them."""
    rng = np.random.default_rng(0)
    fat, muscle = rng.random((2, *SHAPE)) > 0.7
    labels = rng.choice([0, 3, 7], (1, *SHAPE))
    labels[..., 9:] = 9
    task = SegmentationTask(ORGANS, ignore_label=9)
    rows = EvaluationReport(tmp_path / "out", task, [{"name": "a"}]).add(
        "a", predicted(fat, muscle), torch.from_numpy(labels)
    )
    for row, mask, value in zip(rows, (fat, muscle), (3, 7), strict=True):
        expected = organ_scores(mask[..., :9], labels[0, ..., :9] == value, (1.1, 1.3, 2.7))
        assert {key: row[key] for key in expected} == pytest.approx(expected)
    written = nib.load(tmp_path / "out" / "predictions" / "a.nii.gz").get_fdata()
    assert (written[..., 9:] > 0).any()  # where nothing is known, the network may well be right


def test_each_organ_has_its_tolerance(tmp_path, data_list):
    """Within a volume's size all surfaces agree, within less than a voxel those of a network that is wrong do not."""
    network = ByIntensity()
    network.bias.data.mul_(0.5)
    first, second = ORGANS
    evaluator(tmp_path, data_list, network=network, tolerance_mm={first: 0.01, second: 1000.0}).run()
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert content["tolerance_mm"] == {first: 0.01, second: 1000.0}
    assert content["organs"][first]["nsd"]["mean"] < 1
    assert content["organs"][second]["nsd"]["mean"] == 1
    for wrong in ({"lung": 2.0}, {first: 0}, -1):
        with pytest.raises(ValueError, match="tolerance_mm must be a positive number of mm, or one by name"):
            EvaluationReport(tmp_path, SegmentationTask(ORGANS), [], tolerance_mm=wrong)
    for given, expected in ((None, [2, 2]), (3, [3, 3]), ({second: 1}, [2, 1])):
        report = EvaluationReport(tmp_path, SegmentationTask(ORGANS), [], tolerance_mm=given)
        assert list(report.tolerances.values()) == expected


# --- summary --------------------------------------------------------------------------------------------------------


def rows_of(dice: dict[str, list[float]]) -> list[dict]:
    statuses = {True: "absent", False: "ok"}
    return [
        {"case": f"case {number}", "organ": organ, "dice": value, "iou": value, "hd_mm": 10 * value, "hd95_mm": value}
        | {"nsd": value, "status": statuses[math.isnan(value)]}
        for number in range(len(next(iter(dice.values()))))
        for organ, value in ((organ, values[number]) for organ, values in dice.items())
    ]


def test_summary_by_hand():
    nan = math.nan
    summary = summarise(rows_of({"liver": [0.8, 0.9, 1.0], "tumour": [0.2, nan, 0.4], "cyst": [nan, nan, nan]}))
    assert summary["liver"]["dice"]["mean"] == pytest.approx(0.9)
    assert summary["liver"]["dice"]["std"] == pytest.approx(0.1)
    assert summary["tumour"]["hd_mm"]["mean"] == pytest.approx(3)
    assert (summary["tumour"]["dice"]["n"], summary["tumour"]["ok"], summary["tumour"]["absent"]) == (2, 2, 1)
    assert summary["cyst"]["dice"] == {"mean": None, "std": None, "n": 0, "ci95": None}
    # Of the cases' means: 0.5, 0.9 and 0.7.
    assert summary[AVERAGE]["dice"]["mean"] == pytest.approx(0.7)
    assert summary[AVERAGE]["dice"]["std"] == pytest.approx(0.2)
    low, high = summary[AVERAGE]["dice"]["ci95"]
    assert 0.5 <= low < 0.7 < high <= 0.9


def test_interval_agrees_with_every_possible_resample():
    values = [0.1, 0.5, 0.55, 0.7]
    means = np.mean(np.stack(np.meshgrid(*[values] * 4), -1).reshape(-1, 4), axis=1)
    assert confidence_interval(values) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)
    assert confidence_interval(values) == confidence_interval(values)


def test_interval_of_many_cases_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    half = 1.96 * values.std(ddof=1) / 20
    assert confidence_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.001)


def test_interval_of_too_few_or_equal_cases():
    assert all(math.isnan(end) for end in confidence_interval([0.5]))
    assert confidence_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_boxes_show_every_case_and_leave_out_nan(tmp_path):
    values = {"liver": [0.9, 0.8, math.nan, 0.7], "cyst": [math.nan] * 4}
    figure = plot_scores(
        {"dice": values, "hd95_mm": {"liver": [1, 2, 3, 40], "cyst": [5, 6, 7, 8]}}, tmp_path / "b.png"
    )
    upper, lower = figure.axes
    assert sorted(upper.collections[0].get_offsets()[:, 1].tolist()) == [0.7, 0.8, 0.9]
    assert len(upper.collections) == 1
    assert [text.get_text() for text in upper.texts] == ["n/a"]
    assert [text.get_text() for text in lower.get_xticklabels()] == ["liver", "cyst"]
    assert lower.get_ylim()[0] == 0
    assert lower.get_ylim()[1] > 40
    assert (tmp_path / "b.png").stat().st_size > 5000
