import csv
import json
import logging
import math

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.handlers import ValidationHandler
from monai.inferers import SimpleInferer
from PIL import Image

from pgl_ext import __version__
from pgl_ext.engines import SegmentationTrainer
from pgl_ext.evaluation.metrics import organ_scores
from pgl_ext.evaluation.summary import case_means
from pgl_ext.networks import SegmentationNet
from pgl_ext.segmentation.handlers import BestModel, OverlayPictures, SegmentationMetricsLog, ValidationDice
from pgl_ext.segmentation.losses import SegmentationLoss
from pgl_ext.segmentation.schedule import fine_tuning_schedule
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.masks import OrganMasksd
from pgl_ext.weights import InputRecord, ModelRecord, build_network

TASK = SegmentationTask({"liver": [1], "kidneys": [2, 3]})
NETWORK = {
    "out_channels": 3,
    "encoder": {"layers": (1, 1, 1, 1), "block": "basic", "widen_factor": 0.0625},
    "aspp_channels": 8,
    "decoder_channels": (8, 6, 4),
}
INPUT = {"hu_window": [-1024, 325], "spacing": None, "patch_size": [32, 32, 16]}


def make_network(seed: int = 0) -> SegmentationNet:
    torch.manual_seed(seed)
    return SegmentationNet(**NETWORK)


def make_optimizer(network, lr: float = 0.1, encoder_lr_factor: float = 1.0) -> torch.optim.SGD:
    """As the bundle's config does."""
    groups = network.parameter_groups(lr, encoder_lr_factor)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)


class TestSchedule:
    @pytest.mark.parametrize(("power", "frozen_steps"), [(0.9, 0), (0.9, 7), (0, 3), (2, 20), (1, 25)])
    def test_is_a_polynomial_of_the_step(self, power, frozen_steps):
        total = 20
        optimizer = make_optimizer(make_network(), lr=0.5, encoder_lr_factor=0.2)
        schedule = fine_tuning_schedule(optimizer, total, frozen_steps, power)
        for k in range(total + 3):
            expected = 0.5 * max(0, 1 - k / total) ** power
            encoder, others = (group["lr"] for group in optimizer.param_groups)
            assert others == pytest.approx(expected, abs=1e-12)
            assert encoder == pytest.approx(0.0 if k < frozen_steps else 0.2 * expected, abs=1e-12)
            optimizer.step()
            schedule.step()

    @pytest.mark.parametrize("frozen_steps", [0, 8])
    def test_warm_up_is_linear_for_the_encoder_once_it_is_not_frozen(self, frozen_steps):
        total, warmup = 40, 4
        optimizer = make_optimizer(make_network(), lr=0.5, encoder_lr_factor=0.2)
        schedule = fine_tuning_schedule(optimizer, total, frozen_steps, 0, warmup)
        rising = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
        rates = []
        for _ in range(frozen_steps + 6):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        encoder, others = zip(*rates, strict=True)
        assert others[:6] == pytest.approx([0.5 * share for share in rising])
        assert encoder == pytest.approx([0.0] * frozen_steps + [0.1 * share for share in rising])

    def test_every_parameter_is_in_one_group(self):
        network = make_network()
        encoder, others = (group["params"] for group in make_optimizer(network).param_groups)
        assert {id(p) for p in encoder} == {id(p) for p in network.encoder.parameters()}
        assert len(encoder) + len(others) == len(list(network.parameters()))

    def test_state_round_trip(self):
        def advance(schedule, optimizer, steps):
            for _ in range(steps):
                optimizer.step()
                schedule.step()
            return [group["lr"] for group in optimizer.param_groups]

        def make():
            optimizer = make_optimizer(make_network(), encoder_lr_factor=0.5)
            return fine_tuning_schedule(optimizer, 10, 4), optimizer

        schedule, optimizer = make()
        advance(schedule, optimizer, 3)
        resumed, other = make()
        other.load_state_dict(optimizer.state_dict())
        resumed.load_state_dict(schedule.state_dict())
        for _ in range(3):
            assert advance(resumed, other, 1) == advance(schedule, optimizer, 1)


def batch_of(size: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (size, 1, 4, 4, 2), generator=generator).float()
    label = torch.nn.functional.interpolate(label, size=(32, 32, 16))
    return {"image": label + 0.1 * torch.randn(label.shape, generator=generator), "label": label}


