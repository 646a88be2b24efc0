from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from made_studies import FINGERPRINT, copy_package, finish, make_fast, make_study, scores, write_study
from programs import SEGMENTATION_CONFIGS, TINY, TINY_SEGMENTATION, run

from pgl_ext.tools.phantom import write_dataset
from pgl_ext.tools.study.run import run_study
from pgl_ext.tools.study.runner import Runner, default_jobs, time_left
from pgl_ext.tools.study.runs import Run, bundle_command


@pytest.fixture
def fast(monkeypatch):
    make_fast(monkeypatch)


@pytest.fixture
def path(tmp_path) -> Path:
    return write_study(tmp_path, labelled_cases=[3])


def in_background(path: Path, out: Path, **settings) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=run_study, args=(path, out), kwargs=settings)
    process.start()
    return process


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened for {seconds} s"
        time.sleep(0.01)


def kill(study: multiprocessing.Process, with_children: bool) -> None:
    running = children(study.pid)
    study.kill()
    if with_children:
        for child in running:
            os.kill(child, signal.SIGKILL)
    study.join()


# --- a study that nothing disturbs ----------------------------------------------------------------------------------


def test_everything_is_run_once(fast, path, tmp_path, capsys):
    text, _ = run_study(path, tmp_path / "out", jobs=2)
    assert "3 labelled cases, average Dice:" in text
    said = capsys.readouterr().out
    # Each pre-training ends before its fine-tuning begins, and each run says what it reached.
    for seed in (0, 1):
        trained = said.index(f"PGL, pre-training, seed {seed}: 00:")
        assert trained < said.index(f"PGL, 3 labelled cases, seed {seed}: log in")
        assert f"PGL, 3 labelled cases, seed {seed}: mean Dice 0." in said
    assert "[6/6]" in said
    logs = {log: log.read_text() for log in tmp_path.rglob("log.txt")}
    assert len(logs) == 6
    assert not list(tmp_path.rglob("checkpoints"))
    run_study(path, tmp_path / "out", jobs=2)
    assert logs == {log: log.read_text() for log in tmp_path.rglob("log.txt")}
    assert capsys.readouterr().out == ""


def test_folds_are_one_run_whose_cases_each_network_has_its_part_of(fast, tmp_path, monkeypatch):
    """Stopped between its folds, it goes on with what is left, and the scores are those of one that was not."""
    entries = {"test": {"folds": 3}, "labelled_cases": [4], "methods": {"random": {"encoder": None}}, "pretraining": {}}
    overrides = {"fine_tuning#settings#kept_steps": [4]}
    path = write_study(tmp_path, **entries)
    run_study(path, tmp_path / "straight", overrides=overrides)
    monkeypatch.setenv("STAND_IN_PAUSE", "0.2")
    study = in_background(path, tmp_path / "out", overrides=overrides)
    fold = tmp_path / "out" / "fine_tuning" / "random" / "4_cases" / "seed_0" / "fold_1"
    wait_for(lambda: any((fold / "checkpoints").glob("*.pt")))
    kill(study, with_children=True)
    monkeypatch.setenv("STAND_IN_PAUSE", "0.01")
    run_study(path, tmp_path / "out", overrides=overrides)
    assert scores(tmp_path / "out") == scores(tmp_path / "straight")
    assert len(list((tmp_path / "out").rglob("run.json"))) == 2
    assert not list((tmp_path / "out").rglob("checkpoints"))
    evaluated = (fold.parent / "evaluation" / "cases.csv").read_text().splitlines()[1:]
    models = [json.loads((fold.with_name(f"fold_{k}") / "models" / "model.json").read_text()) for k in range(3)]
    for number, row in enumerate(evaluated, 1):
        assert float(row.split(",")[2]) == models[number % 3]["val_mean_dice"] * number / 10
    noted = json.loads((fold.parent / "run.json").read_text())
    assert noted["val_mean_dice"] == pytest.approx(sum(model["val_mean_dice"] for model in models) / 3)
    assert (fold.parent / "evaluation_step_4" / "cases.csv").is_file()


def test_more_seeds_later(fast, path, tmp_path, capsys):
    run_study(path, tmp_path / "out", overrides={"seeds": [0]})
    capsys.readouterr()
    run_study(path, tmp_path / "out", overrides={"seeds": [0, 1]})
    assert "seed 0" not in capsys.readouterr().out
    assert len(list(tmp_path.rglob("run.json"))) == 6


