import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_checks import distance, online_parameters, swapped, target_parameters
from programs import CONFIGS
from pytorch_optimizer import LARS

from pgl_ext.aligner import PriorGuidedAligner
from pgl_ext.methods import Method, feature_std
from pgl_ext.tools.study.configs import merged_config


class TestLoss:
    @pytest.mark.parametrize("seed", range(3))
    def test_lies_between_0_and_8(self, make_pgl, make_batch, seed):
        assert 0 <= float(make_pgl(seed)(make_batch(2, seed))["loss"].detach()) <= 8

    def test_is_equation_9_with_the_predictor_on_the_online_path_alone(self, make_pgl, make_batch):
        method, batch = make_pgl().eval(), make_batch()
        with torch.no_grad():
            # A target that differs from the online network, so that mixing them up is noticed.
            for parameter in target_parameters(method):
                parameter.add_(0.1 * torch.randn_like(parameter))
        online, target = [], []
        for view in range(2):
            images = batch["views"][:, view]
            online.append(method.projector(method.encoder(images)[-1]))
            target.append(method.target_projector(method.target_encoder(images)[-1]))
        aligner = PriorGuidedAligner()
        aligned_online = aligner(torch.stack(online, dim=1), batch["affines"], (32, 32, 16))
        aligned_target = aligner(torch.stack(target, dim=1), batch["affines"], (32, 32, 16))
        first, second = method.predictor(aligned_online[:, 0]), method.predictor(aligned_online[:, 1])
        expected = distance(first, aligned_target[:, 1]) + distance(second, aligned_target[:, 0])
        assert float(method(batch)["loss"].detach()) == pytest.approx(expected, abs=1e-5)

    def test_does_not_depend_on_the_order_of_the_views(self, make_pgl, make_batch):
        method, batch = make_pgl().eval(), make_batch()
        with torch.no_grad():
            assert float(method(batch)["loss"]) == pytest.approx(float(method(swapped(batch))["loss"]), abs=1e-5)

    def test_identical_views_and_an_identity_predictor_give_0(self, make_pgl, make_batch):
        method, batch = make_pgl().eval(), make_batch(2)
        method.predictor = torch.nn.Identity()
        same = {key: value[:, :1].expand_as(value) for key, value in batch.items()}
        with torch.no_grad():
            assert float(method(same)["loss"]) == pytest.approx(0, abs=1e-5)

    def test_settings_reach_the_aligner(self, make_pgl, make_batch):
        batch = make_batch(2)
        with torch.no_grad():
            losses = {
                float(make_pgl(**settings).eval()(batch)["loss"])
                for settings in ({}, {"alignment": "paper"}, {"output_size": (3, 3, 1)}, {"sampling_ratio": 1})
            }
        assert len(losses) == 4

    @pytest.mark.parametrize("shape", [(2, 3, 1, 32, 32, 16), (2, 1, 1, 32, 32, 16), (2, 1, 32, 32, 16)])
    def test_other_than_two_views_are_refused(self, make_pgl, shape):
        affines = torch.eye(4).expand(*shape[:2], 4, 4)
        with pytest.raises(ValueError, match="two views") as error:
            make_pgl()({"views": torch.zeros(shape), "affines": affines})
        assert str(shape) in str(error.value)

    def test_views_without_contrast_give_finite_gradients(self, make_pgl, make_batch):
        method, batch = make_pgl(), make_batch(2)
        method({**batch, "views": torch.full_like(batch["views"], -1.5)})["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in online_parameters(method))


class TestTarget:
    def test_equals_the_online_network_at_the_start(self, make_pgl):
        method = make_pgl()
        for online, target in method.momentum_pairs():
            assert online is not target
            state = target.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in online.state_dict().items())
        online, target = (
            [p for module in modules for p in module.parameters()]
            for modules in zip(*method.momentum_pairs(), strict=True)
        )
        for parameters, encoder, projector in (
            (online, method.encoder, method.projector),
            (target, method.target_encoder, method.target_projector),
        ):
            assert list(map(id, parameters)) == list(map(id, [*encoder.parameters(), *projector.parameters()]))

    def test_trained_parameters_are_the_online_ones(self, make_pgl):
        method = make_pgl()
        trained = {id(p) for p in method.parameters() if p.requires_grad}
        assert trained == {id(p) for p in online_parameters(method)}
        assert len(trained) + len(target_parameters(method)) == len(list(method.parameters()))

    def test_gradient_reaches_the_online_network_alone(self, make_pgl, make_batch):
        method = make_pgl()
        method(make_batch())["loss"].backward()
        assert all(p.grad is None for p in target_parameters(method))
        for name, module in (("encoder", method.encoder), ("projector", method.projector), ("pred", method.predictor)):
            # The bias before a normalisation over channels counts too; only exact zeros everywhere are wrong.
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters()), name

    def test_an_optimiser_step_leaves_it_where_it_was(self, make_pgl, make_batch):
        method = make_pgl()
        # Weight decay would move parameters without gradient, too.
        optimizer = LARS([p for p in method.parameters() if p.requires_grad], lr=0.2, weight_decay=0.1)
        online, target = ([p.detach().clone() for p in ps(method)] for ps in (online_parameters, target_parameters))
        method(make_batch())["loss"].backward()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(target, target_parameters(method), strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(online, online_parameters(method), strict=True) if a.ndim > 1)

    def test_its_batch_norm_statistics_come_from_its_own_passes(self, make_pgl, make_batch):
        method, batch = make_pgl().train(), make_batch()
        with torch.no_grad():  # another target than the online network, so that mixing them up shows
            method.target_encoder.conv1.weight.add_(0.1 * torch.randn_like(method.target_encoder.conv1.weight))
            channels = method.target_encoder.conv1(batch["views"].flatten(0, 1)).transpose(0, 1).flatten(1).double()
        method(batch)
        own, online = method.target_encoder.bn1, method.encoder.bn1
        torch.testing.assert_close(own.running_mean.double(), 0.1 * channels.mean(1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own.running_var.double(), 0.9 + 0.1 * channels.var(1), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(own.running_mean, online.running_mean, rtol=1e-2)
        assert int(own.num_batches_tracked) == 1


class TestFeatureStd:
    @pytest.mark.parametrize("channels", [16, 256])
    def test_random_features(self, channels):
        features = torch.randn(8, channels, 6, 6, 2, generator=torch.Generator().manual_seed(0))
        assert float(feature_std(features)) == pytest.approx(1 / math.sqrt(channels), rel=0.02)

    @pytest.mark.parametrize("features", [torch.ones(4, 16, 2, 2, 2), torch.zeros(4, 16, 2, 2, 2)])
    def test_constant_features(self, features):
        assert float(feature_std(features)) == pytest.approx(0, abs=1e-6)

    def test_has_no_gradient_and_ignores_length(self):
        features = torch.randn(4, 8, 3, 3, 3, requires_grad=True)
        value = feature_std(features)
        assert not value.requires_grad
        assert float(feature_std(features * 7)) == pytest.approx(float(value), rel=1e-5)

    def test_pgl_logs_that_of_the_online_projections(self, make_pgl, make_batch):
        method, batch = make_pgl().eval(), make_batch()
        with torch.no_grad():
            projected = method.projector(method.encoder(batch["views"].flatten(0, 1))[-1])
            normalised = F.normalize(projected, dim=1).transpose(0, 1).flatten(1)
            expected = float((normalised.var(dim=1, unbiased=False)).sqrt().mean())
            assert float(method(batch)["feature_std"]) == pytest.approx(expected, rel=1e-4)


class TestAblations:
    """The paper's ablations are settings of the views; affine entries are negative exactly where an axis is flipped."""

    without_crop = {"scale_range": (1, 1), "min_overlap": 1}  # noqa: RUF012

    @pytest.mark.parametrize("flips", [True, False])
    @pytest.mark.parametrize("crops", [True, False])
    def test_run_and_do_what_they_say(self, make_pgl, make_batch, flips, crops):
        settings = ({} if flips else {"flip_prob": 0}) | ({} if crops else self.without_crop)
        batch = make_batch(8, **settings)
        scale = batch["affines"].diagonal(dim1=2, dim2=3)[..., :3]
        assert bool((scale < 0).any()) == flips
        edges = torch.tensor([[-0.5, -0.5, -0.5], [31.5, 31.5, 15.5]])
        corners = scale[:, :, None] * edges + batch["affines"][:, :, None, :3, 3]
        boxes = corners.sort(dim=2).values
        assert torch.allclose(boxes[:, 0], boxes[:, 1], atol=1e-4) != crops
        loss = make_pgl()({key: value[:2] for key, value in batch.items()})["loss"]
        assert 0 < float(loss.detach()) <= 8

    @pytest.mark.parametrize("name", ["pgl_without_crop_scale", "pgl_without_flip_and_crop_scale"])
    def test_without_crop_and_scale_features_are_flipped_alone(self, name, make_batch):
        """No CSAlign is left: white noise, which any resampling would smooth, stays as it is."""
        config = merged_config([str(CONFIGS / file) for file in ("train.json", f"methods/{name}.yaml")])
        config.update({"encoder#widen_factor": 0.125, "hidden_channels": 8, "out_channels": 4})
        views = {setting: config[setting] for setting in ("flip_prob", "scale_range", "min_overlap")}
        affines = make_batch(16, **views)["affines"]
        features = torch.randn(16, 2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        aligned = config.get_parsed_content("network_def").aligner(features, affines, (32, 32, 16))
        flipped = affines.diagonal(dim1=2, dim2=3)[..., :3] < 0
        assert bool(flipped.any()) == (name == "pgl_without_crop_scale")
        for pair in itertools.product(range(16), range(2)):
            axes = [axis + 1 for axis in range(3) if flipped[pair][axis]]
            torch.testing.assert_close(aligned[pair], torch.flip(features[pair], axes), atol=1e-4, rtol=0)

    def test_without_both_the_views_are_the_same(self, make_batch):
        views = make_batch(4, flip_prob=0, **self.without_crop)["views"]
        assert torch.allclose(views[:, 0], views[:, 1], atol=1e-6)


def test_the_base_class_has_no_momentum_and_no_loss():
    assert list(Method().momentum_pairs()) == []
    with pytest.raises(NotImplementedError):
        Method()({})


def test_a_few_steps_on_one_batch_lower_the_loss(make_pgl, make_batch):
    method, batch = make_pgl(), make_batch(2)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = method(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.5 * losses[0], losses
