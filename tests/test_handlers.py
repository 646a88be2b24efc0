import csv
import logging
import math
import os

import pytest
import torch
from ignite.engine import Engine, Events
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from pgl_ext import handlers
from pgl_ext.engines import PretrainTrainer
from pgl_ext.figures.curves import plot_metrics
from pgl_ext.handlers import CollapseWarning, PretrainMetricsLog, ProgressBar, TargetEMA, ViewPictures
from pgl_ext.methods import Method


class Pair(nn.Module):
    """An online and a target module with batch norm, far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = (nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)) for _ in range(2))
        with torch.no_grad():
            for online, target in zip(self.online.parameters(), self.target.parameters(), strict=True):
                online.fill_(1.0)
                target.fill_(3.0)
        self.target[1].running_mean.fill_(7.0)
        self.target[1].num_batches_tracked.fill_(5)

    def momentum_pairs(self):
        yield self.online, self.target


def tau(step: int, steps: int, base: float = 0.996) -> float:
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


def run_engine(steps: int, *attached, process=lambda engine, batch: None, epochs: int = 1) -> Engine:
    engine = Engine(process)
    for handler in attached:
        handler.attach(engine)
    engine.run(range(steps), max_epochs=epochs)
    return engine


class TestTargetEMA:
    def test_follows_the_formula(self):
        pair = Pair()
        ema = TargetEMA(pair, total_steps=8, base_momentum=0.5)
        values = []
        engine = Engine(lambda engine, batch: None)
        ema.attach(engine)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda e: values.append((e.state.metrics["tau"], float(pair.target[0].weight.detach()[0]))),
        )
        engine.run(range(4), max_epochs=2)
        expected = 3.0
        for step, (momentum, value) in enumerate(values):
            assert momentum == pytest.approx(tau(step, 8, 0.5))
            expected = tau(step, 8, 0.5) * expected + (1 - tau(step, 8, 0.5)) * 1.0
            assert value == pytest.approx(expected, rel=1e-5)
        assert len(values) == 8
        assert torch.equal(pair.online[0].weight, torch.ones(2, 1, 1, 1, 1))

    @pytest.mark.parametrize(("step", "expected"), [(0, 0.996), (50, 0.998), (100, 1.0), (120, 1.0)])
    def test_rises_from_the_base_to_1(self, step, expected):
        ema = TargetEMA(Pair(), total_steps=100)
        ema.load_state_dict({"step": step})
        assert ema.momentum == pytest.approx(expected, abs=1e-12)

    def test_never_falls(self):
        ema = TargetEMA(Pair(), total_steps=30)
        values = []
        for ema.step in range(31):
            values.append(ema.momentum)
        assert values == sorted(values)

    def test_buffers_stay(self):
        pair = Pair()
        run_engine(3, TargetEMA(pair, 3, base_momentum=0.1))
        assert pair.target[1].running_mean.tolist() == [7.0, 7.0]
        assert int(pair.target[1].num_batches_tracked) == 5
        assert pair.target[1].weight.detach().max() < 3

    def test_state_dict_round_trip(self):
        first, second = TargetEMA(Pair(), 10), TargetEMA(Pair(), 10)
        run_engine(4, first)
        second.load_state_dict(first.state_dict())
        assert second.momentum == first.momentum == pytest.approx(tau(4, 10))

    def test_in_a_trainer_it_follows_pgl_after_each_step(self, make_pgl, make_batch):
        method = make_pgl()
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
        ema = TargetEMA(method, 2, base_momentum=0.25)
        weight = method.target_encoder.conv1.weight
        start = weight.detach().clone()
        trainer = PretrainTrainer("cpu", 1, [make_batch(2)], method, optimizer, train_handlers=[ema])
        trainer.run()
        # tau = base at the first step, and the online weights are those after the optimiser's step.
        expected = 0.25 * start + 0.75 * method.encoder.conv1.weight.detach()
        assert torch.allclose(weight, expected, atol=1e-6)
        assert not torch.allclose(weight, start)
        assert ema.step == 1
        assert trainer.state.metrics["tau"] == pytest.approx(0.25)

    def test_a_method_without_a_target_has_no_tau(self, tmp_path):
        ema = TargetEMA(Method(), 4)
        log = PretrainMetricsLog(tmp_path, Engine(lambda engine, batch: None), pairs_per_epoch=4, interval=1)
        engine = run_engine(4, ema, log, process=lambda engine, batch: engine.state.metrics.update(lr=0.1, loss=1.0))
        assert ema.step == 4
        assert "tau" not in engine.state.metrics
        assert {(row["lr"], row["tau"]) for row in read_rows(tmp_path / "metrics.csv")} == {("0.1", "")}

    @pytest.mark.parametrize(
        ("arguments", "message"), [((0,), "total_steps"), ((10, 1.5), "base_momentum"), ((10, -0.1), "base_momentum")]
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            TargetEMA(Pair(), *arguments)


def read_rows(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class TestPretrainMetricsLog:
    validation = {  # noqa: RUF012
        "val_loss": 2.5,
        "val_feature_std": 0.2,
        "val_retrieval_top1": 0.25,
        "val_retrieval_chance": 0.125,
        "val_extra": 1.0,
    }

    @pytest.fixture(autouse=True)
    def _no_picture(self, monkeypatch):
        # Drawing takes longer than all else.
        monkeypatch.setattr("pgl_ext.figures.curves.plot_metrics", lambda *args, **kwargs: None)

    def run(
        self, folder, steps: range, validate_at: tuple = (0,), state: dict | None = None, **settings
    ) -> PretrainMetricsLog:
        """Log a run of 4 steps per epoch whose loss is 8 - step."""

        def process(engine, batch):
            step = engine.state.iteration
            engine.state.metrics.update(loss=8.0 - step, feature_std=0.25, lr=0.1, tau=0.996, read_errors=0, extra=3.0)

        def validate(engine):
            if engine.state.iteration in validate_at:
                evaluator.run([0])

        evaluator = Engine(lambda engine, batch: None)
        top1 = 0.25 if steps.start == 0 else 0.75
        evaluator.add_event_handler(
            Events.COMPLETED, lambda e: e.state.metrics.update({**self.validation, "val_retrieval_top1": top1})
        )
        engine = Engine(process)
        log = PretrainMetricsLog(folder, evaluator, pairs_per_epoch=8, **{"interval": 2, **settings})
        if state is not None:
            log.load_state_dict(state)
        epochs = steps.stop // 4
        engine.add_event_handler(
            Events.STARTED,
            lambda e: e.load_state_dict({"iteration": steps.start, "epoch_length": 4, "max_epochs": epochs}),
        )
        log.attach(engine)
        engine.add_event_handler(Events.STARTED, validate)
        engine.add_event_handler(Events.EPOCH_COMPLETED, validate)
        engine.run(range(4), max_epochs=epochs)
        return log

    def test_rows(self, tmp_path):
        self.run(tmp_path / "out", range(0, 8), validate_at=(0, 4))
        rows = read_rows(tmp_path / "out" / "metrics.csv")
        training = [row for row in rows if row["loss"]]
        assert [int(row["step"]) for row in training] == [2, 4, 6, 8]
        assert [int(row["epoch"]) for row in training] == [1, 1, 2, 2]
        assert [float(row["loss"]) for row in training] == [6, 4, 2, 0]
        assert training[0]["lr"] == "0.1"
        assert {row["val_loss"] for row in training} == {""}
        validation = [row for row in rows if row["val_loss"]]
        assert [(int(row["step"]), float(row["val_retrieval_untrained"])) for row in validation] == [
            (0, 0.25),
            (4, 0.25),
        ]
        assert {row["loss"] for row in validation} == {""}

    def test_columns_of_a_method(self, tmp_path):
        self.run(tmp_path, range(0, 4), logged=("extra", "never"))
        row = next(row for row in read_rows(tmp_path / "metrics.csv") if row["loss"])
        assert (row["extra"], row["never"]) == ("3", "")

    def test_picture_at_the_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr("pgl_ext.figures.curves.plot_metrics", plot_metrics)
        self.run(tmp_path, range(0, 4), healthy_std=0.25)
        assert imread(tmp_path / "metrics.png").std() > 0

    def test_no_picture_of_a_run_that_ends_before_its_first_row(self, tmp_path, monkeypatch):
        monkeypatch.setattr("pgl_ext.figures.curves.plot_metrics", plot_metrics)
        self.run(tmp_path, range(0, 4), validate_at=(), interval=10)
        assert read_rows(tmp_path / "metrics.csv") == []
        assert not (tmp_path / "metrics.png").exists()

    def test_tensorboard(self, tmp_path):
        self.run(tmp_path, range(0, 8), validate_at=(0, 8))
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        loss = events.Scalars("training/loss")
        assert [(event.step, event.value) for event in loss] == [(2, 6), (4, 4), (6, 2), (8, 0)]
        assert [event.step for event in events.Scalars("validation/retrieval_top1")] == [0, 8]
        # What has no column in the CSV.
        assert "training/extra" in events.Tags()["scalars"]
        assert "validation/extra" in events.Tags()["scalars"]

    def test_a_resumed_run_replaces_the_later_rows(self, tmp_path):
        log = self.run(tmp_path, range(0, 8))
        untouched = read_rows(tmp_path / "metrics.csv")[:3]
        resumed = self.run(tmp_path, range(4, 12), validate_at=(12,), state=log.state_dict())
        rows = read_rows(tmp_path / "metrics.csv")
        assert rows[:3] == untouched
        assert [int(row["step"]) for row in rows if row["loss"]] == [2, 4, 6, 8, 10, 12]
        # The untrained encoder's retrieval is that of the first run.
        assert resumed.untrained == 0.25
        assert [float(row["val_retrieval_untrained"]) for row in rows if row["val_loss"]] == [0.25, 0.25]
        assert float(rows[-1]["val_retrieval_top1"]) == 0.75
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("training/loss")] == [2, 4, 6, 8, 10, 12]

    def test_a_new_run_starts_a_new_file(self, tmp_path):
        for _ in range(2):
            self.run(tmp_path, range(0, 4))
        assert [int(row["step"]) for row in read_rows(tmp_path / "metrics.csv")] == [0, 2, 4]

    def test_other_ranks_write_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        self.run(tmp_path / "out", range(0, 4))
        assert not (tmp_path / "out").exists()

    def test_speed(self, tmp_path, monkeypatch):
        # Half a second per step of two pairs.
        ticks = iter(range(1000))
        monkeypatch.setattr(handlers.time, "perf_counter", lambda: next(ticks) * 0.5)
        self.run(tmp_path, range(0, 16), validate_at=())
        rows = read_rows(tmp_path / "metrics.csv")
        speeds = [float(row["pairs_per_s"]) for row in rows if row["pairs_per_s"]]
        assert speeds
        # Reading the clock twice where a measurement ends moves the fake time on: between 2 and 4 pairs per second.
        assert all(2 <= speed <= 4 for speed in speeds)


class TestCollapseWarning:
    def warnings(self, caplog, values: list[float], **settings) -> list[int]:
        """Steps at which a warning was logged."""
        caplog.clear()
        steps = []

        def process(engine, batch):
            engine.state.metrics["feature_std"] = values[engine.state.iteration - 1]

        engine = Engine(process)
        CollapseWarning(healthy_std=0.25, **settings).attach(engine)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda e: steps.append(e.state.iteration) if len(caplog.records) > len(steps) else None,
        )
        with caplog.at_level(logging.WARNING, logger="pgl_ext"):
            engine.run(range(len(values)))
        return steps

    def test_warns_after_patience_and_not_before(self, caplog):
        assert self.warnings(caplog, [0.01] * 19) == []
        assert self.warnings(caplog, [0.01] * 25) == [20]
        assert "COLLAPSING" in caplog.text
        assert "0.01000 at step 20, healthy is about 0.25000" in caplog.text
        assert "micro_batch_size" in caplog.text

    def test_is_repeated_ten_times_more_rarely(self, caplog):
        assert self.warnings(caplog, [0.0] * 45, patience=2) == [2, 20, 40]

    def test_healthy_steps_start_the_count_anew(self, caplog):
        assert self.warnings(caplog, [0.01, 0.01, 0.2] * 10, patience=3) == []
        assert self.warnings(caplog, [0.2, 0.01, 0.01, 0.01, 0.2], patience=3) == [4]

    def test_comes_from_the_first_process(self, caplog, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        assert self.warnings(caplog, [0.0] * 45, patience=2) == []

    @pytest.mark.parametrize(("value", "expected"), [(0.051, []), (0.049, [3])])
    def test_a_fifth_of_the_healthy_value_is_the_limit(self, caplog, value, expected):
        assert self.warnings(caplog, [value] * 3, patience=3) == expected


def test_view_pictures(tmp_path, make_batch):
    batch = make_batch(2)
    engine = Engine(lambda engine, batch: None)
    ViewPictures(tmp_path, interval=2).attach(engine)
    drawn = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: drawn.append((tmp_path / "views.png").stat().st_mtime_ns)
    )
    engine.run([batch], max_epochs=2)
    assert imread(tmp_path / "views.png").std() > 0.05
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    # At the first step, and after every second epoch.
    assert [event.step for event in events.Images("views")] == [1, 2]


def test_view_pictures_are_drawn_in_the_first_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run_engine(2, ViewPictures(tmp_path / "out", interval=1))
    assert not (tmp_path / "out").exists()


class TestProgressBar:
    @pytest.fixture
    def bars(self, monkeypatch):
        made = []

        class Bar(handlers.tqdm):
            def __init__(self, **settings):
                super().__init__(**settings, file=open(os.devnull, "w"))  # noqa: SIM115
                self.closed = False
                made.append(self)

            def close(self):
                self.closed = True
                super().close()

        monkeypatch.setattr(handlers, "tqdm", Bar)
        return made

    def test_counts_all_steps(self, bars):
        def process(engine, batch):
            engine.state.metrics.update(loss=1.23456, lr=0.1, other=5)

        run_engine(3, ProgressBar(), process=process, epochs=2)
        assert (bars[0].total, bars[0].n, bars[0].closed) == (6, 6, True)
        assert bars[0].postfix == "loss=1.235, lr=0.1"

    @pytest.mark.parametrize("rank", ["0", "1"])
    def test_there_is_one_in_the_first_process(self, bars, monkeypatch, rank):
        monkeypatch.setenv("RANK", rank)
        run_engine(3, ProgressBar())
        assert len(bars) == (rank == "0")

    def test_closes_on_an_error_and_passes_it_on(self, bars):
        def process(engine, batch):
            if batch == 1:
                raise ZeroDivisionError("in step 2")

        with pytest.raises(ZeroDivisionError, match="in step 2"):
            run_engine(3, ProgressBar(), process=process)
        assert bars[0].closed

    def test_an_error_before_the_start_is_passed_on(self):
        def fail(engine):
            raise FileExistsError("already there")

        engine = Engine(lambda engine, batch: None)
        engine.add_event_handler(Events.STARTED, fail)
        ProgressBar().attach(engine)
        with pytest.raises(FileExistsError, match="already there"):
            engine.run([0])
