"""Fine-tuning as a user runs it: whole programs, killed, resumed, distributed, and fed bad input."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from programs import (
    SEGMENTATION_CONFIGS,
    TINY_SEGMENTATION,
    TOO_LONG,
    fine_tuning_arguments,
    run,
    start,
    tail,
    wait_for,
    write_start_method,
)

from pgl_ext.errors import root_cause
from pgl_ext.networks import ResNetEncoder
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.phantom import write_dataset
from pgl_ext.weights import EncoderRecord, InputRecord, ModelRecord, build_network, load_model, save_encoder

pytestmark = pytest.mark.slow

ENCODER = {"layers": (1, 1, 1, 1), "block": "basic", "widen_factor": 0.125}
# Dropout draws from the global random states, which a resumed run must find as they were.
SETTINGS = {"dropout": 0.2, "freeze_encoder_epochs": 1, "max_epochs": 3, "checkpoint_interval": 1}


def write_encoder(path: Path, arguments: dict) -> None:
    encoder = ResNetEncoder(**arguments)
    save_encoder(
        encoder, path, EncoderRecord(architecture=encoder.architecture, input=InputRecord(hu_window=[-1000, 1000]))
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    write_dataset(folder, 4, shape=(64, 64, 32))
    return folder


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "pgl_encoder.pt"
    torch.manual_seed(1)
    write_encoder(path, ENCODER)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Shared by all runs on these cases."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def settings(cases, encoder_file, cache):
    def make(out: Path, **overrides) -> dict:
        files = {"dataset_dir": cases, "cache_dir": cache, "pretrained_encoder": encoder_file, "output_dir": out}
        return {**{name: str(path) for name, path in files.items()}, **SETTINGS, **overrides}

    return make


@pytest.fixture(scope="module")
def arguments(settings):
    return lambda out, **overrides: fine_tuning_arguments(**settings(out, **overrides))


@pytest.fixture
def here(monkeypatch):
    """Runs the bundle in this process, which starts in no time."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handler = signal.getsignal(signal.SIGTERM)

    def run_here(*files: str, **overrides) -> None:
        paths = [
            str(SEGMENTATION_CONFIGS / name) for name in files or ("train.json", "tasks/phantom.yaml", "small.yaml")
        ]
        workflow = ConfigWorkflow(
            paths, workflow_type="train", logging_file=False, **{**TINY_SEGMENTATION, **overrides}
        )
        workflow.initialize()
        workflow.run()

    yield run_here
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def refusal(here, capsys):
    """What a user reads whose run is refused."""

    def message_of(**settings) -> str:
        capsys.readouterr()
        with pytest.raises(Exception, match=r".") as caught:
            here(**settings)
        sys.excepthook(caught.type, caught.value, caught.tb)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.count("\nerror: ") == 1
        return said.split("\nerror: ")[-1]

    return message_of


@pytest.fixture(scope="module")
def straight(arguments, tmp_path_factory) -> tuple[Path, str]:
    """A run that nothing disturbed, and what it said."""
    folder = tmp_path_factory.mktemp("straight")
    result = run(arguments(folder / "out", device="cpu"), cwd=folder)
    assert result.returncode == 0, result.stdout[-3000:]
    return folder / "out", result.stdout


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("checkpoint_*.pt"))


