import contextlib
import json
import logging
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import Compose, SelectItemsd
from pytorch_optimizer import LARS
from torch.utils.data import DataLoader

from pgl_ext.checkpoints import CheckpointFolder, CheckpointHandler
from pgl_ext.data.dataset import EpochBatchSampler, VolumeDataset
from pgl_ext.data.seen import NO_FILES
from pgl_ext.engines import PretrainTrainer
from pgl_ext.handlers import TargetEMA
from pgl_ext.networks import SegmentationNet
from pgl_ext.transforms import BatchIntensityd, RandBatchGamma, RandBatchNoise, RandOverlappingViewsd
from pgl_ext.weights import EncoderRecord, load_encoder


class TestCheckpointFolder:
    def test_the_last_are_kept(self, tmp_path):
        folder = CheckpointFolder(tmp_path / "new" / "folder", keep_last=2)
        for step in (5, 10, 200, 1000):
            path = folder.write({"step": step}, step)
            assert path == folder.paths()[-1]
        assert [p.name for p in folder.paths()] == ["checkpoint_00000200.pt", "checkpoint_00001000.pt"]

    def test_order_is_that_of_the_steps(self, tmp_path):
        folder = CheckpointFolder(tmp_path)
        for step in (3, 123_456_789, 40):
            folder.write({"step": step}, step)
        assert folder.newest_intact()[1] == {"step": 123_456_789}

    def test_other_files_are_left_alone(self, tmp_path):
        others = [tmp_path / name for name in ("checkpoint_best.pt", "checkpoint_00000001.pt.bak", "notes.txt")]
        for path in others:
            path.write_text("mine")
        folder = CheckpointFolder(tmp_path, keep_last=1)
        for step in range(3):
            folder.write({}, step)
        assert len(folder.paths()) == 1
        assert all(path.read_text() == "mine" for path in others)

    def test_damaged_files_are_passed_over(self, tmp_path, caplog):
        folder = CheckpointFolder(tmp_path, keep_last=4)
        for step in (1, 2, 3, 4):
            folder.write({"step": step, "weights": torch.ones(1000)}, step)
        intact, truncated, garbage, empty = folder.paths()
        truncated.write_bytes(truncated.read_bytes()[:-2000])
        garbage.write_bytes(b"\x00garbage" * 100)
        empty.write_bytes(b"")
        with caplog.at_level(logging.WARNING, logger="pgl_ext"):
            path, content = folder.newest_intact()
        assert path == intact
        assert content["step"] == 1
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 3
        for damaged, message in zip((empty, garbage, truncated), messages, strict=True):
            assert str(damaged) in message

    def test_one_flipped_bit_of_a_weight_is_found(self, tmp_path, caplog):
        folder = CheckpointFolder(tmp_path)
        for step in (1, 2):
            folder.write({"step": step, "weights": torch.full((1000,), 0.3)}, step)
        before, damaged = folder.paths()
        content = bytearray(damaged.read_bytes())
        content[content.find(torch.full((9,), 0.3).numpy().tobytes()) + 3] ^= 0x40
        damaged.write_bytes(content)
        assert torch.load(damaged, weights_only=True)["weights"].max() > 1e30  # PyTorch itself reads it
        assert folder.newest_intact()[0] == before
        assert f"{damaged} can not be read" in caplog.text
        assert "checksum" in caplog.text

    def test_nothing_intact(self, tmp_path):
        folder = CheckpointFolder(tmp_path)
        with pytest.raises(FileNotFoundError, match="no intact checkpoint") as error:
            folder.newest_intact()
        assert str(tmp_path) in str(error.value)
        folder.write({}, 1).write_bytes(b"damaged")
        with pytest.raises(FileNotFoundError, match="Start anew without --resume"):
            folder.newest_intact()
        assert CheckpointFolder(tmp_path / "none").paths() == []

    def test_an_error_while_saving_leaves_the_old_file_alone(self, tmp_path, monkeypatch):
        folder = CheckpointFolder(tmp_path)
        folder.write({"value": "old"}, 7)

        def fail_halfway(content, file):
            file.write(b"half of the new conte")
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", fail_halfway)
            with pytest.raises(OSError, match="No space left"):
                folder.write({"value": "new"}, 7)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_00000007.pt"]
        assert folder.newest_intact()[1] == {"value": "old"}

    @pytest.mark.parametrize("keep_last", [0, -1])
    def test_at_least_one_is_kept(self, tmp_path, keep_last):
        with pytest.raises(ValueError, match=f"keep_last must be at least 1, got {keep_last}"):
            CheckpointFolder(tmp_path, keep_last)


