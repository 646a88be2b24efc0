import json

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from programs import CONFIGS, fine_tuning_arguments, run, training_arguments
from torch import nn

from pgl_ext.engines import PretrainEvaluator
from pgl_ext.methods import ModelsGenesis
from pgl_ext.networks import ResNetEncoder, SegmentationNet
from pgl_ext.tools.phantom import generate_case, write_dataset
from pgl_ext.transforms import RandBezierIntensity, RandDeformedCopyd, RandLocalShuffle, RandPaint

WIDTHS = {"aspp_channels": 8, "decoder_channels": (8, 6, 4)}
OVERLAY, ORIGINAL = "methods/models_genesis.yaml", "methods/models_genesis_original.yaml"


@pytest.fixture
def make_method(make_encoder):
    """Builds a small Models Genesis; the same seed gives the same weights."""
    return lambda seed=0: ModelsGenesis(SegmentationNet(1, 1, make_encoder(seed), **WIDTHS))


@pytest.fixture
def deform():
    """Adds the deformed copies to a batch of views."""
    transform = RandDeformedCopyd(
        "views", [RandLocalShuffle(1.0, blocks=500), RandBezierIntensity(1.0), RandPaint(1.0)]
    )

    def add(batch: dict, seed: int = 0) -> dict:
        transform.set_random_state(seed)
        deformed = [transform({"views": views})["deformed"] for views in batch["views"]]
        return {**batch, "deformed": torch.stack(deformed)}

    return add


class TestNetwork:
    def test_is_the_segmentation_network_with_one_output(self, make_method, make_encoder):
        method = make_method()
        network = SegmentationNet(1, 1, make_encoder(), **WIDTHS)
        assert {k: v.shape for k, v in method.state_dict().items()} == {
            f"encoder.{k}": v.shape for k, v in network.state_dict().items()
        }
        assert method.feature_channels == method.encoder.level_channels[-1] == 64
        assert list(method.momentum_pairs()) == []

    def test_of_the_paper(self):
        """48,536,270 parameters with 14 classes, of whose 32 weights and a bias each one is left."""
        with torch.device("meta"):
            method = ModelsGenesis(SegmentationNet(1, 1))
        assert sum(p.numel() for p in method.parameters()) == 48_536_270 - 13 * 33

    def test_restores_every_channel_of_its_input(self, deform):
        encoder = ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.125, in_channels=2)
        method = ModelsGenesis(SegmentationNet(2, 2, encoder, **WIDTHS))
        views = torch.randn(1, 2, 2, 32, 32, 16)
        assert 0 < float(method(deform({"views": views}))["loss"].detach()) < 1