def metrics(out: Path) -> list[dict[str, str]]:
    """All but the speed, which no two runs share."""
    with open(out / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "patches_per_s"} for row in csv.DictReader(file)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return content.get("network", content)


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, log and best model, bit by bit."""
    last = [checkpoints(out)[-1] for out in (first, second)]
    assert last[0].name == last[1].name
    for a, b in (last, [out / "models" / "model.pt" for out in (first, second)]):
        state = weights(b)
        for key, value in weights(a).items():
            assert torch.equal(value, state[key]), (a, key)
    described = [json.loads((out / "models" / "model.json").read_text()) for out in (first, second)]
    assert described[0] == described[1]
    assert metrics(first) == metrics(second)


class TestRun:
    def test_leaves_everything(self, straight):
        out, log = straight
        names = ("metrics.csv", "metrics.png", "overlay.png", "split.json", "models/model.pt", "models/model.json")
        for name in names:
            assert (out / name).is_file(), name
        assert list((out / "tensorboard").iterdir())
        rows = metrics(out)
        assert [int(row["step"]) for row in rows if row["loss"]] == list(range(1, 10))  # 3 cases, 3 epochs of 3 steps
        validated = [row for row in rows if row["val_mean_dice"]]
        assert [int(row["step"]) for row in validated] == [3, 6, 9]
        assert "best model" in log

    def test_starts_from_the_encoder(self, straight, encoder_file):
        _, log = straight
        total = len(torch.load(encoder_file, weights_only=True))
        assert f"{total} of {total} tensors loaded" in log
        # Pre-trained on another range of HU: a warning, not an error.
        assert "clipped to [-1000, 1000] HU, here [-1024.0, 325.0]" in log

    def test_leaves_the_best_model(self, straight):
        out, _ = straight
        scores = [float(row["val_mean_dice"]) for row in metrics(out) if row["val_mean_dice"]]
        described = json.loads((out / "models" / "model.json").read_text())
        assert described["val_mean_dice"] == pytest.approx(max(scores), abs=1e-5)
        assert described["epoch"] == 1 + int(np.argmax(scores))
        assert described["steps"] == 3 * described["epoch"]
        record = ModelRecord.load(out / "models" / "model.pt")
        assert SegmentationTask(**record.task).names[:2] == ("lungs", "ribs")
        assert record.input == InputRecord(hu_window=[-1024, 325], patch_size=TINY_SEGMENTATION["patch_size"])
        network = load_model(build_network(out / "models" / "model.pt"), out / "models" / "model.pt")
        assert network(torch.rand(1, 1, 32, 32, 16)).shape == (1, 9, 32, 32, 16)

    def test_an_existing_run_is_not_overwritten(self, straight, settings, refusal):
        out, _ = straight
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert "--resume true" in refusal(**settings(out))
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_kill_and_resume_is_bit_identical(straight, arguments, tmp_path):
    out = tmp_path / "out"
    process = start(arguments(out), tmp_path, tmp_path / "log")
    wait_for(lambda: checkpoints(out), process, tmp_path / "log")
    process.kill()
    process.wait()
    assert checkpoints(out)[-1].name < checkpoints(straight[0])[-1].name, "killed too late to show anything"
    result = run([*arguments(out), "--resume", "true"], cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert_same_run(straight[0], out)


def test_sigterm_saves_and_resumes(straight, arguments, tmp_path):
    out = tmp_path / "out"
    process = start(arguments(out, checkpoint_interval=100), tmp_path, tmp_path / "log")
    wait_for(lambda: (out / "metrics.csv").is_file() and metrics(out), process, tmp_path / "log")
    process.send_signal(signal.SIGTERM)
    assert process.wait(TOO_LONG) == 143, tail(tmp_path / "log")
    assert len(checkpoints(out)) == 1
    result = run([*arguments(out, checkpoint_interval=100), "--resume", "true"], cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert_same_run(straight[0], out)


def test_loading_processes_that_are_not_forked_change_nothing(straight, settings, tmp_path):
    overlay = write_start_method(tmp_path, "spawn")
    result = run(fine_tuning_arguments(overlay, **settings(tmp_path / "out", num_workers=2)), cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert_same_run(straight[0], tmp_path / "out")


def test_early_stop_ends_the_run_for_good(settings, here, caplog, tmp_path):
    """At a learning rate of 0 only the batch norms' statistics change, and soon no validation is better."""
    out = tmp_path / "out"
    stop_soon = settings(out, lr=0.0, patience=1, max_epochs=50, pretrained_encoder=None)
    here(**stop_soon)
    last, rows = checkpoints(out)[-1], metrics(out)
    assert int(rows[-1]["epoch"]) < 50
    caplog.clear()
    with caplog.at_level("INFO", logger="pgl_ext"):
        here(**stop_soon, resume=True)
    assert "early stopping" in caplog.text
    assert checkpoints(out)[-1] == last
    assert metrics(out) == rows