class Run:
    """Everything of a training run, made anew; 3 steps per epoch."""

    def __init__(self, folder: Path, volumes, cache, make_pgl, resume: bool = False, **settings) -> None:
        settings = {"batch_size": 2, "max_epochs": 2, "interval": 1, "seed": 0, "stop_at": None, **settings}
        self.folder = folder
        # What is random about making a network must not matter once it is resumed.
        self.method = make_pgl(seed=99 if resume else 0)
        dataset = VolumeDataset(
            volumes, cache, Compose([RandOverlappingViewsd("image", (32, 32, 16)), SelectItemsd(["views", "affines"])])
        )
        self.sampler = EpochBatchSampler(5, settings["batch_size"], settings["max_epochs"], seed=settings["seed"])
        steps = settings["max_epochs"] * len(self.sampler)
        optimizer = LARS([p for p in self.method.parameters() if p.requires_grad], lr=0.2, weight_decay=1e-6)
        self.ema = TargetEMA(self.method, steps, base_momentum=0.9)
        self.handler = CheckpointHandler(
            folder / "checkpoints",
            self.method,
            {"target_ema": self.ema},
            self.sampler,
            folder / "models" / "pgl_encoder.pt",
            {"version": "0", "data": {"training_volumes": 5}, "lr": 0.2},
            interval=settings["interval"],
            resume=resume,
            overwrite=settings.get("overwrite", False),
        )
        self.handler.rank = settings.get("rank", 0)
        self.trainer = PretrainTrainer(
            "cpu",
            settings["max_epochs"],
            DataLoader(dataset, batch_sampler=self.sampler),
            self.method,
            optimizer,
            WarmupCosineSchedule(optimizer, warmup_steps=2, t_total=steps),
            batch_transform=BatchIntensityd("views", [RandBatchNoise(prob=1.0), RandBatchGamma(prob=0.5)]),
            train_handlers=[self.handler, self.ema],
        )
        self.losses: dict[int, float] = {}
        self.trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e: self.losses.update({e.state.iteration: e.state.output[0]["loss"]})
        )
        if settings["stop_at"] is not None:
            self.trainer.add_event_handler(
                Events.ITERATION_STARTED(once=settings["stop_at"]), lambda e: setattr(e, "stop_requested", True)
            )

    def content(self) -> dict:
        return self.handler.folder.newest_intact()[1]


