import itertools
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.handlers import from_engine
from programs import CONFIGS, SEGMENTATION_CONFIGS
from torch import nn

from pgl_ext.checkpoints import CheckpointHandler
from pgl_ext.data.dataset import EpochBatchSampler
from pgl_ext.engines import PretrainEvaluator, PretrainTrainer, SegmentationTrainer, TrainerEvents
from pgl_ext.handlers import TargetEMA
from pgl_ext.methods import Method
from pgl_ext.networks.base import FeatureNetwork
from pgl_ext.retrieval import correspondence_retrieval


class ToyEncoder(FeatureNetwork, nn.Conv3d):
    """One convolution: without batch norm, each sample's gradient is its own."""

    family, arguments, encoder_parts = "toy", {}, ()
    level_strides, level_channels, centres = ((2, 2, 2),), (3,), ((0, 0, 0),)

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(1, 3, kernel_size=3, stride=2, padding=1)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [nn.Conv3d.forward(self, x)]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.features(x)


class ToyMethod(Method):
    """Pulls features towards 1; a target copy follows by momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ToyEncoder()
        self.target = ToyEncoder().requires_grad_(False)

    def forward(self, batch):
        features = self.encoder(batch["views"].flatten(0, 1))[-1]
        loss = (features.float() - 1).square().mean()
        return {"loss": loss, "feature_std": loss.detach() + batch["affines"].to(loss).mean()}

    def momentum_pairs(self):
        yield self.encoder, self.target


def toy_batch(size: int = 4, seed: int = 0) -> dict:
    views = torch.randn(size, 2, 1, 8, 8, 4, generator=torch.Generator().manual_seed(seed))
    return {"views": views, "affines": torch.eye(4).repeat(size, 2, 1, 1)}


def make_trainer(batches, epochs: int = 1, method: Method | None = None, lr: float = 0.1, **settings):
    method = ToyMethod() if method is None else method
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr)
    return PretrainTrainer("cpu", epochs, batches, method, optimizer, **settings)


def weights(method: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in method.parameters()]


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def _keep_signal_handler():
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


class TestIteration:
    @pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
    def test_is_one_optimiser_step(self, micro_batch_size):
        trainer = make_trainer([toy_batch(4, i) for i in range(3)], epochs=2, micro_batch_size=micro_batch_size)
        steps, events = [], []
        trainer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.state.iteration))
        trainer.add_event_handler(TrainerEvents.OPTIMIZER_STEP_COMPLETED, lambda e: events.append(e.state.iteration))
        trainer.run()
        assert steps == events == [1, 2, 3, 4, 5, 6]

    def test_is_plain_gradient_descent(self):
        batches = [toy_batch(4, i) for i in range(3)]
        trainer = make_trainer(batches)
        trainer.run()
        method = ToyMethod()
        for batch in batches:
            gradients = torch.autograd.grad(method(batch)["loss"], list(method.encoder.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(method.encoder.parameters(), gradients, strict=True):
                    parameter -= 0.1 * gradient
        for a, b in zip(trainer.network.parameters(), method.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-7)

    def test_steps_the_schedule_once_and_logs_the_rate_of_each_step(self):
        trainer = make_trainer([toy_batch()] * 3)
        trainer.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
        used, logged = [], []
        trainer.optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[-1]["lr"]))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: logged.append(e.state.metrics["lr"]))
        trainer.run()
        assert logged == used == pytest.approx([0.1, 0.05, 0.025])

    def test_output_and_metrics(self):
        batch = toy_batch()
        trainer = make_trainer([batch], lr=0.0)
        trainer.run()
        expected = ToyMethod()(batch)
        assert [type(o) for o in trainer.state.output] == [dict]
        output = trainer.state.output[0]
        assert output == {key: pytest.approx(float(value.detach()), abs=1e-6) for key, value in expected.items()}
        assert all(type(value) is float for value in output.values())
        assert from_engine(["loss"], first=True)(trainer.state.output) == output["loss"]
        assert trainer.state.metrics == {**output, "lr": 0.0, "read_errors": 0}

    def test_trains_pgl(self, make_pgl, make_batch):
        method = make_pgl()
        before = weights(method.encoder)
        make_trainer([make_batch(2)], method=method.eval()).run()
        assert not equal(before, weights(method.encoder))
        assert method.training
        assert method.target_encoder.training

    def test_read_errors_are_counted(self):
        batches = [{**toy_batch(), "read_errors": torch.tensor(errors)} for errors in ([0, 0, 0, 0], [2, 0, 1, 0])]
        trainer = make_trainer(batches, epochs=2)
        trainer.run()
        assert trainer.read_errors == trainer.state.metrics["read_errors"] == 6


class TestGradientAccumulation:
    @pytest.mark.parametrize(("size", "micro_batch_size"), [(4, 2), (4, 1), (5, 2), (7, 3), (3, 8)])
    def test_gives_the_step_of_the_whole_batch(self, size, micro_batch_size):
        batch = toy_batch(size)
        # Samples differ in scale, so that a wrong weight of an uneven micro-batch shows.
        batch["views"] *= torch.arange(1.0, size + 1).view(-1, 1, 1, 1, 1, 1)
        whole, parts = make_trainer([batch], lr=1e-3), make_trainer([batch], lr=1e-3, micro_batch_size=micro_batch_size)
        whole.run()
        parts.run()
        for a, b in zip(whole.network.encoder.parameters(), parts.network.encoder.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6)
            assert torch.allclose(a, b, atol=1e-6)
        assert parts.state.output[0] == {k: pytest.approx(v, rel=1e-5) for k, v in whole.state.output[0].items()}

    @pytest.mark.parametrize(
        ("size", "micro_batch_size", "expected"), [(5, 2, [2, 1, 2]), (4, 4, [4]), (9, 4, [3] * 3)]
    )
    def test_micro_batches_are_even_and_no_larger_than_asked(self, size, micro_batch_size, expected):
        sizes = []

        class Recording(ToyMethod):
            def forward(self, batch):
                sizes.append(len(batch["views"]))
                assert len(batch["affines"]) == sizes[-1]
                return super().forward(batch)

        make_trainer([toy_batch(size)], method=Recording(), micro_batch_size=micro_batch_size).run()
        assert sorted(sizes) == sorted(expected)


class Limited(ToyMethod):
    """Has memory for a number of samples only; its batch norm has seen whatever was passed through it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch):
        self.seen += len(batch["views"])
        if len(batch["views"]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch)