def test_organs_that_are_not_annotated_take_no_part(cases, here, tmp_path):
    """A multi-label task whose data list says what was annotated: no error, no score, and the rest is learned."""
    entries = json.loads((cases / "dataset.json").read_text())["training"]
    for entry in entries:
        entry |= {name: str((cases / entry[name]).resolve()) for name in ("image", "label")}
        entry["organs"] = ["lungs", "liver"]
        label = nib.load(entry["label"])
        voxels = np.asarray(label.dataobj)
        path = tmp_path / Path(entry["label"]).name
        # The spleen is there, and nobody drew it.
        nib.save(nib.Nifti1Image(np.where(np.isin(voxels, [1, 4]), voxels, 0).astype(np.uint8), label.affine), path)
        entry["label"] = str(path)
    entries[0]["organs"].append("spleen")
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    here(
        "train.json",
        "small.yaml",
        data_list_file_path=str(tmp_path / "list.json"),
        output_dir=str(tmp_path / "out"),
        organs={"lungs": 1, "liver": 4, "spleen": 5},
        multi_label=True,
        annotated_key="organs",
        max_epochs=1,
    )
    rows = metrics(tmp_path / "out")
    assert all(float(row["loss"]) < 3 for row in rows if row["loss"])
    (validated,) = [row for row in rows if row["val_mean_dice"]]
    assert validated["val_dice_lungs"]
    assert not validated["val_dice_spleen"]
    assert build_network(tmp_path / "out" / "models" / "model.pt").architecture["arguments"]["out_channels"] == 3


def test_two_processes(settings, tmp_path):
    """Torchrun with the overlay."""
    files = [
        str(SEGMENTATION_CONFIGS / name)
        for name in ("train.json", "tasks/phantom.yaml", "small.yaml", "multi_gpu_train.json")
    ]
    overrides = {"config_file": files, "validation_fraction": 0.5, "encoder_lr_factor": 0.5, "micro_batch_size": 1}
    overrides = {**TINY_SEGMENTATION, **settings(tmp_path / "out", **overrides)}
    (tmp_path / "arguments.json").write_text(json.dumps(overrides))
    worker = Path(__file__).parents[1] / "distributed_worker.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = run([*torchrun, str(worker), str(tmp_path / "arguments.json")], cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    parameters = [key for key in ranks[0]["state"] if "running" not in key and "num_batches" not in key]
    for key in parameters:
        assert torch.equal(ranks[0]["state"][key], ranks[1]["state"][key]), key
    # Each validated one of the two cases. Without the same score one could stop early while the other waits for ever.
    assert ranks[0]["best_model"] == ranks[1]["best_model"]
    # Together they saw each sample once.
    seen = sorted(tuple(key) for rank in ranks for key in rank["seen"])
    assert seen == [(epoch, index) for epoch in range(3) for index in range(8)]
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows if row["loss"]] == [str(step) for step in range(1, 7)]
    scores = {int(row["step"]): float(row["val_mean_dice"]) for row in rows if row["val_mean_dice"]}
    assert list(scores) == [2, 4, 6]
    assert ranks[0]["best_model"]["best_score"] == pytest.approx(max(scores.values()), abs=1e-5)
    assert len({path.name.split(".")[-2] for path in (tmp_path / "out" / "tensorboard").iterdir()}) == 1
    load_model(build_network(tmp_path / "out/models/model.pt"), tmp_path / "out/models/model.pt")