class TestLoss:
    def test_is_the_mean_squared_error_of_the_sigmoid_output_and_the_view_in_0_to_1(
        self, make_method, make_encoder, make_batch, deform
    ):
        method, batch = make_method().eval(), deform(make_batch(2))
        network = SegmentationNet(1, 1, make_encoder(), **WIDTHS).eval()
        network.load_state_dict(method.encoder.state_dict())
        errors = []
        for views, copies in zip(batch["views"], batch["deformed"], strict=True):
            for view, copy in zip(views.double().numpy(), copies, strict=True):
                with torch.no_grad():
                    restored = 1 / (1 + np.exp(-network(copy[None])[0].double().numpy()))
                errors.append(((restored - (view - view.min()) / np.ptp(view)) ** 2).mean())
        assert len(errors) == 4
        with torch.no_grad():
            assert float(method(batch)["loss"]) == pytest.approx(np.mean(errors), rel=1e-4)

    @pytest.mark.parametrize("seed", range(3))
    def test_lies_between_0_and_1(self, make_method, make_batch, deform, seed):
        assert 0 < float(make_method(seed)(deform(make_batch(2, seed)))["loss"].detach()) < 1

    def test_target_is_the_clean_view_and_input_the_deformed_one(self, make_method, make_batch, deform):
        method, batch = make_method().eval(), deform(make_batch(1))
        seen = []
        method.encoder.encoder.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            # Whatever comes in, 0 comes out, whose sigmoid is 1/2.
            nn.init.zeros_(method.encoder.decoder.head.weight)
            loss = float(method(batch)["loss"])
        assert torch.equal(seen[0], batch["deformed"].flatten(0, 1))
        view = batch["views"][0].numpy()
        low, high = (bound(view, axis=(1, 2, 3, 4), keepdims=True) for bound in (np.min, np.max))
        assert loss == pytest.approx(float((((view - low) / (high - low) - 0.5) ** 2).mean()), rel=1e-5)

    def test_does_not_depend_on_the_views_own_ranges(self, make_method, make_batch, deform):
        method, batch = make_method().eval(), deform(make_batch(2))
        with torch.no_grad():
            expected = float(method(batch)["loss"])
            assert float(method({**batch, "views": 3 * batch["views"] - 7})["loss"]) == pytest.approx(
                expected, rel=1e-4
            )

    def test_without_deformed_copies(self, make_method, make_batch):
        with pytest.raises(
            ValueError, match=r"'deformed', but the batch has \['affines', 'views'\].*RandDeformedCopyd"
        ):
            make_method()(make_batch(1))

    def test_views_without_contrast_give_finite_gradients(self, make_method):
        views = torch.full((2, 2, 1, 32, 32, 16), -1.5)
        method = make_method()
        method({"views": views, "deformed": views})["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in method.parameters())


class TestTraining:
    def test_gradients_reach_every_parameter(self, make_method, make_batch, deform):
        method = make_method()
        method(deform(make_batch(2)))["loss"].backward()
        for name, parameter in method.named_parameters():
            assert parameter.grad.abs().sum() > 0, name

    def test_learns_to_restore_a_phantom(self, make_method):
        image, _, _ = generate_case(0, (32, 32, 16), "RAS")
        view = torch.from_numpy(image).float()
        views = ((view - view.mean()) / view.std())[None, None, None].expand(1, 2, -1, -1, -1, -1)
        transform = RandDeformedCopyd("views", [RandBezierIntensity(1.0), RandPaint(1.0)]).set_random_state(0)
        batch = {"views": views, "deformed": transform({"views": views[0]})["deformed"][None]}
        method = make_method()
        optimizer = torch.optim.SGD(method.parameters(), lr=1.0, momentum=0.9)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = method(batch)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        spread = float(((view - view.min()) / (view.max() - view.min())).var())
        assert losses[-1] < 0.5 * spread < losses[0], (spread, losses)

    def test_feature_std_is_that_of_the_deepest_features(self, make_method, make_batch, deform):
        method, batch = make_method().eval(), deform(make_batch(2))
        with torch.no_grad():
            features = method.encoder.features(batch["deformed"].flatten(0, 1))[-1].double().numpy()
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            expected = features.std(axis=(0, 2, 3, 4)).mean()
            assert float(method(batch)["feature_std"]) == pytest.approx(expected, rel=1e-4)

    def test_is_validated_on_batches_with_clean_views(self, make_method, make_batch, deform):
        batches = [deform(make_batch(2, seed), seed) for seed in range(2)]
        method = make_method()
        evaluator = PretrainEvaluator("cpu", batches, method)
        evaluator.run()
        metrics = dict(evaluator.state.metrics)
        with torch.no_grad():
            losses = [float(method.eval()(batch)["loss"]) for batch in batches]
        assert metrics["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert 0 <= metrics["val_retrieval_top1"] <= 1


class TestOverlays:
    def config(self, *names: str) -> dict:
        return ConfigParser.load_config_files([str(CONFIGS / name) for name in ("train.json", *names)])

    @pytest.mark.parametrize("overlays", [(OVERLAY,), (OVERLAY, ORIGINAL)], ids=["ours", "original"])
    def test_order_does_not_matter(self, overlays):
        assert self.config("small.yaml", *overlays) == self.config(*reversed(overlays), "small.yaml")

    def test_samples_have_views_and_deformed_copies(self):
        parser = ConfigParser(self.config(OVERLAY, "small.yaml"))
        sample = parser.get_parsed_content("train#preprocessing")({"image": torch.randn(1, 70, 70, 48)})
        assert set(sample) == {"views", "affines", "deformed"}
        assert sample["views"].shape == sample["deformed"].shape == (2, 1, 48, 48, 32)
        # No intensity changes beside the deformations.
        batch = {key: value[None] for key, value in sample.items()}
        changed = parser.get_parsed_content("train#intensity").set_random_state(0)(batch)
        assert torch.equal(changed["views"], batch["views"])

    def test_original_optimiser(self):
        parser = ConfigParser(self.config(OVERLAY, ORIGINAL, "small.yaml"))
        parser["network"], parser["steps_per_epoch"] = "@network_def", 3
        optimizer = parser.get_parsed_content("optimizer")
        assert type(optimizer) is torch.optim.SGD
        assert {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0}.items() <= optimizer.param_groups[0].items()
        scheduler, rates = parser.get_parsed_content("lr_scheduler"), []
        for _ in range(3 * 90):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == [1.0] * 120 + [0.5] * 120 + [0.25] * 30  # halved every 40 epochs
        assert parser.get_parsed_content("patience") == 50
        assert parser.get_parsed_content("val_interval") == 1

    def test_original_stops_where_validation_no_longer_falls(self):
        parser = ConfigParser(self.config(OVERLAY, ORIGINAL, "small.yaml"))
        parser["patience"] = 3
        parser["validate#evaluator"] = {"_target_": "types.SimpleNamespace", "state": Engine(lambda *_: None).state}
        losses = iter([0.5, 0.4, 0.4, 0.3, 0.3, 0.35, 0.31, 0.1])
        metrics = parser.get_parsed_content("validate#evaluator").state.metrics
        trainer = Engine(lambda *_: None)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: metrics.update(val_loss=next(losses)))
        count = len(parser["train#handlers"])
        for index in (count - 2, count - 1):
            parser.get_parsed_content(f"train#handlers#{index}").attach(trainer)
        trainer.run([0], max_epochs=8)
        assert trainer.state.epoch == 7


@pytest.mark.slow
def test_encoder_and_decoder_go_from_pre_training_to_fine_tuning(tmp_path):
    write_dataset(tmp_path / "data", 3, shape=(64, 64, 32))
    settings = {"aspp_channels": 16, "decoder_channels": [16, 8, 8], "max_epochs": 2}  # as in TINY_SEGMENTATION
    images, pretrained = tmp_path / "data" / "imagesTr", tmp_path / "pretrained"
    arguments = training_arguments(OVERLAY, ORIGINAL, dataset_dir=images, output_dir=pretrained, **settings)
    finished = run(arguments, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout[-3000:]
    files = {f"pretrained_{part}": pretrained / "models" / f"pgl_{part}.pt" for part in ("encoder", "decoder")}
    for path in files.values():
        assert json.loads(path.with_suffix(".json").read_text())["method"] == "ModelsGenesis"
    out = tmp_path / "out"
    arguments = fine_tuning_arguments(dataset_dir=tmp_path / "data", output_dir=out, max_epochs=1, **files)
    finished = run(arguments, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout[-3000:]
    described = json.loads((out / "models" / "model.json").read_text())
    for name, path in files.items():
        count = len(torch.load(path, weights_only=True))
        assert f"{path}: {count} of {count} tensors loaded" in finished.stdout
        assert described[name] == str(path)
    assert "unexpected" not in finished.stdout


def test_checkpoints_of_before_are_loaded(make_method):
    """There the method was the segmentation network itself, and had its names of tensors."""
    source, method = make_method(seed=1), make_method()
    method.load_state_dict(
        {key.removeprefix("encoder."): value for key, value in source.state_dict().items()}, strict=True
    )
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in method.state_dict().items())
