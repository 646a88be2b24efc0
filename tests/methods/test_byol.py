import csv
import math

import numpy as np
import pytest
import torch
from method_checks import distance, online_parameters, swapped, target_parameters
from monai.bundle import ConfigParser
from programs import CONFIGS, run, training_arguments
from torch import nn

from pgl_ext.methods import BYOL
from pgl_ext.networks.heads import MLPHead
from pgl_ext.tools.phantom import write_dataset


@pytest.fixture
def make_byol(make_encoder):
    """Builds a small BYOL; the same seed gives the same weights."""

    def make(seed: int = 0) -> BYOL:
        return BYOL(make_encoder(seed), hidden_channels=32, out_channels=16)

    return make


class TestHead:
    def test_is_the_formula(self):
        head = MLPHead(5, 7, 3).eval()
        with torch.no_grad():
            for tensor in (head[1].running_mean, head[1].weight, head[1].bias):
                tensor.normal_()
            head[1].running_var.uniform_(0.5, 2)
        x = torch.randn(4, 5)
        state = {key: value.double().numpy() for key, value in head.state_dict().items()}
        hidden = x.double().numpy() @ state["0.weight"].T
        hidden = (hidden - state["1.running_mean"]) / np.sqrt(state["1.running_var"] + 1e-5)
        hidden = np.maximum(hidden * state["1.weight"] + state["1.bias"], 0)
        expected = hidden @ state["3.weight"].T + state["3.bias"]
        np.testing.assert_allclose(head(x).detach().numpy(), expected, atol=1e-5)

    def test_default_size(self):
        # Linear 2048 x 4096, batch norm, linear 4096 x 256 with bias.
        assert sum(p.numel() for p in MLPHead(2048).parameters()) == 2048 * 4096 + 2 * 4096 + 4096 * 256 + 256


class TestLoss:
    @pytest.mark.parametrize("seed", range(3))
    def test_lies_between_0_and_8(self, make_byol, make_batch, seed):
        assert 0 <= float(make_byol(seed)(make_batch(2, seed))["loss"].detach()) <= 8

    def test_is_two_minus_two_cosines_of_pooled_features_both_ways(self, make_byol, make_batch):
        method, batch = make_byol().eval(), make_batch()
        with torch.no_grad():
            # A target that differs from the online network, so that mixing them up is noticed.
            for parameter in target_parameters(method):
                parameter.add_(0.1 * torch.randn_like(parameter))
        prediction, target = [], []
        for view in range(2):
            images = batch["views"][:, view]
            pooled, target_pooled = (e(images)[-1].mean((2, 3, 4)) for e in (method.encoder, method.target_encoder))
            prediction.append(method.predictor(method.projector[-1](pooled)))
            target.append(method.target_projector[-1](target_pooled))
        expected = distance(prediction[0], target[1]) + distance(prediction[1], target[0])
        assert float(method(batch)["loss"].detach()) == pytest.approx(expected, abs=1e-5)

    def test_does_not_depend_on_the_order_of_the_views(self, make_byol, make_batch):
        method, batch = make_byol().eval(), make_batch()
        with torch.no_grad():
            assert float(method(batch)["loss"]) == pytest.approx(float(method(swapped(batch))["loss"]), abs=1e-5)

    def test_identical_views_and_an_identity_predictor_give_0(self, make_byol, make_batch):
        method, batch = make_byol().eval(), make_batch(2)
        method.predictor = nn.Identity()
        same = {key: value[:, :1].expand_as(value) for key, value in batch.items()}
        with torch.no_grad():
            assert float(method(same)["loss"]) == pytest.approx(0, abs=1e-5)

    @pytest.mark.parametrize(("train", "size"), [(True, 1), (False, 1), (False, 3)])
    def test_a_single_pair_and_evaluation(self, make_byol, make_batch, train, size):
        result = make_byol().train(train)(make_batch(size))
        assert all(bool(torch.isfinite(value)) for value in result.values())

    def test_other_than_two_views_are_refused(self, make_byol):
        with pytest.raises(ValueError, match=r"BYOL compares two views: .* got \(2, 3, 1, 32, 32, 16\)"):
            make_byol()({"views": torch.zeros(2, 3, 1, 32, 32, 16)})