def make_trainer(network, batches: int = 3, epochs: int = 4, frozen_epochs: int = 0, **settings) -> SegmentationTrainer:
    optimizer = make_optimizer(network, settings.pop("lr", 0.1), settings.pop("encoder_lr_factor", 1.0))
    return SegmentationTrainer(
        "cpu",
        epochs,
        [batch_of(seed=seed) for seed in range(batches)],
        network,
        optimizer,
        fine_tuning_schedule(optimizer, batches * epochs, batches * frozen_epochs),
        loss_function=SegmentationLoss(TASK),
        **settings,
    )


class TestEncoder:
    def history(self, **settings) -> list[dict]:
        """All parameters before the first epoch and after each."""
        network = make_network()
        trainer = make_trainer(network, **settings)
        history = [{name: p.detach().clone() for name, p in network.named_parameters()}]
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED,
            lambda engine: history.append({name: p.detach().clone() for name, p in network.named_parameters()}),
        )
        trainer.run()
        return history

    @pytest.mark.parametrize("frozen_epochs", [0, 1, 2])
    def test_rests_for_the_first_epochs(self, frozen_epochs):
        history = self.history(frozen_epochs=frozen_epochs)
        for epoch in range(1, len(history)):
            moved = {name: not torch.equal(value, history[epoch - 1][name]) for name, value in history[epoch].items()}
            assert all(moved[name] for name in moved if not name.startswith("encoder."))
            encoder = [moved[name] for name in moved if name.startswith("encoder.")]
            assert not any(encoder) if epoch <= frozen_epochs else all(encoder)

    def test_lower_learning_rate_moves_it_less(self):
        distances = []
        for factor in (1.0, 0.1):
            first, *_, last = self.history(encoder_lr_factor=factor, lr=0.01)
            distances.append(
                math.sqrt(sum((last[k] - first[k]).square().sum() for k in first if k.startswith("encoder.")))
            )
        assert 0.02 < distances[1] / distances[0] < 0.5

    def test_training_learns(self):
        losses = []
        trainer = make_trainer(make_network(), epochs=10, lr=0.05)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: losses.append(engine.state.output[0]["loss"]))
        trainer.run()
        assert losses[-1] < 0.75 * losses[0]


class FakeEvaluator(Engine):
    """Its runs give prescribed scores."""

    def __init__(self, scores, organs: int = 2) -> None:
        super().__init__(lambda engine, batch: None)
        self.scores = list(scores)
        self.add_event_handler(Events.STARTED, self._set)
        self.state.metric_details = {}

    def _set(self, engine) -> None:
        engine.state.metrics["val_mean_dice"] = self.scores.pop(0)

    def run(self) -> None:
        super().run([0], max_epochs=1)


class Run:
    """A trainer that does nothing, validated at the end of each epoch."""

    def __init__(
        self, folder, scores, epochs: int | None = None, interval: int = 1, start: int = 0, **settings
    ) -> None:
        self.network = make_network()
        self.saved: list[int] = []
        self.trainer = Engine(self.step)
        self.evaluator = FakeEvaluator(scores)
        self.path = folder / "models" / "model.pt"
        description = {"task": TASK.description(), "network": self.network.architecture, "input": INPUT, "seed": 7}
        self.best = BestModel(self.evaluator, self.network, self.path, description, **settings)
        self.epochs = len(scores) * interval if epochs is None else epochs
        self.start = start
        self.trainer.add_event_handler(Events.STARTED, self.resume)
        self.best.attach(self.trainer)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED(every=interval), lambda engine: self.evaluator.run())
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.note)
        self.last_saved = None

    def step(self, engine, batch) -> None:
        with torch.no_grad():
            self.network.decoder.head.bias.fill_(engine.state.epoch)

    def resume(self, engine) -> None:
        if self.start:
            engine.load_state_dict({"epoch": self.start, "epoch_length": 2, "max_epochs": self.epochs})

    def note(self, engine) -> None:
        content = self.path.read_bytes() if self.path.is_file() else None
        if content != self.last_saved:
            self.saved.append(engine.state.epoch)
        self.last_saved = content

    def run(self) -> "Run":
        self.trainer.run([0, 1], max_epochs=self.epochs)
        return self


