import csv
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_checks import nt_xent, swapped
from monai.bundle import ConfigParser
from programs import CONFIGS, run, training_arguments

from pgl_ext.aligner import PriorGuidedAligner
from pgl_ext.methods import HSSL
from pgl_ext.networks import SegmentationNet
from pgl_ext.tools.phantom import write_dataset

PARTS = ("image_loss", "task_loss", "group_loss", "voxel_loss")
DECODER = {"aspp_channels": 16, "decoder_channels": (12, 8, 6)}


@pytest.fixture
def make_hssl(make_encoder):
    """Builds a small HSSL for three tasks of two groups; the same seed gives the same weights."""

    def make(seed: int = 0, tasks: int = 3, groups: int = 2, **settings) -> HSSL:
        heads = {"hidden_channels": 32, "out_channels": 16}
        return HSSL(make_encoder(seed), tasks, groups, **{**heads, **DECODER, **settings})

    return make


@pytest.fixture
def make_sourced_batch(make_batch):
    """A batch of pairs whose tasks are 0, 1, 2, 0, ...; tasks 1 and 2 are of one group."""

    def make(size: int = 4, seed: int = 0, **settings) -> dict:
        task = torch.arange(size) % 3
        return {**make_batch(size, seed, **settings), "task": task, "group": (task > 0).long()}

    return make


def losses(method: HSSL, batch: dict) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(value) for name, value in method(batch).items()}


def cross_entropy(logits: torch.Tensor, classes: list[int]) -> float:
    """In NumPy and double precision."""
    z = logits.detach().double().numpy()
    return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), classes]))