def test_learning_rates_are_chosen_on_the_way(fast, path, tmp_path):
    run_study(path, tmp_path / "out", overrides={"pretraining#learning_rates": [0.3, 1.0]})
    rows = (tmp_path / "out" / "learning_rates.csv").read_text().splitlines()
    assert rows[0] == "method,lr,fine_tuning_lr,val_mean_dice,chosen"
    assert [row.rpartition(",")[2] for row in rows[1:]] == ["True", "False"]  # equal Dice: the smaller rate
    names = sorted(run.parent.relative_to(tmp_path / "out").as_posix() for run in tmp_path.rglob("run.json"))
    assert names == [
        *(f"fine_tuning/{name}" for name in ("PGL_lr_0.3/3_cases/seed_0", "PGL_lr_0.3/3_cases/seed_1")),
        *("fine_tuning/PGL_lr_1/3_cases/seed_0", "fine_tuning/random/3_cases/seed_0"),
        "fine_tuning/random/3_cases/seed_1",
        *(f"pretraining/{name}" for name in ("PGL_lr_0.3/seed_0", "PGL_lr_0.3/seed_1", "PGL_lr_1/seed_0")),
    ]


def test_learning_rates_of_fine_tuning_are_chosen_apart_from_the_test(fast, path, tmp_path):
    rates = {"fine_tuning#learning_rates": [0.2, 0.1], "fine_tuning#settings#validation_fraction": None}
    run_study(path, tmp_path / "out", overrides=rates)
    rows = (tmp_path / "out" / "learning_rates.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows[1:]] == [
        [method, "", rate] for method in ("random", "PGL") for rate in ("0.1", "0.2")
    ]
    assert [row.rpartition(",")[2] for row in rows[1:]] == ["True", "False"] * 2
    fine_tunings = tmp_path / "out" / "fine_tuning"
    runs = {run.parent.relative_to(fine_tunings) for run in fine_tunings.rglob("run.json")}
    for method in ("random", "PGL"):
        for rate in ("0.1", "0.2"):
            folder = Path(f"{method}_fine_tuning_lr_{rate}")
            assert folder / "3_cases_for_selection" / "seed_0" in runs
            assert (folder / "3_cases" / "seed_1" in runs) == (rate == "0.1")
    assert not list(fine_tunings.glob("*/3_cases_for_selection/*/evaluation*"))


def test_kept_models_are_evaluated_once(fast, path, tmp_path, capsys):
    """But those of steps after the training's end, as where it stopped early, of which there is none."""
    kept = {"fine_tuning#settings#kept_steps": [4, 20], "seeds": [0]}
    run_study(path, tmp_path / "out", overrides=kept)
    with open(tmp_path / "out" / "curves.csv", newline="") as file:
        assert [(row["method"], row["step"]) for row in csv.DictReader(file)] == [
            (method, step) for method in ("random", "PGL") for step in ("4", "8")
        ]
    logs = [log.read_text() for log in tmp_path.glob("out/fine_tuning/**/log.txt")]
    assert [log.count("stand_in.py evaluating") for log in logs] == [2, 2]
    capsys.readouterr()
    run_study(path, tmp_path / "out", overrides=kept)
    assert capsys.readouterr().out == ""


def test_a_learning_rate_that_fails_is_not_chosen(fast, path, tmp_path):
    bad = tmp_path / "out" / "pretraining" / "PGL_lr_0.3" / "seed_0"
    bad.mkdir(parents=True)
    (bad / "fail").touch()
    with pytest.raises(ChildProcessError, match="2 of 8 runs failed"):
        run_study(path, tmp_path / "out", overrides={"pretraining#learning_rates": [0.3, 1.0]})
    rows = (tmp_path / "out" / "learning_rates.csv").read_text().splitlines()
    assert [row.partition(",")[2].split(",")[0] for row in rows[1:]] == ["1", "0.3"]
    assert [row.rpartition(",")[2] for row in rows[1:]] == ["True", "False"]
    assert rows[2].split(",")[3] == "failed"
    assert "<td>failed</td>" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "fine_tuning" / "PGL_lr_1" / "3_cases" / "seed_1" / "run.json").is_file()


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failed_run_does_not_stop_the_others(fast, path, tmp_path):
    bad = tmp_path / "out" / "pretraining" / "PGL" / "seed_0"
    bad.mkdir(parents=True)
    (bad / "fail").touch()
    with pytest.raises(ChildProcessError, match="2 of 6 runs failed") as caught:
        run_study(path, tmp_path / "out")
    message = str(caught.value)
    assert "pretraining/PGL/seed_0: training ended with status 1: error: the disk is on fire" in message
    assert str(bad / "log.txt") in message
    assert "fine_tuning/PGL/3_cases/seed_0: its pre-training failed" in message
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Not finished, and missing here: PGL, pre-training, seed 0; PGL, 3" in table
    assert "| PGL |" in table  # of the other seed
    (bad / "fail").unlink()
    run_study(path, tmp_path / "out")
    assert "Not finished" not in (tmp_path / "out" / "table.md").read_text()