class TestBestModel:
    @pytest.mark.parametrize(
        ("scores", "saved"),
        [
            ([0.1, 0.3, 0.2, 0.3, 0.4], [1, 2, 5]),
            ([0.5, 0.4, 0.3], [1]),
            ([0.0, 0.0, 0.1], [1, 3]),
            ([math.nan, 0.1, math.nan], [2]),
            ([0.1, 0.2, 0.3], [1, 2, 3]),
        ],
        ids=str,
    )
    def test_is_written_where_it_is_better(self, tmp_path, scores, saved):
        run = Run(tmp_path, scores).run()
        assert run.saved == saved
        assert run.best.best_epoch == saved[-1]
        state = torch.load(run.path, weights_only=True)
        assert (state["decoder.head.bias"] == saved[-1]).all()

    def test_models_of_chosen_steps_are_kept(self, tmp_path):
        run = Run(tmp_path, [0.1, 0.3, 0.2], kept_steps=[2, 5, 100]).run()
        assert sorted(path.name for path in run.path.parent.glob("*.pt")) == [
            run.path.name,
            f"{run.path.stem}_step_2.pt",
            f"{run.path.stem}_step_5.pt",
        ]
        assert ModelRecord.load(run.path.with_name(f"{run.path.stem}_step_5.pt")).steps == 5

    def test_file_and_json_build_the_model(self, tmp_path):
        run = Run(tmp_path, [0.1, 0.3]).run()
        record = ModelRecord.load(run.path)
        assert record == ModelRecord(
            task=TASK.description(),
            network=run.network.architecture,
            input=InputRecord(**INPUT),
            steps=4,
            epoch=2,
            val_mean_dice=0.3,
            others={"seed": 7},
        )
        assert record.version == __version__
        network = build_network(run.path)
        for key, value in run.network.state_dict().items():
            assert torch.equal(network.state_dict()[key], value), key

    @pytest.mark.parametrize(
        ("scores", "patience", "last"),
        [
            ([0.5, 0.4, 0.4, 0.4, 0.4, 0.4], 3, 4),
            ([0.1, 0.2, 0.1, 0.3, 0.2, 0.2, 0.2], 2, 6),
            ([0.1, 0.1], 1, 2),
            # Equally good is not better.
            ([0.2, 0.2, 0.2, 0.2], 2, 3),
            ([0.5, 0.4, 0.3, 0.2], None, 4),
            ([0.5, 0.4, 0.3, 0.2], 10, 4),
        ],
    )
    def test_patience(self, tmp_path, scores, patience, last):
        run = Run(tmp_path, scores, patience=patience).run()
        assert run.trainer.state.epoch == last

    def test_patience_is_in_epochs_not_validations(self, tmp_path):
        run = Run(tmp_path, [0.5, 0.4, 0.4, 0.4], interval=5, patience=10).run()
        assert run.trainer.state.epoch == 15

    @pytest.mark.parametrize("patience", [0, -1])
    def test_impossible_patience(self, tmp_path, patience):
        with pytest.raises(ValueError, match=f"patience must be at least 1 epoch, got {patience}"):
            Run(tmp_path, [0.1], patience=patience)

    def test_a_resumed_run_remembers_the_best(self, tmp_path):
        first = Run(tmp_path, [0.1, 0.6, 0.2], epochs=3).run()
        state = json.loads(json.dumps(first.best.state_dict()))
        before = first.path.read_bytes()
        second = Run(tmp_path, [0.5, 0.7], epochs=5, start=3)
        second.best.load_state_dict(state)
        assert second.best.state_dict() == state
        second.last_saved = before
        second.run()
        assert second.saved == [5]
        assert second.best.state_dict() == {"best_score": 0.7, "best_epoch": 5, "last_epoch": 5}

    def test_a_run_that_stopped_early_is_not_trained_on(self, tmp_path):
        first = Run(tmp_path, [0.5, 0.4, 0.4, 0.4], patience=2, epochs=10).run()
        assert first.trainer.state.epoch == 3
        second = Run(tmp_path, [], patience=2, epochs=10, start=3)
        second.best.load_state_dict(first.best.state_dict())
        before = first.path.read_bytes()
        second.run()
        assert second.trainer.state.epoch == 3
        assert second.trainer.state.iteration == 6
        assert first.path.read_bytes() == before
        # With more patience it goes on.
        third = Run(tmp_path, [0.4, 0.4], patience=4, epochs=10, start=3)
        third.best.load_state_dict(first.best.state_dict())
        assert third.run().trainer.state.epoch == 5

    @pytest.mark.parametrize(("launched", "rank"), [("0", 1), ("1", None)])
    def test_other_ranks_decide_alike_and_write_nothing(self, tmp_path, monkeypatch, launched, rank):
        """What is not given is that of torchrun."""
        monkeypatch.setenv("RANK", launched)
        run = Run(tmp_path, [0.5, 0.4, 0.3, 0.2], patience=2, rank=rank).run()
        assert run.trainer.state.epoch == 3
        assert list(tmp_path.iterdir()) == []

    def test_without_validation_it_is_the_last_model(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO, logger="pgl_ext"):
            run = Run(tmp_path, [], epochs=3, interval=10).run()
        assert (torch.load(run.path, weights_only=True)["decoder.head.bias"] == 3).all()
        # Strictly JSON, which knows no infinity.
        described = json.loads(run.path.with_suffix(".json").read_text(), parse_constant=pytest.fail)
        assert (described["epoch"], described["steps"]) == (3, 6)
        assert described["val_mean_dice"] is None
        assert ModelRecord.load(run.path).task == TASK.description()
        assert "there was no validation" in caplog.text

    def test_a_run_that_was_interrupted_before_validation_has_no_model(self, tmp_path):
        run = Run(tmp_path, [], epochs=3, interval=10)
        run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate())
        run.run()
        assert not run.path.exists()

    def test_says_how_it_ended(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO, logger="pgl_ext"):
            run = Run(tmp_path, [0.5, 0.4, 0.4], patience=2).run()
        assert "early stopping at epoch 3: the best val_mean_dice, 0.5000, was that of epoch 1" in caplog.text
        assert f"best model, val_mean_dice 0.5000 of epoch 1: {run.path}" in caplog.text