class TestLoss:
    def test_is_the_weighted_sum_of_its_parts(self, make_hssl, make_sourced_batch):
        batch = make_sourced_batch()
        parts = losses(make_hssl().eval(), batch)
        for weights in ((1, 1), (0.5, 0), (0, 3)):
            result = losses(make_hssl(task_weight=weights[0], group_weight=weights[1]).eval(), batch)
            assert {name: result[name] for name in PARTS} == {name: parts[name] for name in PARTS}
            expected = sum(w * parts[name] for w, name in zip((1, *weights, 1), PARTS, strict=True))
            assert result["loss"] == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("temperature", [0.1, 0.5])
    def test_image_level_contrasts_pooled_projections(self, make_hssl, make_sourced_batch, temperature):
        method, batch = make_hssl(temperature=temperature).eval(), make_sourced_batch()
        with torch.no_grad():
            first, second = (method.projector(method.encoder(v)[-1].mean((2, 3, 4))) for v in batch["views"].unbind(1))
        assert losses(method, batch)["image_loss"] == pytest.approx(nt_xent(first, second, temperature), rel=1e-4)

    @pytest.mark.parametrize("name", ["task", "group"])
    def test_classification_is_a_linear_layer_on_pooled_features_of_both_views(
        self, make_hssl, make_sourced_batch, name
    ):
        method, batch = make_hssl().eval(), make_sourced_batch()
        expected = []
        for views in batch["views"].unbind(1):
            pooled = method.encoder(views)[-1].mean((2, 3, 4))
            logits = F.linear(pooled, *(method.get_parameter(f"{name}_classifier.{p}") for p in ("weight", "bias")))
            expected.append(cross_entropy(logits, batch[name].tolist()))
        assert losses(method, batch)[f"{name}_loss"] == pytest.approx(np.mean(expected), rel=1e-4)

    @pytest.mark.parametrize(("output_size", "temperature"), [(None, 0.1), ((3, 2, 4), 0.5)])
    def test_voxel_level_contrasts_aligned_cells_of_the_decoder(
        self, make_hssl, make_sourced_batch, output_size, temperature
    ):
        method, batch = make_hssl(output_size=output_size, temperature=temperature).eval(), make_sourced_batch(2)
        decoded = []
        with torch.no_grad():
            for views in batch["views"].unbind(1):
                stem, stage1, stage2, _, deepest = method.encoder(views)
                decoded.append(method.decoder(method.aspp(deepest), [stage2, stage1, stem]))
        decoded = torch.stack(decoded, dim=1)
        assert decoded.shape[2:] == (6, 16, 16, 16)  # the stem's stride is (2, 2, 1)
        size = output_size or (2, 2, 2)
        aligned = PriorGuidedAligner(size)(decoded, batch["affines"], (32, 32, 16))
        cells = aligned.permute(1, 0, 3, 4, 5, 2).reshape(2, 2 * math.prod(size), 6)
        assert losses(method, batch)["voxel_loss"] == pytest.approx(nt_xent(*cells, temperature), rel=1e-4)

    def test_does_not_depend_on_the_order_of_the_views(self, make_hssl, make_sourced_batch):
        method, batch = make_hssl().eval(), make_sourced_batch()
        mirrored = {**batch, **swapped({key: batch[key] for key in ("views", "affines")})}
        first, second = losses(method, batch), losses(method, mirrored)
        assert first == pytest.approx(second, rel=1e-4)

    @pytest.mark.parametrize("seed", range(3))
    def test_all_parts_are_positive_and_finite(self, make_hssl, make_sourced_batch, seed):
        result = losses(make_hssl(seed), make_sourced_batch(3, seed))
        assert set(result) == {"loss", "feature_std", *PARTS} == {"loss", "feature_std", *HSSL.logged}
        assert all(0 < value < 100 for value in result.values())

    def test_views_without_contrast_give_finite_gradients(self, make_hssl, make_sourced_batch):
        method, batch = make_hssl(), make_sourced_batch(2)
        method({**batch, "views": torch.full_like(batch["views"], -1.5)})["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in method.parameters())


class TestSources:
    @pytest.mark.parametrize(("name", "other"), [("task", "group"), ("group", "task")])
    def test_other_labels_change_their_own_term_alone(self, make_hssl, make_sourced_batch, name, other):
        method, batch = make_hssl().eval(), make_sourced_batch()
        before, after = losses(method, batch), losses(method, {**batch, name: batch[name].roll(1)})
        changed = {key for key in before if before[key] != after[key]}
        assert changed == {"loss", f"{name}_loss"}
        assert after["loss"] - before["loss"] == pytest.approx(after[f"{name}_loss"] - before[f"{name}_loss"], rel=1e-3)

    def test_the_gradient_of_each_term_reaches_its_classifier(self, make_hssl, make_sourced_batch):
        batch = make_sourced_batch()
        for weights, classifier in (((1, 0), "task_classifier"), ((0, 1), "group_classifier")):
            method = make_hssl(task_weight=weights[0], group_weight=weights[1])
            method(batch)["loss"].backward()
            for name in ("task_classifier", "group_classifier"):
                assert bool(method.get_submodule(name).weight.grad.abs().sum() > 0) == (name == classifier)

    @pytest.mark.parametrize("name", ["task", "group"])
    def test_a_single_class_is_said_once_and_costs_nothing(self, make_hssl, make_sourced_batch, name, caplog):
        with caplog.at_level(logging.WARNING):
            method = make_hssl(**{f"{name}s": 1})
        (record,) = caplog.records
        assert f"{name}_loss stays 0" in record.getMessage()
        caplog.clear()
        batch = make_sourced_batch()
        batch[name] = torch.zeros_like(batch[name])
        for _ in range(2):
            result = method(batch)
            assert result[f"{name}_loss"] == 0
        result["loss"].backward()
        assert (method.get_submodule(f"{name}_classifier").weight.grad == 0).all()
        assert not caplog.records


class TestNetwork:
    def test_gradient_reaches_every_part(self, make_hssl, make_sourced_batch):
        method = make_hssl()
        method(make_sourced_batch())["loss"].backward()
        children = ("encoder", "aspp", "decoder", "projector", "task_classifier", "group_classifier")
        assert {name.split(".")[0] for name, _ in method.named_parameters()} == set(children)
        for name, parameter in method.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name

    def test_the_decoder_is_that_of_the_segmentation_network(self, make_hssl, make_encoder):
        state = {k: v for k, v in make_hssl().state_dict().items() if k.startswith(("encoder.", "aspp.", "decoder."))}
        shapes = {key: value.shape for key, value in state.items()}
        stock = SegmentationNet(1, 6, make_encoder(1), **DECODER).state_dict()
        assert shapes == {key: value.shape for key, value in stock.items()}

    def test_nothing_follows_by_momentum(self, make_hssl):
        assert list(make_hssl().momentum_pairs()) == []

    def test_it_logs_the_spread_of_the_projections(self, make_hssl, make_sourced_batch):
        method, batch = make_hssl().eval(), make_sourced_batch()
        assert method.feature_channels == 16
        with torch.no_grad():
            projected = method.projector(method.encoder(batch["views"].flatten(0, 1))[-1].mean((2, 3, 4))).numpy()
        normalised = projected / np.linalg.norm(projected, axis=1, keepdims=True)
        assert losses(method, batch)["feature_std"] == pytest.approx(normalised.std(axis=0).mean(), rel=1e-4)


class TestBatches:
    def test_a_single_pair_is_evaluated_but_not_trained_on(self, make_hssl, make_sourced_batch):
        method, batch = make_hssl(), make_sourced_batch(1)
        with pytest.raises(ValueError, match=r"single pair: choose --batch_size and --micro_batch_size"):
            method(batch)
        result = losses(method.eval(), batch)
        assert result["image_loss"] == 0
        assert all(math.isfinite(value) for value in result.values())
        assert result["voxel_loss"] > 0

    def test_other_than_two_views_are_refused(self, make_hssl):
        with pytest.raises(ValueError, match=r"HSSL compares two views: .* got \(2, 3, 1, 32, 32, 16\)"):
            make_hssl()({"views": torch.zeros(2, 3, 1, 32, 32, 16)})

    def test_an_unknown_alignment(self, make_hssl, make_sourced_batch):
        with pytest.raises(ValueError, match="alignment must be one of"):
            make_hssl(alignment="none")(make_sourced_batch(2))


def test_a_few_steps_on_one_batch_lower_every_part(make_hssl, phantom_batch):
    sources = torch.tensor([0, 0, 0, 1, 1, 1])
    method, batch = make_hssl(tasks=2), {**phantom_batch, "task": sources, "group": sources}
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    history = []
    for _ in range(25):
        optimizer.zero_grad()
        result = method(batch)
        result["loss"].backward()
        optimizer.step()
        history.append([float(result[name].detach()) for name in PARTS])
    first, last = history[0], np.mean(history[-3:], axis=0)
    assert (last < 0.7 * np.asarray(first)).all(), (first, last)
    # The classifiers have learnt these sources, not others.
    method.train()
    right, wrong = (losses(method, {**batch, "task": task, "group": task}) for task in (sources, 1 - sources))
    assert wrong["task_loss"] > right["task_loss"] + 0.5
    assert wrong["group_loss"] > right["group_loss"] + 0.5


class TestOverlay:
    def test_goes_with_the_small_preset_in_any_order(self):
        files = [str(CONFIGS / name) for name in ("train.json", "small.yaml", "methods/hssl.yaml")]
        first, second = (ConfigParser.load_config_files([files[0], *rest]) for rest in (files[1:], files[:0:-1]))
        assert first == second

    def test_adds_to_the_transforms_and_takes_none_away(self):
        train, hssl = str(CONFIGS / "train.json"), str(CONFIGS / "methods" / "hssl.yaml")
        before, after = (
            ConfigParser.load_config_files(files)["train"]["preprocessing"]["transforms"]
            for files in ([train], [train, hssl])
        )
        assert after[0] == before[0]
        assert after[1] == {**before[1], "keys": [*before[1]["keys"], "task", "group"]}
        assert [step["keys"] for step in after[2:]] == ["task", "group"]


def write_source(folder: Path, seed: int, **fields: str | None) -> str:
    """A data list of three phantoms with these top-level fields."""
    path = Path(write_dataset(folder, 3, shape=(64, 64, 32), seed=seed))
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return str(path)


@pytest.mark.slow
def test_whole_runs(tmp_path):
    """Two data sets of two groups; and one of which nothing is said, which ends with one message."""
    liver = write_source(tmp_path / "liver", 0, name="liver", group="abdomen CT")
    neck = write_source(tmp_path / "neck", 1, name="neck", task="parotids", group="head-and-neck CT")
    out = tmp_path / "out"
    settings = {"max_epochs": 2, "aspp_channels": 16, "decoder_channels": [16, 8, 8], "output_dir": out}
    result = run(training_arguments("methods/hssl.yaml", data_list_file_path=[liver, neck], **settings), tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    state = torch.load(out / "models" / "pgl_encoder.pt", weights_only=True)
    assert all(key.startswith("encoder.") for key in state)
    assert (out / "models" / "pgl_decoder.pt").is_file()
    described = json.loads((out / "models" / "pgl_encoder.json").read_text())
    assert described["method"] == "HSSL"
    assert described["data"]["tasks"] == ["liver", "parotids"]
    assert described["data"]["groups"] == ["abdomen CT", "head-and-neck CT"]
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert sum(bool(row["loss"]) for row in rows) == 10  # 5 training volumes, 4 pairs each, 4 per step

    unknown = write_source(tmp_path / "unknown", 2, name=None)
    arguments = training_arguments("methods/hssl.yaml", data_list_file_path=unknown, output_dir=tmp_path / "none")
    refused = run(arguments, tmp_path)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stdout
    assert "3 of 3 scans have no 'task'" in refused.stdout