@pytest.mark.parametrize("memory_limit_gib", [0, 1])
@pytest.mark.parametrize("part", ["train", "validate"])
def test_an_error_of_a_transform_stops_the_run(settings, here, caplog, tmp_path, part, memory_limit_gib):
    """A bug, which no case is skipped for, wherever it is read from."""
    fault = {"_target_": "Lambdad", "keys": "image", "func": "$lambda image: image + []"}
    steps = {"_target_": "Compose", "transforms": [f"@{part}#preprocessing", fault]}
    faulty = {f"{part}#dataset#transform": steps, f"{part}#dataset#memory_limit_gib": memory_limit_gib}
    with pytest.raises(RuntimeError) as caught:
        here(**settings(tmp_path / "out", **faulty))
    assert isinstance(root_cause(caught.value), TypeError)
    assert "skipped" not in caplog.text


class TestBadCases:
    def test_are_all_listed_at_once(self, cases, tmp_path):
        data = tmp_path / "data"
        shutil.copytree(cases, data)
        images, labels = (sorted((data / name).glob("*.nii.gz")) for name in ("imagesTr", "labelsTr"))
        grid, values, empty, gone = labels
        label = nib.load(grid)
        voxels = np.asarray(label.dataobj)
        for path in (grid, values, empty):
            path.unlink()
        nib.save(nib.Nifti1Image(voxels[:-2], label.affine), grid)
        wrong = voxels.copy()
        wrong[:3] = 77
        other = nib.load(images[1])
        nib.save(nib.Nifti1Image(np.resize(wrong, other.shape).astype(np.uint8), other.affine), values)
        other = nib.load(images[2])
        nib.save(nib.Nifti1Image(np.zeros(other.shape, np.uint8), other.affine), empty)
        gone.unlink()
        result = run(fine_tuning_arguments(dataset_dir=data, output_dir=tmp_path / "out"), cwd=tmp_path)
        assert result.returncode == 1
        assert "Traceback" not in result.stdout
        said = result.stdout.split("\nerror: ")[-1]
        assert "4 of 4" in said
        for image, reason in zip(images, ("another grid", "77", "empty", "does not exist"), strict=True):
            (line,) = [line for line in said.splitlines() if image.name.split(".")[0] in line]
            assert reason in line
        assert not (tmp_path / "out" / "models").exists()

    def test_images_without_label_map(self, cases, refusal, tmp_path):
        data = tmp_path / "data"
        shutil.copytree(cases, data)
        (data / "dataset.json").unlink()
        missing = sorted((data / "labelsTr").glob("*.nii.gz"))[:2]
        for path in missing:
            path.unlink()
        said = refusal(dataset_dir=str(data), output_dir=str(tmp_path / "out"))
        assert all(path.name in said for path in missing)


class TestBadEncoderFiles:
    def test_another_architecture(self, settings, refusal, tmp_path):
        path = tmp_path / "wide.pt"
        write_encoder(path, {**ENCODER, "widen_factor": 0.25})
        said = refusal(**settings(tmp_path / "out", pretrained_encoder=str(path)))
        assert "mismatched" in said
        assert "conv1.weight: (16, 1, 7, 7, 7), (8, 1, 7, 7, 7)" in said
        assert not (tmp_path / "out" / "checkpoints").exists()

    def test_truncated(self, settings, refusal, encoder_file, tmp_path):
        path = tmp_path / "half.pt"
        path.write_bytes(encoder_file.read_bytes()[:-5000])
        assert f"{path} can not be read" in refusal(**settings(tmp_path / "out", pretrained_encoder=str(path)))

    def test_missing(self, settings, refusal, tmp_path):
        path = tmp_path / "none.pt"
        assert str(path) in refusal(**settings(tmp_path / "out", pretrained_encoder=str(path)))


def test_a_damaged_checkpoint_is_not_resumed_from(straight, settings, refusal, tmp_path):
    shutil.copytree(straight[0], tmp_path / "out")
    path = checkpoints(tmp_path / "out")[-1]
    path.write_bytes(path.read_bytes()[:-5000])
    said = refusal(**settings(tmp_path / "out", resume=True))
    assert "no intact checkpoint" in said
    assert str(path.parent) in said