def assert_same(first, second, where: str = "") -> None:
    """Bit-identical nested content."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}/{number}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


@pytest.fixture(autouse=True)
def _keep_signal_handler():
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture
def start(tmp_path, volumes, cache, make_pgl):
    """Makes a run of its own folder."""
    return lambda name="run", **settings: Run(tmp_path / name, volumes, cache, make_pgl, **settings)


def stopped(run: Run, status: int = 143) -> Run:
    with pytest.raises(SystemExit) as stop:
        run.trainer.run()
    assert stop.value.code == status
    return run


class TestSignals:
    def sent(self, run: Run, number: int, times: int = 1) -> Run:
        """Sends itself a signal in its second step."""
        event = Events.ITERATION_STARTED(once=2)
        run.trainer.add_event_handler(event, lambda: [os.kill(os.getpid(), number) for _ in range(times)])
        return run

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_end_the_run_after_a_checkpoint(self, start, number, status):
        run = stopped(self.sent(start(interval=100), number), status)
        assert run.content()["step"] == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_second_one_of_ctrl_c_is_not_waited_for(self, start):
        run = self.sent(start(interval=100), signal.SIGINT, times=2)
        with pytest.raises(KeyboardInterrupt):
            run.trainer.run()
        assert run.handler.folder.paths() == []

    def test_what_is_ignored_stays_so(self, start):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.sent(start(max_epochs=1), signal.SIGINT).trainer.run()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def describe(run: Run, **entries) -> None:
    """Change what the newest checkpoint says of its run."""
    path, content = run.handler.folder.newest_intact()
    torch.save({**content, "description": content["description"] | entries}, path)


class TestResume:
    @pytest.mark.parametrize("step", [2, 3, 4])
    def test_goes_on_as_if_the_run_had_never_stopped(self, start, step):
        straight = start("straight")
        straight.trainer.run()
        first = stopped(start("parts", stop_at=step))
        torch.manual_seed(1234)
        second = start("parts", resume=True)
        second.trainer.run()
        assert list(first.losses) == list(range(1, step + 1))
        assert {**first.losses, **second.losses} == straight.losses
        assert list(second.losses) == list(range(step + 1, 7))
        expected, actual = straight.content(), second.content()
        assert expected["step"] == 6
        assert_same(expected, actual)
        assert_same(straight.method.state_dict(), second.method.state_dict())
        assert second.ema.step == 6

    def test_after_a_crash_it_goes_on_from_the_last_epoch(self, start):
        straight = start("straight")
        straight.trainer.run()

        def crash(engine):
            raise ZeroDivisionError

        broken = start("parts")
        broken.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), crash)
        with pytest.raises(ZeroDivisionError):
            broken.trainer.run()
        second = start("parts", resume=True)
        second.trainer.run()
        assert list(second.losses) == [4, 5, 6]
        assert_same(straight.method.state_dict(), second.method.state_dict())

    def test_a_finished_run_stays_as_it_is(self, start):
        first = start()
        first.trainer.run()
        second = start(resume=True)
        second.trainer.run()
        assert second.losses == {}
        assert_same(first.method.state_dict(), second.method.state_dict())

    def test_random_states_are_restored(self, start):
        """For methods that draw from the global states, such as those with dropout."""

        def drawing(name: str, **settings) -> tuple[Run, list[tuple]]:
            run, drawn = start(name, **settings), []
            run.method.register_forward_pre_hook(
                lambda *_: drawn.append((random.random(), np.random.random_sample(), float(torch.rand(()))))
            )
            random.seed(0)
            np.random.seed(0)
            return run, drawn

        run, straight = drawing("straight")
        run.trainer.run()
        run, first = drawing("parts", stop_at=4)
        stopped(run)
        run, second = drawing("parts", resume=True)
        run.trainer.run()
        assert first + second == straight
        assert len(set(straight)) == 6

    def test_random_states_of_all_processes_are_restored(self, start, tmp_path):
        def drawn(name: str, **settings) -> list[list[float]]:
            """What each of two processes draws."""

            def train(rank: int) -> None:
                store = torch.distributed.FileStore(str(tmp_path / f"store_{name}_{settings}"), 2)
                torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
                run, numbers = start(name, rank=rank, **settings), []
                torch.manual_seed(rank)
                run.method.register_forward_pre_hook(lambda *_: numbers.append(float(torch.rand(()))))
                with contextlib.suppress(SystemExit):
                    run.trainer.run()
                torch.save(numbers, tmp_path / f"{rank}.pt")

            fork = multiprocessing.get_context("fork")
            processes = [fork.Process(target=train, args=(rank,), daemon=True) for rank in range(2)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            assert [process.exitcode for process in processes] == [0, 0]
            return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

        straight = drawn("straight")
        first, second = drawn("parts", stop_at=4), drawn("parts", resume=True)
        assert [a + b for a, b in zip(first, second, strict=True)] == straight
        assert len({*straight[0], *straight[1]}) == 12

    def test_a_restart_by_torchrun_goes_on_with_its_own_run_alone(self, start, monkeypatch):
        whole = start("straight")
        whole.trainer.run()
        stopped(start("parts", stop_at=4))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        job = whole.folder.parent / "parts" / "checkpoints" / "job"
        own = job.read_text()
        job.write_text(own + " of another torchrun")
        with pytest.raises(FileExistsError, match="already holds checkpoints"):
            start("parts").trainer.run()
        job.write_text(own)
        again = start("parts")
        again.trainer.run()
        for key, value in whole.method.state_dict().items():
            assert torch.equal(again.method.state_dict()[key], value), key

    def test_random_states_of_another_number_of_processes(self, start, caplog):
        run = stopped(start("parts", stop_at=4))
        content = run.content()
        (state,) = content["random"]
        run.handler.folder.write({**content, "random": [state] * 3}, content["step"])
        with caplog.at_level(logging.WARNING, logger="pgl_ext"):
            second = start("parts", resume=True)
            second.trainer.run()
        assert list(second.losses) == [5, 6]
        assert "holds the random states of 3 processes, this run has 1" in caplog.text

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"batch_size": 3}, "belongs to a run of 2 epochs of 3 steps, this one has 2 of 2"),
            ({"max_epochs": 3}, "belongs to a run of 2 epochs of 3 steps, this one has 3 of 3"),
            ({"seed": 1}, "resume with the same data, batch_size, patches_per_volume and seed"),
        ],
    )
    def test_with_other_settings(self, start, settings, message):
        stopped(start(stop_at=1))
        with pytest.raises(ValueError, match=message):
            start(resume=True, **settings).trainer.run()

    def test_with_another_description(self, start):
        stopped(start(stop_at=1))
        second = start(resume=True)
        second.handler.description = {"data": {"training_volumes": 5}, "lr": 0.1, "pretrained_encoder": "moved.pt"}
        describe(second, lr=0.2, pretrained_encoder="encoder.pt")
        with pytest.raises(ValueError, match=r"other settings: lr was 0\.2 and is 0\.1\. Resume with the same ones"):
            second.trainer.run()

    @pytest.mark.parametrize(("scans", "goes_on"), [(["a", NO_FILES], True), (["a", "c"], False)])
    def test_with_scans_that_are_lost_or_others(self, start, scans, goes_on):
        """The volumes of lost ones are cached, and they count as seen all the same."""
        stopped(start(stop_at=1))
        second = start(resume=True)
        second.handler.description = {"data": {"scans": scans}}
        describe(second, data={"scans": ["a", "b"]})
        if goes_on:
            second.trainer.run()
            assert second.handler.description["data"]["scans"] == ["a", "b"]
        else:
            with pytest.raises(ValueError, match=r"other settings: data#scans was \['a', 'b'\]"):
                second.trainer.run()

    def test_with_other_input(self, start):
        """Every entry that differs is named, however deep it lies, and none that is equal."""
        stopped(start(stop_at=1))
        second = start(resume=True)
        second.handler.description = {
            "input": {"hu_window": (-1024, 325), "spacing": [1, 1, 2], "patch_size": [32, 32, 16]},
            "views": {"flip_prob": 0.5, "min_overlap": 0.2},
            "data": {"training_volumes": 5},
        }
        describe(
            second,
            input={"hu_window": [-1024, 325], "spacing": None, "patch_size": [32, 32, 16]},
            views={"flip_prob": 0.5, "min_overlap": 0.1},
        )
        with pytest.raises(ValueError, match="other settings") as error:
            second.trainer.run()
        expected = (
            "other settings: input#spacing was None and is [1, 1, 2]; views#min_overlap was 0.1 and is 0.2. Resume"
        )
        assert expected in str(error.value)

    def test_with_the_description_of_an_earlier_version(self, start):
        """Which had the input among the other entries, and an architecture without a family."""
        stopped(start(stop_at=1))
        path, content = start(resume=True).handler.folder.newest_intact()
        recorded = content["description"]
        del recorded["input"]
        recorded["architecture"] = recorded["architecture"]["arguments"]
        recorded |= {
            "normalization": {"clip_hu": [0, 9]},
            "orientation": "RAS",
            "spacing": None,
            "view_size": [32, 32, 16],
        }
        torch.save(content, path)
        second, third = start(resume=True), start(resume=True)
        second.handler.description = {"input": {"hu_window": [0, 8], "spacing": None, "patch_size": [32, 32, 16]}}
        with pytest.raises(ValueError, match=r"settings: input#hu_window was \[0, 9\] and is \[0, 8\]\. Resume"):
            second.trainer.run()
        third.handler.description = {"input": {"hu_window": [0, 9], "spacing": None, "patch_size": [32, 32, 16]}}
        third.trainer.run()
        assert list(third.losses) == [2, 3, 4, 5, 6]

    def test_input_that_is_none_is_refused_at_once(self, start):
        run = start()
        with pytest.raises(ValueError, match=r"^the config's description gives spacing as 2, which"):
            CheckpointHandler(run.folder, run.method, {}, run.sampler, description={"input": {"spacing": 2}})

    def test_rounds_in_one_process_are_one_run(self, start):
        """As in federated learning, where an engine runs again and again."""
        straight = start("straight")
        straight.trainer.run()
        rounds = start("rounds")
        for epochs in (1, 2):
            rounds.trainer.state.max_epochs = epochs
            rounds.trainer.run()
        assert rounds.losses == straight.losses
        assert_same(straight.method.state_dict(), rounds.method.state_dict())
        assert [path.name for path in rounds.handler.folder.paths()] == [
            path.name for path in straight.handler.folder.paths()
        ]

    def test_with_nothing_to_resume_from(self, start):
        with pytest.raises(FileNotFoundError, match="nothing to resume from"):
            start(resume=True).trainer.run()


class TestSaving:
    def test_an_existing_run_is_not_overwritten(self, start):
        first = stopped(start(stop_at=1))
        before = {path: path.read_bytes() for path in first.folder.rglob("*.pt")}
        second = start()
        message = r"--resume true, begin anew with --overwrite true.* choose another --output_dir"
        with pytest.raises(FileExistsError, match=message):
            second.trainer.run()
        assert second.losses == {}
        assert {path: path.read_bytes() for path in first.folder.rglob("*.pt")} == before

    def test_is_removed_where_that_is_asked_for(self, start):
        """Also where the earlier run had come further."""
        first = start(max_epochs=3)
        first.trainer.run()
        second = start(max_epochs=1, overwrite=True)
        second.trainer.run()
        assert len(second.losses) == 3
        assert [path.name for path in second.handler.folder.paths()] == ["checkpoint_00000003.pt"]

    def test_each_interval_and_the_end(self, start):
        run = start(max_epochs=3, interval=2)
        run.trainer.run()
        names = [path.name for path in run.handler.folder.paths()]
        assert names == ["checkpoint_00000006.pt", "checkpoint_00000009.pt"]

    def test_the_file_holds_tensors_and_plain_values(self, start):
        run = stopped(start(stop_at=1))
        # With weights_only=True anything else is refused.
        content = torch.load(run.handler.folder.paths()[-1], weights_only=True)

        def check(value) -> None:
            if isinstance(value, dict):
                check([*value.keys(), *value.values()])
            elif isinstance(value, (list, tuple)):
                for inner in value:
                    check(inner)
            else:
                assert value is None or type(value) in (torch.Tensor, bool, int, float, str), type(value)

        check(content)
        assert_same(content["network"], run.method.state_dict())
        assert content["sampler"] == run.sampler.state_dict()
        assert content["objects"] == {"target_ema": {"step": 1}}

    def test_the_encoder_file_comes_with_each(self, start, make_encoder):
        run = stopped(start(stop_at=2))
        path = run.folder / "models" / "pgl_encoder.pt"
        encoder = make_encoder(seed=5)
        load_encoder(encoder, path)
        assert_same(encoder.state_dict(), run.method.encoder.state_dict())
        description = json.loads(path.with_suffix(".json").read_text())
        assert description.pop("sha256")
        # 2 of 3 steps with 5 pairs per epoch.
        assert description == {
            "architecture": encoder.architecture,
            "input": {
                "hu_window": None,
                "spacing": None,
                "patch_size": None,
                "channels": 1,
                "orientation": "RAS",
                "channel_names": ["image"],
            },
            "stride": [16, 16, 8],
            "channels": [8, 8, 16, 32, 64],
            "method": "PGL",
            "steps": 2,
            "pairs": 3,
            "pretrained": None,
            "version": "0",
            "data": {"training_volumes": 5},
            "lr": 0.2,
        }
        # A checkpoint says the same.
        assert run.content()["description"] == description

    def test_other_ranks_write_nothing(self, start):
        run = start(rank=1)
        run.trainer.run()
        assert not run.folder.exists()

    def test_the_rank_is_that_of_torchrun(self, start, monkeypatch):
        run = start()
        monkeypatch.setenv("RANK", "1")
        run.handler.rank = CheckpointHandler(run.folder, run.method, {}, run.sampler).rank
        run.trainer.run()
        assert not run.folder.exists()


class Score:
    """Found by a validation at the end of an epoch, by a handler that is attached after the checkpoints'."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def attach(self, engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: self.epochs.append(engine.state.epoch))

    def state_dict(self) -> dict:
        return {"epochs": list(self.epochs)}

    def load_state_dict(self, state) -> None:
        self.epochs = list(state["epochs"])