CASES = [
    {"image": batch_of(1, seed)["image"][0], "label": torch.where(label > 1, 0, label)}
    for seed, label in ((seed, batch_of(1, seed)["label"][0]) for seed in (7, 8))
]
# The second case has the kidneys as well.
CASES[1]["label"] = batch_of(1, 8)["label"][0]


def make_evaluator(network) -> SupervisedEvaluator:
    """As the bundle's config does."""
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(CASES), batch_size=1),
        network=network,
        inferer=SimpleInferer(),
        postprocessing=OrganMasksd(TASK),
        key_val_metric={"val_mean_dice": ValidationDice()},
    )


def dice(prediction: torch.Tensor, reference: torch.Tensor) -> float:
    return float(2 * (prediction & reference).sum() / (prediction.sum() + reference.sum()))


class TestValidationDice:
    """Against what an evaluation finds of the same masks, case by case."""

    ORGANS = SegmentationTask({"a": [1], "b": [2], "c": [3]}, multi_label=True)
    # By case, for each organ: whether it is in the reference, in the prediction, and annotated.
    SITUATIONS = (
        ((1, 1, 1), (1, 0, 1), (0, 1, 1)),
        ((0, 0, 1), (1, 1, 1), (0, 1, 0)),
        ((1, 1, 0), (0, 0, 0), (1, 1, 1)),
        ((0, 0, 1), (0, 0, 1), (1, 1, 0)),
    )

    def cases(self, annotated: bool = True) -> list[dict]:
        """The image of a case is its logits."""
        generator = torch.Generator().manual_seed(0)
        cases = []
        for situation in self.SITUATIONS:
            label = torch.randint(1, 4, (1, 6, 5, 4), generator=generator)
            logits = torch.randn(3, 6, 5, 4, generator=generator)
            for channel, (expected, predicted, _) in enumerate(situation):
                label[(label == channel + 1) & (not expected)] = 0
                logits[channel] -= 0.0 if predicted else 100.0
            case = {"image": logits, "label": label.float()}
            cases.append(case | ({"annotated": torch.tensor(situation)[:, 2].bool()} if annotated else {}))
        return cases

    @pytest.mark.parametrize("annotated", [True, False])
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_is_that_of_an_evaluation(self, annotated, batch_size):
        cases = self.cases(annotated)
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(Dataset(cases), batch_size=batch_size),
            network=torch.nn.Identity(),
            inferer=SimpleInferer(),
            postprocessing=OrganMasksd(self.ORGANS),
            key_val_metric={"val_mean_dice": ValidationDice()},
        )
        rows = [
            {"case": number, **organ_scores(logits.numpy() > 0, label.numpy() == channel + 1, (1, 1, 1), known)}
            for number, case in enumerate(cases)
            for channel, (logits, label, known) in enumerate(
                zip(case["image"], case["label"].expand(3, -1, -1, -1), case.get("annotated", [True] * 3), strict=True)
            )
        ]
        assert {"ok", "missed", "spurious", "absent"} <= {row["status"] for row in rows}
        averages = [value for value in case_means(rows, "dice").values() if not math.isnan(value)]
        # A second run starts anew.
        for _ in range(2):
            evaluator.run()
            details = evaluator.state.metric_details["val_mean_dice"]
            assert details.flatten().tolist() == pytest.approx([row["dice"] for row in rows], nan_ok=True)
            assert evaluator.state.metrics["val_mean_dice"] == pytest.approx(sum(averages) / len(averages))
            assert evaluator.state.best_metric == evaluator.state.metrics["val_mean_dice"]