class Moved(nn.Module):
    """An encoder whose deepest features of each second view are flipped: their cells change places."""

    def __init__(self, encoder: nn.Module, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.axes = axes

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = self.encoder(x)
        deepest = features[-1].clone()
        deepest[1::2] = deepest[1::2].flip(self.axes)
        return [*features[:-1], deepest]


@pytest.mark.parametrize("axes", [(2,), (3, 4), (2, 3, 4)])
def test_position_does_not_count_as_it_does_in_pgl(make_byol, make_pgl, make_batch, axes):
    batch = make_batch()
    change = {}
    for name, method in (("byol", make_byol().eval()), ("pgl", make_pgl().eval())):
        with torch.no_grad():
            before = float(method(batch)["loss"])
            method.encoder = Moved(method.encoder, axes)
            method.target_encoder = Moved(method.target_encoder, axes)
            change[name] = abs(float(method(batch)["loss"]) - before)
    assert change["byol"] < 1e-5
    assert change["pgl"] > 1e-3


def test_gradient_reaches_the_online_network_alone(make_byol, make_batch):
    method = make_byol()
    method(make_batch())["loss"].backward()
    assert all(p.grad is None for p in target_parameters(method))
    for name, module in (("encoder", method.encoder), ("projector", method.projector), ("pred", method.predictor)):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters()), name


def test_target_follows_encoder_and_projector(make_byol):
    method = make_byol()
    followed = {id(p) for online, _ in method.momentum_pairs() for p in online.parameters()}
    assert followed == {id(p) for module in (method.encoder, method.projector) for p in module.parameters()}
    trained = {id(p) for p in method.parameters() if p.requires_grad}
    assert trained == {id(p) for p in online_parameters(method)}


def test_it_logs_the_spread_of_the_online_projections(make_byol, make_batch):
    method, batch = make_byol().eval(), make_batch(4)
    assert method.feature_channels == 16
    with torch.no_grad():
        projected = method.projector(method.encoder(batch["views"].flatten(0, 1))[-1]).numpy()
    normalised = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    assert float(method(batch)["feature_std"]) == pytest.approx(normalised.std(axis=0).mean(), rel=1e-4)


def test_a_few_steps_on_one_batch_lower_the_loss(make_byol, phantom_batch):
    method = make_byol()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = method(phantom_batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.5 * losses[0], losses


class TestOverlay:
    def test_goes_with_the_small_preset_in_any_order(self):
        files = [str(CONFIGS / name) for name in ("train.json", "small.yaml", "methods/byol.yaml")]
        first, second = (ConfigParser.load_config_files([files[0], *rest]) for rest in (files[1:], files[:0:-1]))
        assert first == second

    def test_changes_the_method_alone(self):
        train, byol = str(CONFIGS / "train.json"), str(CONFIGS / "methods" / "byol.yaml")
        before, after = (ConfigParser.load_config_files(files) for files in ([train], [train, byol]))
        assert {key for key in after if after[key] != before.get(key)} == {"network_def"}
        parser = ConfigParser(after)
        parser["encoder"].update(layers=[1, 1, 1, 1], block="basic", widen_factor=0.125)
        method = parser.get_parsed_content("network_def")
        assert (method.predictor[0].out_features, method.predictor[-1].out_features) == (4096, 256)


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    data = write_dataset(tmp_path / "data", 3, shape=(64, 64, 32))
    settings = {"data_list_file_path": data, "output_dir": tmp_path / "out", "max_epochs": 2}
    result = run(training_arguments("methods/byol.yaml", **settings), tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    state = torch.load(tmp_path / "out" / "models" / "pgl_encoder.pt", weights_only=True)
    assert all(key.startswith("encoder.") for key in state)
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert sum(bool(row["loss"]) for row in rows) == 4  # 2 training volumes, 4 pairs each, 4 per step
