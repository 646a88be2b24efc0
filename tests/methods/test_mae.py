"""Masked restoration, alone (MAE) and with PGL's consistency (PGLMAE)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_checks import nt_xent

from pgl_ext.methods import MAE, PGL, PGLMAE
from pgl_ext.networks import DynUNet, SegmentationNet
from pgl_ext.tools.phantom import generate_case
from pgl_ext.transforms import RandBlockMaskd

HEADS = {"hidden_channels": 16, "out_channels": 8}


def make_network(seed: int = 0, channels: int = 1) -> DynUNet:
    torch.manual_seed(seed)
    return DynUNet(channels, channels, filters=(4, 8, 12), strides=(1, 2, (2, 2, 1)))


def make_pgl_mae(seed: int = 0, **settings) -> PGLMAE:
    return PGLMAE(make_network(seed), **{**HEADS, **settings})


@pytest.fixture
def masked_batch(make_batch):
    """A batch of view pairs with masks."""

    def make(size: int = 2, seed: int = 0) -> dict:
        batch = make_batch(size, seed)
        transform = RandBlockMaskd("views").set_random_state(seed)
        masks = [transform({"views": views})["mask"] for views in batch["views"]]
        return {**batch, "mask": torch.stack(masks)}

    return make


both = pytest.mark.parametrize("make", [lambda: MAE(make_network()), make_pgl_mae], ids=["mae", "pgl_mae"])


def hidden_error(network, batch: dict) -> float:
    """Mean over views of the mean squared error of their hidden voxels, in NumPy and double precision."""
    errors = []
    for views, masks in zip(batch["views"], batch["mask"], strict=True):
        for view, mask in zip(views, masks, strict=True):
            with torch.no_grad():
                restored = network(torch.where(mask, 0.0, view)[None])[0].double().numpy()
            where = np.broadcast_to(mask.numpy(), view.shape)
            errors.append(((restored - view.double().numpy())[where] ** 2).mean())
    return float(np.mean(errors))


class TestMAE:
    def test_loss_is_that_of_the_hidden_voxels_of_each_view(self, masked_batch):
        network, batch = make_network(), masked_batch()
        assert float(MAE(network).eval()(batch)["loss"].detach()) == pytest.approx(
            hidden_error(network, batch), rel=1e-5
        )

    def test_of_several_channels(self, masked_batch):
        batch = masked_batch()
        batch["views"] = torch.cat([batch["views"], -2 * batch["views"]], dim=2)
        network = make_network(channels=2)
        assert float(MAE(network).eval()(batch)["loss"].detach()) == pytest.approx(
            hidden_error(network, batch), rel=1e-5
        )

    def test_does_not_depend_on_what_is_hidden_but_through_the_target(self, masked_batch):
        """The gradient is that of a network that never saw it: changing hidden voxels changes no output."""
        method, batch = MAE(make_network()).eval(), masked_batch()
        seen = []
        method.encoder.input_block.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        changed = torch.where(batch["mask"], torch.randn_like(batch["views"]), batch["views"])
        losses = [float(method({**batch, "views": views})["loss"].detach()) for views in (batch["views"], changed)]
        assert torch.equal(*seen)
        assert losses[0] != losses[1]

    def test_learns_to_restore_a_phantom(self):
        """Better than the mean of what is hidden."""
        image, _, _ = generate_case(0, (32, 32, 16), "RAS")
        view = torch.from_numpy(image).float()
        views = ((view - view.mean()) / view.std())[None, None, None].expand(1, 2, -1, -1, -1, -1)
        mask = RandBlockMaskd("views").set_random_state(0)({"views": views[0]})["mask"][None]
        method = MAE(make_network())
        optimizer = torch.optim.AdamW(method.parameters(), lr=0.01)
        for _ in range(80):
            optimizer.zero_grad()
            loss = method({"views": views, "mask": mask})["loss"]
            loss.backward()
            optimizer.step()
        hidden = torch.cat([views[0, v][mask[0, v]] for v in range(2)])
        assert float(loss.detach()) < 0.5 * float(hidden.var())


class TestPGLMAE:
    def test_is_the_weighted_sum_of_its_parts(self, masked_batch):
        weights = {"restoration_weight": 3.0, "consistency_weight": 0.5, "contrast_weight": 0.25}
        method, batch = make_pgl_mae(**weights, temperature=0.2).eval(), masked_batch(3)
        output = {name: value.detach() for name, value in method(batch).items()}
        views, mask = batch["views"].flatten(0, 1), batch["mask"].flatten(0, 1)
        deepest = method.encoder.features(views.masked_fill(mask, 0))[-1].detach().mean(dim=(2, 3, 4))
        expected = {
            "restoration_loss": hidden_error(method.encoder, batch),
            "contrast_loss": nt_xent(deepest[0::2], deepest[1::2], 0.2),
        }
        for name, value in expected.items():
            assert float(output[name]) == pytest.approx(value, rel=1e-4), name
        total = 3 * expected["restoration_loss"] + 0.5 * output["consistency_loss"] + 0.25 * expected["contrast_loss"]
        assert float(output["loss"]) == pytest.approx(float(total), rel=1e-4)
        assert method.logged == ("restoration_loss", "consistency_loss", "contrast_loss")

    def test_with_nothing_hidden_the_consistency_is_pgls(self, masked_batch):
        method, pgl = make_pgl_mae().eval(), PGL(make_network(), **HEADS).eval()
        pgl.load_state_dict({k: v for k, v in method.state_dict().items() if k in pgl.state_dict()})
        batch = masked_batch()
        batch["mask"] = torch.zeros_like(batch["mask"])
        output = method(batch)
        assert float(output["consistency_loss"]) == pytest.approx(float(pgl(batch)["loss"].detach()), rel=1e-6)
        assert float(output["restoration_loss"]) == 0

    def test_the_target_sees_whole_views_and_the_online_network_masked_ones(self, masked_batch):
        method, batch = make_pgl_mae().eval(), masked_batch()
        seen = {}
        for name in ("encoder", "target_encoder"):
            block = getattr(method, name).input_block
            block.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        method(batch)
        views = batch["views"].flatten(0, 1)
        assert torch.equal(seen["target_encoder"], views)
        assert torch.equal(seen["encoder"], views.masked_fill(batch["mask"].flatten(0, 1), 0))

    def test_the_target_has_no_decoder_and_follows(self):
        method = make_pgl_mae()
        assert {name.split(".")[0] for name, _ in method.target_encoder.named_parameters()} == set(
            method.encoder.encoder_parts
        )
        trained = {id(p) for p in method.parameters() if p.requires_grad}
        assert trained == {
            id(p) for part in (method.encoder, method.projector, method.predictor) for p in part.parameters()
        }

    def test_without_views_that_are_two(self, masked_batch):
        batch = masked_batch()
        with pytest.raises(ValueError, match="PGLMAE compares two views"):
            make_pgl_mae()({name: value[:, :1] for name, value in batch.items()})


@both
def test_gradients_reach_every_parameter_that_is_trained(make, masked_batch):
    method = make()
    method(masked_batch())["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@both
def test_views_without_contrast_give_finite_gradients(make, masked_batch):
    method, batch = make(), masked_batch()
    method({**batch, "views": torch.full_like(batch["views"], -1.5)})["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.requires_grad)


@both
def test_the_decoder_that_is_written_is_all_but_the_head(make):
    method = make()
    names = {name.split(".")[0] for name in method.decoder_state()}
    assert "upsamples" in names
    assert "output_block" not in names


@both
def test_a_batch_without_masks(make, make_batch):
    with pytest.raises(ValueError, match=r"'mask' hides, but the batch has \['affines', 'views'\].*RandBlockMaskd"):
        make()(make_batch())


def test_on_the_papers_network(masked_batch, make_encoder):
    network = SegmentationNet(1, 1, make_encoder(), aspp_channels=8, decoder_channels=(8, 6, 4))
    method = PGLMAE(network, **HEADS)
    assert method(masked_batch())["loss"].detach() > 0
    assert method.encoder.feature_network is network.encoder