def test_a_command_that_leaves_nothing_has_failed(fast, path, tmp_path, monkeypatch):
    monkeypatch.setattr("pgl_ext.tools.study.runner.bundle_command", lambda *_: [sys.executable, "-c", ""])
    with pytest.raises(ChildProcessError, match=r"it did not leave what it should: .*pgl_encoder\.json"):
        run_study(path, tmp_path / "out", overrides={"seeds": [0]})


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("print('10 %\\r20 %'); raise ValueError('what')", "ValueError: what"),
        (
            "import sys; sys.stderr.write('\\nerror: no scans\\n(set PGL_TRACEBACK=1)\\n'); sys.exit(1)",
            "error: no scans",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "status -9"),
    ],
)
def test_the_last_error_is_told(fast, path, tmp_path, monkeypatch, output, reason):
    monkeypatch.setattr("pgl_ext.tools.study.runner.bundle_command", lambda *_: [sys.executable, "-c", output])
    with pytest.raises(ChildProcessError) as caught:
        run_study(path, tmp_path / "out", overrides={"seeds": [0]})
    assert reason in str(caught.value)


# --- stopped and killed ---------------------------------------------------------------------------------------------


def test_killed_at_random_moments(fast, path, tmp_path):
    """SIGKILL of the study alone, or with what it runs: in the end, the scores are those of an undisturbed one."""
    kept = {"fine_tuning#settings#kept_steps": [3, 6]}
    run_study(path, tmp_path / "straight", jobs=2, overrides=kept)
    expected, out, draw = scores(tmp_path / "straight"), tmp_path / "killed", random.Random(0)
    kills = 0
    for _ in range(8):
        process = in_background(path, out, jobs=2, overrides=kept)
        process.join(draw.uniform(0.3, 1.5))
        kills += process.exitcode is None
        kill(process, with_children=draw.random() < 0.5)
    assert kills >= 3
    run_study(path, out, jobs=2, overrides=kept)
    assert scores(out) == expected
    assert "curves.csv" in expected
    assert not list(tmp_path.rglob("overlap"))


