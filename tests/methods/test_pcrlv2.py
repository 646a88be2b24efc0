from __future__ import annotations

import copy
import csv
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from made_weights import encoder_record
from monai.bundle import ConfigParser
from programs import CONFIGS, assert_same_weights, checkpoints, run, start, tail, training_arguments, wait_for
from torch import nn

from pgl_ext.handlers import TrainingProgress
from pgl_ext.methods import PCRLv2
from pgl_ext.networks import SegmentationNet
from pgl_ext.tools.phantom import generate_case, write_dataset
from pgl_ext.transforms import RandGlobalLocalViewsd
from pgl_ext.weights import load_decoder, save_decoder

CHANNELS = (12, 8, 6)
LOCALS = 6
SIZE = (32, 32, 16)


@pytest.fixture
def make_method(make_encoder) -> Callable[..., PCRLv2]:
    def make(seed: int = 0) -> PCRLv2:
        method = PCRLv2(make_encoder(seed), aspp_channels=16, decoder_channels=CHANNELS)
        # Batch norm as it is after some training: each channel with a scale and offset of its own.
        with torch.no_grad():
            for module in method.modules():
                if isinstance(module, nn.BatchNorm1d):
                    for tensor in (module.weight, module.running_var):
                        tensor.uniform_(0.5, 2)
                    for tensor in (module.bias, module.running_mean):
                        tensor.normal_(std=0.2)
        return method

    return make


def make_batch(size: int = 2, seed: int = 0, **settings) -> dict[str, torch.Tensor]:
    """Views of smooth random volumes; the targets are other ones, so that mixing them up shows."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(size, 1, 7, 7, 4, generator=generator)
    volumes = F.interpolate(coarse, size=(50, 50, 26), mode="trilinear")
    transform = RandGlobalLocalViewsd("image", SIZE, **settings).set_random_state(seed)
    samples = [transform({"image": volume}) for volume in volumes]
    batch = {key: torch.stack([s[key] for s in samples]) for key in ("views", "affines", "local_views")}
    return {**batch, "targets": batch["views"] + 0.3 * torch.randn(batch["views"].shape, generator=generator)}


def fix_levels(monkeypatch, levels: list[int], restored: list[int]) -> None:
    """Have the 13 calls of S (the pair, view 1 with the local ones, view 2 with them) and the samples take these."""
    drawn = iter((levels, restored))
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(next(drawn)))


def embeddings(method: PCRLv2, views: torch.Tensor) -> tuple[list, list[tuple[np.ndarray, np.ndarray]]]:
    """Each level's map, and projection and prediction (B, V, C), in double precision, module by module."""
    features = method.encoder(views.flatten(0, 1))
    maps = method.decoder(method.aspp(features[4]), [features[i].shape[2:] for i in (2, 1, 0)])
    vectors = []
    for level, projection, predictor in zip(maps, method.projections, method.predictors, strict=True):
        z = projection(level.mean((2, 3, 4)))
        vectors.append(tuple(x.unflatten(0, views.shape[:2]).detach().double().numpy() for x in (z, predictor(z))))
    return maps, vectors