class TestMemory:
    @pytest.mark.parametrize(("size", "most", "chosen"), [(7, 8, None), (7, 3, 3), (8, 3, 2), (8, 1, 1)])
    def test_auto_finds_what_fits(self, size, most, chosen):
        batches = [toy_batch(size, seed) for seed in range(2)]
        found = make_trainer(batches, method=Limited(most), micro_batch_size="auto")
        found.run()
        assert found.micro_batch_size == chosen
        given = make_trainer(batches, method=Limited(most), micro_batch_size=chosen)
        given.run()
        assert equal(weights(found.network), weights(given.network))
        assert found.network.seen == given.network.seen == 2 * size

    @pytest.mark.parametrize(
        ("micro_batch_size", "most", "words"),
        [
            (None, 3, "for 8 samples in a pass: try --micro_batch_size 4, or auto"),
            (3, 2, "3 samples.*_size 1,"),
            ("auto", 0, "1 samples in a pass: try smaller views or patches"),
            (1, 0, "smaller views"),
        ],
    )
    def test_too_little(self, micro_batch_size, most, words):
        trainer = make_trainer([toy_batch(8)], method=Limited(most), micro_batch_size=micro_batch_size)
        with pytest.raises(MemoryError, match=words):
            trainer.run()

    def test_auto_is_for_one_process(self, monkeypatch):
        monkeypatch.setattr("pgl_ext.engines.rank_and_world_size", lambda: (0, 2))
        with pytest.raises(ValueError, match="one process alone"):
            make_trainer([toy_batch()], micro_batch_size="auto")