def test_what_a_killed_study_left_running_is_waited_for(fast, path, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN_PAUSE", "0.5")
    process = in_background(path, tmp_path / "out")
    wait_for(lambda: list(tmp_path.rglob("running")))
    (orphan,) = children(process.pid)
    kill(process, with_children=False)
    assert Path(f"/proc/{orphan}").exists()
    capfd.readouterr()
    monkeypatch.delenv("STAND_IN_PAUSE")
    run_study(path, tmp_path / "out")
    assert "waiting for random, 3 labelled cases, seed 0" in capfd.readouterr().out
    assert not list(tmp_path.rglob("overlap"))


def test_two_studies_share_the_work(fast, path, tmp_path):
    processes = [in_background(path, tmp_path / "out") for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert not list(tmp_path.rglob("overlap"))
    # Each run was trained once.
    assert {log.read_text().count("stand_in.py training") for log in tmp_path.rglob("log.txt")} == {1}


def test_sigterm_ends_what_is_running_after_a_checkpoint(fast, path, tmp_path):
    process = in_background(path, tmp_path / "out", jobs=2)
    wait_for(lambda: len(list(tmp_path.rglob("checkpoint_*.pt"))) >= 2)
    running = children(process.pid)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    assert running
    assert not any(Path(f"/proc/{child}").exists() for child in running)
    run_study(path, tmp_path / "out")


def test_a_stopped_study_tells_what_is_finished(fast, path, tmp_path):
    out = tmp_path / "out"
    process = in_background(path, out, jobs=1)
    wait_for(lambda: list(out.glob("fine_tuning/*/*/*/run.json")))
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    assert "Not finished, and missing here:" in (out / "table.md").read_text()


# --- versions -------------------------------------------------------------------------------------------------------


def test_runs_of_other_settings_are_refused(fast, path, tmp_path, capsys):
    run_study(path, tmp_path / "out", overrides={"seeds": [0]})
    capsys.readouterr()
    with pytest.raises(ValueError, match="runs were started with other code or settings") as caught:
        run_study(path, tmp_path / "out", overrides={"fine_tuning#settings#max_epochs": 7})
    assert "    training max_epochs: 20 -> 7" in str(caught.value)
    assert "pretraining" not in str(caught.value).split("\nResults")[0]
    assert capsys.readouterr().out == ""  # before anything is run


def test_a_change_while_the_study_runs_is_noticed(fast, path, tmp_path, monkeypatch):
    looks = iter(["old"] * 6)  # of the study at its six runs, before any is started
    monkeypatch.setattr(
        "pgl_ext.tools.study.fingerprint.code_digests", lambda _: {"pgl_ext.losses": next(looks, "changed")}
    )
    with pytest.raises(ChildProcessError, match=r"there was a change: \['code of pgl_ext.losses'\]"):
        run_study(path, tmp_path / "out")
    assert not list(tmp_path.rglob("started.json"))


def test_a_change_while_a_run_goes_on_is_noticed(path, tmp_path, monkeypatch):
    """The command itself changes a module on disk: training goes on with what it has read, evaluation would not."""
    module = copy_package(tmp_path, monkeypatch) / "engines.py"
    change = f"open({str(module)!r}, 'a').write('CHANGED = True\\n')"
    monkeypatch.setattr("pgl_ext.tools.study.runner.bundle_command", lambda *_: [sys.executable, "-c", change])
    overrides = {"methods": {"random": {"encoder": None}}, "seeds": [0]}
    with pytest.raises(ChildProcessError, match=r"there was a change: \['code of pgl_ext.engines'\]"):
        run_study(path, tmp_path / "out", overrides=overrides)
    (log,) = tmp_path.rglob("log.txt")
    assert log.read_text().count("CHANGED") == 1  # there was no second command


# --- commands, machines and cost ------------------------------------------------------------------------------------


def test_the_command_is_the_bundle_s(tmp_path):
    run = make_study(tmp_path).fine_tuning("PGL", 3, 0)
    run.folder.mkdir(parents=True)
    run.start(FINGERPRINT, 1)
    command = bundle_command(run, run.commands[0])
    assert command[:6] == [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file"]
    files = [str(SEGMENTATION_CONFIGS / name) for name in ("train.json", "tasks/phantom.yaml", "small.yaml")]
    assert command[6:] == [str([*files, *(str(run.folder / f"training_{n}.json") for n in (3, 4))])]
    assert json.loads((run.folder / "training_4.json").read_text())["labelled_cases"] == 3
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "checkpoint_00000003.pt").touch()
    assert bundle_command(run, run.commands[0])[7:] == ["--resume", "true"]
    evaluating = bundle_command(run, run.commands[1])
    assert evaluating[4:] == ["evaluating", "--config_file", evaluating[6]]
    assert evaluating[6] == str(
        [str(SEGMENTATION_CONFIGS / "evaluate.json"), str(run.folder / "evaluation/evaluating_1.json")]
    )


@pytest.mark.parametrize(
    ("gpus", "visible", "jobs", "expected"),
    [(0, None, 2, {None}), (2, None, 2, {"0", "1"}), (2, "4,6", 2, {"4", "6"}), (1, "GPU-5a", 2, {"GPU-5a"})],
)
def test_each_job_has_a_gpu_and_its_share_of_the_cores(
    fast, path, tmp_path, monkeypatch, gpus, visible, jobs, expected
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("pgl_ext.tools.study.runner.usable_cores", lambda: 8)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert default_jobs() == max(1, gpus)
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE")
    code = f"import os, time; time.sleep(0.5); print('found', [os.environ.get(name) for name in {names}])"
    monkeypatch.setattr("pgl_ext.tools.study.runner.bundle_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(ChildProcessError):
        run_study(path, tmp_path / "out", jobs=jobs, overrides={"methods": {"random": {"encoder": None}}})
    found = [eval(log.read_text().split("found ")[-1]) for log in tmp_path.rglob("log.txt")]
    assert {device for device, *_ in found} == expected
    assert {tuple(rest) for _, *rest in found} == {("4", "2")}


def test_no_jobs():
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        Runner([], {}, 0)


def test_cost_counts_all_times_that_a_run_was_attempted(tmp_path):
    run = make_study(tmp_path).pretraining("PGL", 0)
    run.folder.mkdir(parents=True)
    (run.folder / "models").mkdir()
    encoder = {"architecture": {"family": "resnet", "arguments": {}}, "input": {}, "steps": 5, "pairs": 80}
    (run.folder / "models" / "pgl_encoder.json").write_text(json.dumps(encoder))
    # Killed after 30 s, and then run for 90 s; the log's last line is the last sign of either.
    for start, end, cores in ((1000.0, 1030.0, 1), (2000.0, 2090.0, 5)):
        run.start(FINGERPRINT, cores)
        started = json.loads((run.folder / "started.json").read_text())
        started["attempts"][-1][0] = start
        (run.folder / "started.json").write_text(json.dumps(started))
        run.log.touch()
        os.utime(run.log, (end, end))
    run.finish("CPU-core-hours")
    assert run.result() == {"steps": 5, "pairs": 80, "seconds": 120, "cost": 0.1333, "unit": "CPU-core-hours"}


@pytest.mark.parametrize(("gpus", "jobs", "share"), [(1, 1, 1), (2, 2, 1), (4, 2, 1), (1, 2, 0.5), (2, 3, 2 / 3)])
def test_cost_is_shared_where_a_gpu_is(fast, path, tmp_path, monkeypatch, gpus, jobs, share):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    noted = Run._attempts
    monkeypatch.setattr(Run, "_attempts", lambda run: [[0.0, 7200.0, cores] for *_, cores in noted(run)])
    run_study(path, tmp_path / "out", jobs=jobs, overrides={"seeds": [0]})
    results = [json.loads(file.read_text()) for file in tmp_path.rglob("run.json")]
    assert [(result["cost"], result["unit"]) for result in results] == [(round(2 * share, 4), "GPU-hours")] * 3


def test_time_left_is_that_of_like_runs(tmp_path):
    runs = make_study(tmp_path).runs({})
    assert time_left(runs, 1) == ""
    fine_tuning, pretraining = (next(run for run in runs if run.is_pretraining is kind) for kind in (False, True))
    finish(fine_tuning, seconds=60)
    assert time_left(runs, 1) == ""  # nothing is known of pre-training
    finish(pretraining, seconds=600)
    assert time_left(runs, 1) == "17:00"  # 7 of one minute and 1 of ten
    assert time_left(runs, 8) == "10:00"  # the longest is not shared


def test_time_left_knows_the_method(tmp_path):
    methods = {"random": {"encoder": None}, "quick": {}, "slow": {}}
    runs = make_study(tmp_path, methods=methods, labelled_cases=[3]).runs({})
    for one in runs:
        if not one.is_pretraining or one.seed == 0:
            finish(one, seconds={"quick": 60, "slow": 600}.get(one.method, 1))
    assert time_left([run for run in runs if run.method != "slow"], 1) == "01:00"
    assert time_left(runs, 1) == "11:00"


# --- real bundles ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_study_killed_at_random_moments(tmp_path, monkeypatch):
    """The scores of a study that was killed five times are, bit by bit, those of one that was left alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums depend on the number of threads
    data = write_dataset(tmp_path / "phantoms", 4, test_cases=2, shape=(64, 64, 32))
    small = {"patches_per_volume": 2, "max_epochs": 4, "checkpoint_interval": 1}
    path = write_study(
        tmp_path,
        pretraining={
            "configs": ["train.json", "small.yaml"],
            "settings": {**TINY, **small, "data_list_file_path": str(data)},
        },
        fine_tuning={
            "configs": ["train.json", "tasks/phantom.yaml", "small.yaml"],
            "settings": {
                **{name: value for name, value in TINY_SEGMENTATION.items() if name != "patches_per_case"},
                **{"max_epochs": 4, "val_interval": 2, "checkpoint_interval": 1, "data_list_file_path": str(data)},
                "kept_steps": [3],
            },
            "patches_per_epoch": 8,
        },
        test={"settings": {"data_list_file_path": str(data), "data_list_key": "test"}},
        methods={"PGL": {}},
        reference="PGL",
        labelled_cases=[3],
        seeds=[0],
    )
    straight = run(["-m", "pgl_ext", "study", str(path), "--out", "straight"], cwd=tmp_path, timeout=900)
    assert straight.returncode == 0, straight.stdout[-3000:]
    out, draw = tmp_path / "killed", random.Random(1)
    signs = ("pretraining/**/started.json", "pretraining/**/checkpoint_*.pt", "pretraining/**/run.json")
    for number, sign in enumerate((*signs, "fine_tuning/**/checkpoint_*.pt", "fine_tuning/**/predictions")):
        process = in_background(path, out, jobs=1)
        wait_for(lambda sign=sign: list(out.glob(sign)), 300)
        time.sleep(draw.uniform(0, 2))
        kill(process, with_children=number % 2 == 1)
    run_study(path, out, jobs=1)
    assert scores(out) == scores(tmp_path / "straight")
    for name in ("pretraining/PGL/seed_0/models/pgl_encoder.pt", "fine_tuning/PGL/3_cases/seed_0/models/model.pt"):
        killed, undisturbed = (torch.load(folder / name, weights_only=True) for folder in (out, tmp_path / "straight"))
        assert all(torch.equal(tensor, undisturbed[key]) for key, tensor in killed.items())