class TestValidationAtTheEndOfAnEpoch:
    def scored(self, run: Run) -> Run:
        run.score = run.handler.objects["score"] = Score()
        run.score.attach(run.trainer)
        return run

    def test_is_in_its_checkpoint(self, start):
        run = self.scored(start(max_epochs=3, interval=2))
        run.trainer.run()
        found = [torch.load(path, weights_only=True) for path in run.handler.folder.paths()]
        assert [(c["step"], c["objects"]["score"]["epochs"]) for c in found] == [(6, [1, 2]), (9, [1, 2, 3])]

    @pytest.mark.parametrize(("stop_at", "step", "epochs"), [(2, 2, []), (3, 3, [1]), (4, 4, [1]), (6, 6, [1, 2])])
    def test_comes_before_a_stop_on_request(self, start, stop_at, step, epochs):
        """Also where the signal comes during the last step of an epoch."""
        run = self.scored(start(max_epochs=3, interval=100, stop_at=stop_at))
        stopped(run)
        content = run.content()
        assert content["step"] == run.trainer.state.iteration == step
        assert content["objects"]["score"]["epochs"] == run.score.epochs == epochs

    @pytest.mark.parametrize("stop_at", [2, 3, 4])
    def test_happens_once_in_a_resumed_run(self, start, stop_at):
        stopped(self.scored(start("run", stop_at=stop_at)))
        second = self.scored(start("run", resume=True))
        second.trainer.run()
        assert second.score.epochs == [1, 2]