class TestMixedPrecision:
    def test_bfloat16_runs_and_is_used(self):
        dtypes = []
        method = ToyMethod()
        method.encoder.register_forward_hook(lambda module, args, output: dtypes.append(output[-1].dtype))
        before = weights(method)
        make_trainer([toy_batch()], method=method, amp=True).run()
        assert dtypes == [torch.bfloat16]
        assert not equal(before, weights(method))
        assert all(p.dtype == torch.float32 for p in method.parameters())

    def test_pgl_in_bfloat16_stays_near_single_precision(self, make_pgl, make_batch):
        losses = []
        for amp in (False, True):
            trainer = make_trainer([make_batch(2)], method=make_pgl(), lr=0.0, amp=amp)
            trainer.run()
            losses.append(trainer.state.output[0]["loss"])
        assert losses[0] == pytest.approx(losses[1], abs=0.1)

    @pytest.mark.parametrize("make", [make_trainer, lambda b, **kw: PretrainEvaluator("cpu", b, ToyMethod(), **kw)])
    def test_unknown_dtype(self, make):
        with pytest.raises(ValueError, match=r"amp_dtype must be one of .*got 'half'"):
            make([toy_batch()], amp=True, amp_dtype="half")

    def test_a_step_that_the_loss_scaling_skips_moves_nothing(self):
        class Overflowing(ToyMethod):
            def forward(self, batch):
                # A finite loss whose scaled gradient overflows.
                return {"loss": 1e36 * self.encoder.weight.sum()}

        trainer = make_trainer([toy_batch()] * 2, method=Overflowing(), amp=True, amp_dtype="float16")
        ema = TargetEMA(trainer.network, 10)
        ema.attach(trainer)
        before, scale = weights(trainer.network), trainer.scaler.get_scale()
        trainer.run()
        assert equal(before, weights(trainer.network))
        assert ema.step == 0
        assert trainer.scaler.get_scale() == scale / 4


class WithBatchNorm(ToyMethod):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(3)

    def forward(self, batch):
        loss = (self.norm(self.encoder(batch["views"].flatten(0, 1))[-1]).float() - 1).square().mean()
        return {"loss": loss, "feature_std": loss.detach()}


class TestSkippedStep:
    """Leaves no trace: not in the weights, not in the batch-norm statistics."""

    def states(self, method: Method, batches: list[dict], **settings) -> list[list[torch.Tensor]]:
        """Weights and buffers at the start and after each step."""
        states = [[value.clone() for value in method.state_dict().values()]]
        trainer = make_trainer(batches, method=method, **settings)
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e: states.append([v.clone() for v in method.state_dict().values()])
        )
        trainer.run()
        assert all(value.isfinite().all() for value in states[-1])
        return states

    @pytest.mark.parametrize("micro_batch_size", [None, 2])
    def test_of_one_nan_voxel(self, micro_batch_size):
        bad, *clean = [toy_batch(4, seed) for seed in range(3)]
        # In the last micro-batch: the first ones have moved the statistics already.
        bad["views"][-1, 0, 0, 0, 0, 0] = math.nan
        settings = {"micro_batch_size": micro_batch_size}
        states = self.states(WithBatchNorm(), [bad, *clean], **settings)
        assert equal(states[0], states[1])
        assert equal(states[-1], self.states(WithBatchNorm(), clean, **settings)[-1])
        assert not equal(states[0], states[-1])

    @pytest.mark.parametrize("settings", [{}, {"amp": True}, {"amp": True, "amp_dtype": "float16"}])
    def test_of_a_finite_loss_whose_gradients_are_not(self, settings, caplog):
        method, factors = WithBatchNorm(), iter([math.inf, 1.0])
        method.norm.weight.register_hook(lambda gradient: gradient * next(factors))
        start, skipped, stepped = self.states(method, [toy_batch(), toy_batch()], **settings)
        assert equal(start, skipped)
        assert not equal(skipped, stepped)
        # How loss scaling finds its scale is nothing to warn of.
        assert ("step 1 skipped: the largest gradient is" in caplog.text) == (settings.get("amp_dtype") is None)

    def test_training_stops_where_gradients_stay_non_finite(self):
        method = WithBatchNorm()
        method.norm.weight.register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(
            FloatingPointError, match=r"largest gradient has been \w+ for 3 steps in a row, up to step 3"
        ):
            make_trainer([toy_batch()] * 8, method=method, max_non_finite=3).run()