def test_validation_log_and_pictures(tmp_path):
    """What is written of a validation, against Dice by hand."""
    network = make_network()
    evaluator = make_evaluator(network)
    trainer = make_trainer(network, batches=2, epochs=2, lr=0.01)
    log = SegmentationMetricsLog(tmp_path, evaluator, patches_per_epoch=4, task=TASK, interval=1)
    expected = []

    def by_hand(engine) -> None:
        with torch.no_grad():
            labels = [(network.eval()(c["image"][None])[0].argmax(0), c["label"][0]) for c in CASES]
        livers = [dice(p == 1, r == 1) for p, r in labels]
        # The first case has no kidneys.
        kidneys = [dice(p >= 2, r >= 2) for p, r in labels if bool(((p >= 2) | (r >= 2)).any())]
        expected.append([sum(livers) / 2, sum(kidneys) / len(kidneys)])

    log.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, by_hand)
    OverlayPictures(evaluator, tmp_path, TASK, interval=1).attach(trainer)
    ValidationHandler(1, evaluator).attach(trainer)
    trainer.run()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["loss"]] == ["1", "2", "3", "4"]
    validated = [row for row in rows if row["val_mean_dice"]]
    assert [row["step"] for row in validated] == ["2", "4"]
    for row, values in zip(validated, expected, strict=True):
        assert [float(row["val_dice_liver"]), float(row["val_dice_kidneys"])] == pytest.approx(values, abs=1e-4)
        assert 0 < float(row["val_mean_dice"]) < 1
    for name in ("metrics.png", "overlay.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100
    assert list((tmp_path / "tensorboard").iterdir())


def test_an_organ_without_a_score_leaves_its_cell_empty(tmp_path):
    evaluator = FakeEvaluator([0.5])
    evaluator.state.metric_details["val_mean_dice"] = torch.tensor([[0.5, math.nan], [0.7, math.nan]])
    log = SegmentationMetricsLog(tmp_path, evaluator, patches_per_epoch=4, task=TASK)
    evaluator.state.metrics = {"val_mean_dice": 0.6}
    assert log.validation_metrics(evaluator, Engine(lambda *_: None)) == {
        "val_mean_dice": 0.6,
        "val_dice_liver": pytest.approx(0.6),
    }


class TestOverlayPictures:
    @pytest.mark.parametrize(("interval", "drawn"), [(1, [1, 2, 3, 4, 5, 6]), (2, [1, 3, 5, 6]), (5, [1, 6])])
    def test_interval(self, tmp_path, monkeypatch, interval, drawn):
        network = make_network()
        evaluator = make_evaluator(network)
        trainer = make_trainer(network, batches=1, epochs=6, lr=0.0)
        pictures = OverlayPictures(evaluator, tmp_path, TASK, interval=interval)
        steps = []
        monkeypatch.setattr(pictures, "_draw", lambda engine: steps.append(engine.state.epoch))
        pictures.attach(trainer)
        ValidationHandler(1, evaluator).attach(trainer)
        trainer.run()
        # The end is drawn in any case.
        assert sorted(set(steps)) == drawn

    def test_without_a_validation_there_is_nothing_to_draw(self, tmp_path):
        network = make_network()
        trainer = make_trainer(network, batches=1, epochs=1)
        OverlayPictures(make_evaluator(network), tmp_path, TASK).attach(trainer)
        trainer.run()
        assert not (tmp_path / "overlay.png").exists()

    def test_are_drawn_in_the_first_process(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        network = make_network()
        evaluator = make_evaluator(network)
        trainer = make_trainer(network, batches=1, epochs=1)
        OverlayPictures(evaluator, tmp_path, TASK, interval=1).attach(trainer)
        ValidationHandler(1, evaluator).attach(trainer)
        trainer.run()
        assert evaluator.state.output
        assert list(tmp_path.iterdir()) == []