class TestDecoderFile:
    def saved(self, run: Run) -> Run:
        run.handler.decoder_path = run.folder / "models" / "pgl_decoder.pt"
        return stopped(run)

    def test_comes_with_each_checkpoint_of_a_method_that_has_a_decoder(self, start, make_encoder):
        run = start(stop_at=2)
        network = SegmentationNet(1, 1, make_encoder(), aspp_channels=8, decoder_channels=(8, 6, 4))
        run.method.decoder_state = network.decoder_state
        self.saved(run)
        state = torch.load(run.handler.decoder_path, weights_only=True)
        expected = {key: value for key, value in network.state_dict().items() if key.startswith(("aspp.", "decoder."))}
        head = [expected.pop(f"decoder.head.{name}") for name in ("weight", "bias")]
        assert_same(state, expected)
        assert len(head) == 2
        encoder_path = run.handler.encoder_path
        assert EncoderRecord.load(run.handler.decoder_path) == EncoderRecord.load(encoder_path)
        assert EncoderRecord.load(encoder_path).steps == 2

    def test_of_a_method_without_one_is_not_written(self, start):
        run = self.saved(start(stop_at=1))
        assert run.handler.encoder_path.is_file()
        assert not run.handler.decoder_path.exists()


def test_without_an_encoder_file(start):
    run = start()
    run.handler.encoder_path = None
    run.trainer.run()
    assert len(run.handler.folder.paths()) == 2
    assert not (run.folder / "models").exists()