class TestNonFiniteLoss:
    def test_the_step_is_skipped(self, caplog):
        bad = toy_batch()
        bad["views"][1, 0, 0, 0, 0, 0] = math.nan
        trainer = make_trainer([toy_batch(), bad, toy_batch(seed=2)], micro_batch_size=2)
        ema = TargetEMA(trainer.network, 10)
        ema.attach(trainer)
        history = [weights(trainer.network)]
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: history.append(weights(e.network)))
        trainer.run()
        assert [equal(a, b) for a, b in itertools.pairwise(history)] == [False, True, False]
        assert ema.step == 2
        assert "step 2 skipped: the loss is nan" in caplog.text

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_training_stops_where_it_stays_so(self, value):
        bad = {**toy_batch(), "views": torch.full((4, 2, 1, 8, 8, 4), value)}
        trainer = make_trainer([toy_batch(), *[bad] * 8], max_non_finite=3)
        with pytest.raises(
            FloatingPointError, match="for 3 steps in a row, up to step 4: begin anew with a lower learning rate"
        ):
            trainer.run()

    def test_single_ones_do_not_stop_it(self):
        bad = {**toy_batch(), "views": torch.full((4, 2, 1, 8, 8, 4), math.nan)}
        trainer = make_trainer([bad, bad, toy_batch()], epochs=3, max_non_finite=3)
        trainer.run()
        assert trainer.state.iteration == 9


class SpyTransform:
    """Adds noise from its own random state, as the intensity augmentations do."""

    def __init__(self) -> None:
        self.draws: list[float] = []

    def set_random_state(self, seed):
        self.random = np.random.RandomState(seed)

    def __call__(self, batch):
        self.draws.append(self.random.random_sample())
        return {**batch, "views": batch["views"] + self.draws[-1]}