def expected_terms(method: PCRLv2, batch: dict, levels: list[int], restored: list[int]) -> dict[str, float]:
    """The loss' terms, call by call, view by view and sample by sample, in NumPy."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    def similarity(first: tuple, second: tuple, a: int, b: int) -> float:
        (z_a, p_a), (z_b, p_b) = first, second
        samples = range(len(z_a))
        return np.mean([-(cosine(p_a[n, a], z_b[n, b]) + cosine(p_b[n, b], z_a[n, a])) / 2 for n in samples])

    def error(level: int) -> list[float]:
        head, image = method.restorations[level], maps[level].unflatten(0, (-1, 2))[:, 0]
        images = F.interpolate(torch.sigmoid(head(image)), size=SIZE, mode="trilinear").detach().double().numpy()
        errors = []
        for sample, target in zip(images, batch["targets"][:, 0].double().numpy(), strict=True):
            target = (target - target.min()) / (target.max() - target.min())
            errors.append(((sample - target) ** 2).mean())
        return errors

    with torch.no_grad():
        maps, of_global = embeddings(method, batch["views"])
        _, of_local = embeddings(method, batch["local_views"])
        pair, *others = levels
        local = [
            similarity(of_global[level], of_local[level], view, number)
            for (view, number), level in zip(np.ndindex(2, LOCALS), others, strict=True)
        ]
        return {
            "restoration_loss": float(np.mean(error(len(CHANNELS) - 1))),
            "global_loss": similarity(of_global[pair], of_global[pair], 0, 1),
            "middle_loss": float(np.mean([error(level)[sample] for sample, level in enumerate(restored)])),
            "local_loss": sum(local) / 12,
        }


def total(terms: dict[str, float], beta: float) -> float:
    return terms["restoration_loss"] + terms["global_loss"] + beta * terms["middle_loss"] + terms["local_loss"]


class TestLoss:
    @pytest.mark.parametrize(
        "levels", [[0] * 13, [1] * 13, [2] * 13, [1, *(0, 1, 2, 2, 1, 0), *(2, 0, 1, 1, 2, 2)]], ids=str
    )
    @pytest.mark.parametrize(("progress", "restored"), [(0.0, [0, 0, 0]), (0.0, [2, 0, 1]), (0.3, [1, 1, 2])])
    def test_is_the_formula_at_the_drawn_levels(self, make_method, monkeypatch, levels, progress, restored):
        method, batch = make_method().train(), make_batch(3)
        method.progress.fill_(progress)
        expected = expected_terms(method, batch, levels, restored)
        fix_levels(monkeypatch, levels, restored)
        output = {key: float(value.detach()) for key, value in method(batch).items()}
        assert {key: output[key] for key in expected} == pytest.approx(expected, abs=1e-5)
        assert output["loss"] == pytest.approx(total(expected, (1 + math.cos(math.pi * progress)) / 2), abs=1e-5)

    def test_in_evaluation_is_the_mean_over_the_levels(self, make_method):
        method, batch = make_method().eval(), make_batch(2)
        per_level = [expected_terms(method, batch, [level] * 13, [level] * 2) for level in range(3)]
        before = torch.get_rng_state()
        with torch.no_grad():
            output = {key: float(value) for key, value in method(batch).items()}
        assert torch.equal(torch.get_rng_state(), before), "validation must not change what training draws"
        for key in per_level[0]:
            assert output[key] == pytest.approx(np.mean([terms[key] for terms in per_level]), abs=1e-5), key

    @pytest.mark.parametrize("seed", range(3))
    def test_ranges(self, make_method, seed):
        output = make_method(seed)(make_batch(2, seed))
        assert set(output) == {"loss", "feature_std", *PCRLv2.logged}
        assert -2 <= float(output["loss"].detach()) <= 4
        assert all(0 <= float(output[key]) <= 1 for key in ("restoration_loss", "middle_loss", "beta"))
        assert all(-1 <= float(output[key]) <= 1 for key in ("global_loss", "local_loss"))
        assert all(not value.requires_grad for key, value in output.items() if key != "loss")

    def test_equal_views_and_identical_predictions_give_the_least(self, make_method):
        method, batch = make_method().eval(), make_batch(2)
        method.predictors = nn.ModuleList(nn.Identity() for _ in CHANNELS)
        batch["views"] = batch["views"][:, :1].expand_as(batch["views"])
        assert float(method(batch)["global_loss"]) == pytest.approx(-1, abs=1e-5)

    def test_targets_are_rescaled_view_by_view_and_only_the_first_counts(self, make_method):
        method, batch = make_method().eval(), make_batch(2)
        factor = torch.tensor([3.0, 0.1]).view(2, 1, 1, 1, 1, 1)
        with torch.no_grad():
            expected = float(method(batch)["loss"])
            rescaled = {**batch, "targets": batch["targets"] * factor - 7}
            assert float(method(rescaled)["loss"]) == pytest.approx(expected, abs=1e-5)
            batch["targets"][:, 1] = 0
            assert float(method(batch)["loss"]) == pytest.approx(expected, abs=1e-6)

    def test_without_targets_the_views_are_restored(self, make_method):
        method, batch = make_method().eval(), make_batch(2)
        with torch.no_grad():
            expected = float(method({**batch, "targets": batch["views"]})["loss"])
            del batch["targets"]
            assert float(method(batch)["loss"]) == expected

    @pytest.mark.parametrize("training", [True, False])
    def test_views_without_contrast_give_finite_gradients(self, make_method, training):
        method, batch = make_method().train(training), make_batch(2)
        method({key: torch.full_like(value, -1.5) for key, value in batch.items()})["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in method.parameters())

    def test_mixed_precision(self, make_method):
        method, batch = make_method().eval(), make_batch(2)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mixed = {key: float(value) for key, value in method(batch).items()}
        with torch.no_grad():
            assert mixed == pytest.approx({key: float(value) for key, value in method(batch).items()}, abs=0.03)

    @pytest.mark.parametrize("local_views", [None, torch.zeros(2, 1, 16, 16, 16)])
    def test_without_local_views(self, make_method, local_views):
        batch = {**make_batch(2), "local_views": local_views}
        with pytest.raises(ValueError, match=r"local_views \(B, L, C, x, y, z\).*RandGlobalLocalViewsd"):
            make_method()(batch)

    def test_other_than_two_views(self, make_method):
        batch = make_batch(2)
        with pytest.raises(ValueError, match=r"PCRLv2 compares two views.*\(2, 1, 1, 32, 32, 16\)"):
            make_method()({**batch, "views": batch["views"][:, :1]})


class TestLocalViews:
    """Each of the six contributes. Batch norm would lead any of them into the loss: its statistics are fixed."""

    @pytest.fixture(params=["training", "evaluation"])
    def method(self, make_method, request) -> PCRLv2:
        method = make_method().eval()
        method.training = request.param == "training"
        return method

    def local_loss(self, method: PCRLv2, batch: dict) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            return float(method(batch)["local_loss"])

    def test_every_one_of_every_sample_has_a_gradient(self, method):
        batch = make_batch(3)
        batch["local_views"].requires_grad_()
        method(batch)["loss"].backward()
        largest = batch["local_views"].grad.abs().flatten(2).amax(2)
        assert largest.shape == (3, LOCALS)
        assert (largest > 0).all()

    @pytest.mark.parametrize("number", range(LOCALS))
    def test_replacing_any_one_changes_the_loss(self, method, number):
        batch = make_batch(2)
        changed = {**batch, "local_views": batch["local_views"].clone()}
        changed["local_views"][:, number] = torch.randn_like(batch["local_views"][:, number])
        assert abs(self.local_loss(method, changed) - self.local_loss(method, batch)) > 1e-5

    def test_all_weigh_the_same(self, make_method):
        method, batch = make_method().eval(), make_batch(2)
        alone = [
            self.local_loss(method, {**batch, "local_views": batch["local_views"][:, number : number + 1]})
            for number in range(LOCALS)
        ]
        assert len({round(value, 6) for value in alone}) == LOCALS
        assert self.local_loss(method, batch) == pytest.approx(np.mean(alone), abs=1e-6)


class TestLevels:
    def test_one_per_call_and_every_one_in_turn(self, make_method):
        weights = make_method().train()._level_weights(3000)
        assert weights.shape == (3000, 3)
        assert (weights.sum(1) == 1).all()
        assert set(weights.unique().tolist()) == {0, 1}
        np.testing.assert_allclose(weights.double().mean(0), 1 / 3, atol=0.04)

    def test_the_same_seed_draws_the_same(self, make_method):
        method, batch = make_method(), make_batch(1)
        values = []
        for seed in (3, 3, 4, 5):
            torch.manual_seed(seed)
            values.append(float(method(batch)["loss"].detach()))
        assert values[0] == values[1]
        assert len(set(values)) == 3


class TestGradients:
    def test_reach_every_parameter_in_every_step(self, make_method):
        """As DistributedDataParallel needs it: also those of levels that were not drawn."""
        method = make_method()
        method(make_batch(2))["loss"].backward()
        assert [name for name, p in method.named_parameters() if p.grad is None] == []
        for name, parameter in method.named_parameters():
            if name.startswith(("encoder.", "aspp.", "decoder.")):
                assert parameter.grad.abs().max() > 0, name

    def test_not_through_projections_that_are_compared_with(self, make_method):
        class Constant(nn.Module):
            def __init__(self, value: torch.Tensor) -> None:
                super().__init__()
                self.value = value

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.value.expand_as(x)

        method, batch = make_method().eval(), make_batch(2)
        method.predictors = nn.ModuleList(Constant(torch.rand(c)) for c in CHANNELS)
        with torch.no_grad():
            other = {**batch, "local_views": batch["local_views"].flip(-1)}
            assert float(method(other)["loss"]) != float(method(batch)["loss"])
        batch["local_views"].requires_grad_()
        batch["views"].requires_grad_()
        method(batch)["loss"].backward()
        assert batch["local_views"].grad is None or not batch["local_views"].grad.any()
        # The second view is compared with, but not restored.
        assert not batch["views"].grad[:, 1].any()
        assert batch["views"].grad[:, 0].any()

    def test_both_views_teach_the_predictors_alike(self, make_method):
        """S is symmetric, and predictors take no part in restoration: which view comes first does not matter."""
        gradients = []
        for order in ([0, 1], [1, 0]):
            method, batch = make_method().eval(), make_batch(2)
            method({**batch, "views": batch["views"][:, order]})["loss"].backward()
            gradients.append([p.grad for p in method.predictors.parameters()])
        assert all(gradient.abs().max() > 1e-6 for gradient in gradients[0])
        for first, second in zip(*gradients, strict=True):
            torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-4)

    def test_nothing_follows_by_momentum(self, make_method):
        assert list(make_method().momentum_pairs()) == []


def test_batch_norm_stores_the_statistics_of_global_views(make_method):
    method, batch = make_method().train(), make_batch(2)
    alone = copy.deepcopy(method)
    method(batch)
    views = batch["views"].flatten(0, 1)
    features = alone.encoder(views)
    maps = alone.decoder(alone.aspp(features[4]), [features[i].shape[2:] for i in (2, 1, 0)])
    for level, projection, predictor in zip(maps, alone.projections, alone.predictors, strict=True):
        predictor(projection(level.mean((2, 3, 4))))
    expected = dict(alone.named_buffers())
    changed = [
        name for name in expected if "running" in name and not torch.equal(expected[name], method.get_buffer(name))
    ]
    different = [name for name in changed if not torch.allclose(expected[name], method.get_buffer(name), atol=1e-6)]
    assert not different
    assert {norm.momentum for norm in method.modules() if hasattr(norm, "running_mean")} == {0.1}


def test_decoder_fits_the_segmentation_network_but_for_its_skips(make_method, make_encoder, tmp_path):
    method = make_method()
    network = SegmentationNet(1, 3, make_encoder(1), aspp_channels=16, decoder_channels=CHANNELS)
    save_decoder(method, tmp_path / "decoder.pt", encoder_record(method.encoder))
    report = load_decoder(network, tmp_path / "decoder.pt")
    assert {key.split(".")[3] for key in report.missing} == {"project"}
    assert not report.unexpected
    assert not report.mismatched
    for own, loaded in ((method.aspp, network.aspp), (method.decoder.levels[2].up, network.decoder.levels[2].up)):
        for a, b in zip(own.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(a, b)


def test_learns_a_phantom(make_encoder):
    image, _, _ = generate_case(0, (64, 64, 32), "RAS")
    volume = torch.from_numpy(image).float()[None].clamp(-1024, 325)
    volume = (volume - volume.mean()) / volume.std()
    transform = RandGlobalLocalViewsd("image", SIZE).set_random_state(0)
    samples = [transform({"image": volume}) for _ in range(4)]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in ("views", "affines", "local_views")}
    method = PCRLv2(make_encoder(), aspp_channels=16, decoder_channels=(16, 16, 8))
    # At twice this rate rounding, which differs between machines, decides where training ends up.
    optimizer = torch.optim.Adam(method.parameters(), lr=5e-3)
    torch.manual_seed(0)
    history = []
    for _ in range(45):
        output = method(batch)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        history.append({key: float(value.detach()) for key, value in output.items()})
    first, last = ({key: np.mean([h[key] for h in part]) for key in history[0]} for part in (history[:5], history[-5:]))
    assert last["restoration_loss"] < 0.7 * first["restoration_loss"]
    assert last["global_loss"] < first["global_loss"] - 0.3
    assert last["local_loss"] < first["local_loss"] - 0.3
    # Not collapsed: projections differ between views of different places.
    assert last["feature_std"] > 0.5 / math.sqrt(method.feature_channels)


class TestProgress:
    @staticmethod
    def run(method: nn.Module, epochs: int, iteration: int = 0) -> dict[int, float]:
        """beta at every step of a run, or of one that goes on after ``iteration`` steps; three steps per epoch."""
        betas = {}

        def step(engine: Engine, _: None) -> None:
            betas[engine.state.iteration] = float((1 + torch.cos(math.pi * method.progress)) / 2)

        engine = Engine(step)
        if iteration:
            state = {"iteration": iteration, "epoch_length": 3, "max_epochs": epochs}
            engine.add_event_handler(Events.STARTED, lambda e: e.load_state_dict(state))
        TrainingProgress(method).attach(engine)
        engine.run(range(3), max_epochs=epochs)
        return betas

    def test_beta_falls_with_the_epochs(self, make_method):
        betas = self.run(make_method(), 4)
        expected = {step: (1 + math.cos(math.pi * ((step - 1) // 3) / 4)) / 2 for step in range(1, 13)}
        assert betas == pytest.approx(expected)
        assert betas[1] == 1

    @pytest.mark.parametrize("iteration", [1, 3, 7])
    def test_a_resumed_run_goes_on_with_it(self, make_method, iteration):
        straight = self.run(make_method(), 4)
        resumed = self.run(make_method(), 4, iteration)
        assert resumed == {step: beta for step, beta in straight.items() if step > iteration}

    @pytest.mark.parametrize(("progress", "beta"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
    def test_weight_of_the_drawn_level(self, make_method, progress, beta):
        method, batch = make_method().eval(), make_batch(1)
        method.progress.fill_(progress)
        with torch.no_grad():
            output = {key: float(value) for key, value in method(batch).items()}
        assert output["beta"] == pytest.approx(beta, abs=1e-6)
        assert output["loss"] == pytest.approx(total(output, beta), abs=1e-6)

    def test_is_part_of_the_state(self, make_method):
        """Validation, which comes before the first epoch of a resumed run, then weighs as it did before."""
        first, second = make_method(), make_method()
        first.progress.fill_(0.75)
        second.load_state_dict(first.state_dict())
        assert float(second.progress) == 0.75


class TestOverlay:
    FILES = ("train.json", "small.yaml", "methods/pcrlv2.yaml")

    def config(self, *files: str) -> dict:
        return ConfigParser.load_config_files([str(CONFIGS / name) for name in files])

    def test_order_does_not_matter(self):
        train, small, overlay = self.FILES
        assert self.config(train, small, overlay) == self.config(train, overlay, small)

    def test_handlers_are_those_of_train_json_and_one_more(self):
        plain, own = (self.config(*files)["train"]["handlers"] for files in (self.FILES[:2], self.FILES))
        assert own[:-1] == plain
        assert own[-1]["_target_"] == "pgl_ext.handlers.TrainingProgress"

    def test_preprocessing_cuts_local_views(self):
        parser = ConfigParser(self.config(*self.FILES))
        transform = parser.get_parsed_content("train#preprocessing").set_random_state(0)
        sample = transform({"image": torch.rand(1, 80, 80, 60)})
        assert {key: tuple(value.shape) for key, value in sample.items()} == {
            "views": (2, 1, 48, 48, 32),
            "affines": (2, 4, 4),
            "local_views": (6, 1, 16, 16, 16),
        }

    def test_intensities_change_and_targets_stay(self):
        config = self.config(*self.FILES)
        # Everything is applied, to one sample: whatever the trainer's seed does not reach would differ below.
        for part in config["train"]["intensity"]["transforms"][1:]:
            for transform in part["transforms"]:
                transform["prob"] = 1.0
        transform = ConfigParser(config).get_parsed_content("train#intensity")
        batch = {key: value for key, value in make_batch(2).items() if key != "targets"}
        first, second, other = (transform.set_random_state(seed)(batch) for seed in (1, 1, 2))
        for key in ("views", "local_views"):
            assert torch.equal(first[key], second[key])
            for a, b in zip(first[key].flatten(0, 1), other[key].flatten(0, 1), strict=True):
                assert not torch.equal(a, b)
        assert torch.equal(first["targets"], batch["views"])
        assert not torch.equal(first["views"], batch["views"])
        assert torch.equal(first["affines"], batch["affines"])

    def test_patches_are_swapped_in_global_views_alone(self):
        _, views, local_views = self.config(*self.FILES)["train"]["intensity"]["transforms"]
        names = [[t["_target_"].rsplit(".")[-1] for t in part["transforms"]] for part in (views, local_views)]
        assert names[0] == ["RandBatchBlur", "RandBatchNoise", "RandBatchGamma", "RandBatchPatchSwap"]
        assert views["transforms"][:-1] == local_views["transforms"]


@pytest.mark.slow
def test_whole_runs_with_the_overlay_in_both_orders_and_resumed(tmp_path):
    data = write_dataset(tmp_path / "data", 3, shape=(64, 64, 32))
    settings = {
        "data_list_file_path": data,
        "aspp_channels": 16,
        "decoder_channels": [16, 8, 8],
        "cache_dir": tmp_path / "cache",
    }
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    finished = run(training_arguments("methods/pcrlv2.yaml", output_dir=straight, **settings), cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert (straight / "models" / "pgl_encoder.pt").is_file()
    assert (straight / "models" / "pgl_decoder.pt").is_file()
    with open(straight / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    values = [float(row[key]) for row in rows for key in ("loss", "val_loss", "feature_std") if row[key]]
    assert len([row for row in rows if row["loss"]]) == 6
    assert np.isfinite(values).all()
    # The preset after the overlay, killed at its first checkpoint.
    overlays = ("methods/pcrlv2.yaml", "small.yaml")
    arguments = training_arguments(*overlays, output_dir=resumed, **settings)
    process = start(arguments, tmp_path, tmp_path / "log")
    wait_for(lambda: checkpoints(resumed), process, tmp_path / "log")
    process.kill()
    process.wait()
    assert checkpoints(resumed)[-1].name < checkpoints(straight)[-1].name, tail(tmp_path / "log")
    finished = run([*arguments, "--resume", "true"], cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert_same_weights(checkpoints(straight)[-1], checkpoints(resumed)[-1])