class TestBatchTransform:
    def draws(self, iterations: range, seed: int = 0) -> list[float]:
        spy = SpyTransform()
        trainer = make_trainer([toy_batch()] * 2, epochs=iterations.stop // 2, batch_transform=spy, seed=seed)
        position = {"iteration": iterations.start, "epoch_length": 2, "max_epochs": iterations.stop // 2}
        trainer.add_event_handler(Events.STARTED, lambda engine: engine.load_state_dict(position))
        trainer.run()
        return spy.draws

    def test_random_state_depends_on_seed_and_iteration_alone(self):
        straight = self.draws(range(0, 6))
        assert len(set(straight)) == 6
        assert self.draws(range(3, 6)) == straight[3:]
        assert not set(straight) & set(self.draws(range(0, 6), seed=1))

    def test_its_result_is_what_the_network_sees(self):
        batch = toy_batch()
        spy = SpyTransform()
        trainer = make_trainer([batch], batch_transform=spy, lr=0.0)
        trainer.run()
        expected = ToyMethod()({**batch, "views": batch["views"] + spy.draws[0]})
        assert trainer.state.output[0]["loss"] == pytest.approx(float(expected["loss"].detach()), rel=1e-5)


class TestStopping:
    @pytest.mark.usefixtures("_keep_signal_handler")
    def test_a_signal_ends_the_run_after_the_step(self, tmp_path):
        class SignallingMethod(ToyMethod):
            def forward(self, batch):
                if trainer.state.iteration == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().forward(batch)

        method = SignallingMethod()
        checkpoints = CheckpointHandler(
            tmp_path, method, {}, EpochBatchSampler(12, 4, 2), tmp_path / "encoder.pt", {}, interval=100
        )
        trainer = make_trainer([toy_batch()] * 3, epochs=2, method=method, train_handlers=[checkpoints])
        with pytest.raises(SystemExit) as stop:
            trainer.run()
        assert stop.value.code == 143
        assert trainer.state.iteration == 2
        path, content = checkpoints.folder.newest_intact()
        assert path.name == "checkpoint_00000002.pt"
        # The step during which the signal came is in it.
        assert equal(content["network"].values(), method.state_dict().values())
        assert not torch.equal(content["network"]["encoder.weight"], ToyEncoder().weight)

    @pytest.mark.usefixtures("_keep_signal_handler")
    def test_a_signal_during_the_last_step_is_a_normal_end(self, tmp_path):
        trainer = make_trainer([toy_batch()] * 3, epochs=1)
        handler = CheckpointHandler(
            tmp_path, trainer.network, {}, EpochBatchSampler(12, 4, 1), tmp_path / "encoder.pt", {}
        )
        handler.attach(trainer)
        trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda e: setattr(e, "stop_requested", True))
        trainer.run()
        assert handler.folder.paths()[-1].name == "checkpoint_00000003.pt"


class TestEvaluator:
    def test_metrics(self, make_pgl, make_batch):
        batches = [make_batch(2, seed) for seed in range(2)]
        method = make_pgl()
        before = {key: value.clone() for key, value in method.state_dict().items()}
        evaluator = PretrainEvaluator("cpu", batches, method.train())
        evaluator.run()
        # Neither weights nor batch-norm statistics.
        assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
        method.eval()
        expected = {"val_loss": [], "val_feature_std": [], "val_retrieval_top1": [], "val_retrieval_chance": [1 / 8]}
        with torch.no_grad():
            for batch in batches:
                output = method(batch)
                expected["val_loss"].append(float(output["loss"]))
                expected["val_feature_std"].append(float(output["feature_std"]))
                features = method.encoder(batch["views"].flatten(0, 1))[-1].unflatten(0, (2, 2))
                top1 = correspondence_retrieval(features, batch["affines"], (32, 32, 16))
                expected["val_retrieval_top1"].append(float(top1.mean()))
        assert evaluator.state.metrics == {k: pytest.approx(np.mean(v), abs=1e-5) for k, v in expected.items()}

    def test_each_pair_counts_alike_also_in_a_smaller_batch(self):
        class Means(ToyMethod):
            logged = ("mean",)

            def forward(self, batch):
                return {**super().forward(batch), "mean": batch["views"].mean()}

        # Of other scales, so that a wrong weight shows.
        whole = {**toy_batch(5), "views": toy_batch(5)["views"] * torch.arange(1.0, 6).view(-1, 1, 1, 1, 1, 1)}
        parts = [{key: value[start : start + 2] for key, value in whole.items()} for start in (0, 2, 4)]
        metrics = []
        for batches in ([whole], parts):
            evaluator = PretrainEvaluator("cpu", batches, Means())
            evaluator.run()
            metrics.append(dict(evaluator.state.metrics))
        assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
        assert metrics[0]["val_mean"] == pytest.approx(float(whole["views"].mean()), rel=1e-5)
        assert all(type(value) is float for value in metrics[1].values())

    def test_runs_in_bfloat16(self, make_pgl, make_batch):
        evaluator = PretrainEvaluator("cpu", [make_batch(2)], make_pgl(), amp=True)
        evaluator.run()
        assert math.isfinite(evaluator.state.metrics["val_loss"])


@pytest.mark.parametrize("configs", [CONFIGS, SEGMENTATION_CONFIGS])
def test_distributed_training_leaves_the_batch_where_the_trainer_has_placed_it(configs):
    """With device_ids, DistributedDataParallel moves every tensor, also the affines, which stay on the CPU."""
    network = json.loads((configs / "multi_gpu_train.json").read_text())["network"]
    assert network["_target_"].endswith("DistributedDataParallel")
    assert network.get("device_ids") is None


class ToySegmentation(nn.Module):
    """A voxel by itself: each sample's gradient is its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv3d(1, 4, kernel_size=1)
        self.head = nn.Conv3d(4, 2, kernel_size=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.encoder(image)))


def squares(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """Averaged over samples, so that the parts of a batch add up to the whole."""
    weight = batch.get("annotated", torch.ones(len(logits), 2)).view(-1, 2, 1, 1, 1)
    return (weight * (logits - batch["label"]).square()).mean()


def labelled_batch(size: int = 4, seed: int = 0, **more) -> dict:
    image = torch.randn(size, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return {"image": image, "label": (image > 0).float(), "read_errors": torch.zeros(size, dtype=torch.long), **more}


def make_segmentation_trainer(batches, loss=squares, network=None, lr: float = 0.1, **settings) -> SegmentationTrainer:
    network = ToySegmentation() if network is None else network
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    return SegmentationTrainer("cpu", 1, batches, network, optimizer, loss_function=loss, **settings)


class TestSegmentationTrainer:
    def test_is_plain_gradient_descent(self):
        batches = [labelled_batch(4, seed) for seed in range(3)]
        trainer = make_segmentation_trainer(batches)
        trainer.run()
        network = ToySegmentation()
        for batch in batches:
            gradients = torch.autograd.grad(squares(network(batch["image"]), batch), list(network.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                    parameter -= 0.1 * gradient
        for a, b in zip(trainer.network.parameters(), network.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-7)
        assert trainer.state.output[0].keys() == {"loss"}
        assert trainer.state.metrics == {**trainer.state.output[0], "lr": 0.1, "read_errors": 0}

    @pytest.mark.parametrize(("size", "micro_batch_size"), [(4, 2), (5, 2), (3, 1)])
    def test_micro_batches_give_the_step_of_the_whole_batch(self, size, micro_batch_size):
        """With everything that belongs to a sample: its label, and which organs count in it."""
        annotated = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])[:size]
        batch = labelled_batch(size, annotated=annotated)
        batch["image"] *= torch.arange(1.0, size + 1).view(-1, 1, 1, 1, 1)
        whole = make_segmentation_trainer([batch])
        parts = make_segmentation_trainer([batch], micro_batch_size=micro_batch_size)
        whole.run()
        parts.run()
        for a, b in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
        assert parts.state.output[0]["loss"] == pytest.approx(whole.state.output[0]["loss"], rel=1e-5)

    def test_mixed_precision_leaves_the_loss_in_single(self):
        seen = []

        def loss(logits, batch):
            seen.append((logits.dtype, torch.is_autocast_enabled("cpu"), logits.requires_grad))
            return squares(logits, batch)

        network = ToySegmentation()
        network.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        before = weights(network)
        make_segmentation_trainer([labelled_batch()], loss, network, amp=True).run()
        assert seen == [torch.bfloat16, (torch.float32, False, True)]
        assert not equal(before, weights(network))

    def test_the_batch_transform_changes_the_image_alone(self):
        class AddOne:
            def set_random_state(self, seed):
                return self

            def __call__(self, batch):
                return {**batch, "image": batch["image"] + 1}

        batch = labelled_batch()
        trainer = make_segmentation_trainer([batch], batch_transform=AddOne(), lr=0.0)
        trainer.run()
        expected = squares(ToySegmentation()(batch["image"] + 1), batch)
        assert trainer.state.output[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)

    def test_a_step_that_is_not_finite_is_skipped(self, caplog):
        bad = labelled_batch()
        bad["image"][0, 0, 0, 0, 0] = math.nan
        network = ToySegmentation()
        before = weights(network)
        make_segmentation_trainer([bad], network=network).run()
        assert equal(before, weights(network))
        assert "step 1 skipped: the loss is nan" in caplog.text
