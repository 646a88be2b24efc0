"""Published weights: recognised, loaded in full, and the same features as the stock class that they are of."""

from __future__ import annotations

import logging

import pytest
import torch
from made_public import FULL_SIZE, PUBLISHED, ct_fm, plain_unet, res_enc, swin_ssl
from made_weights import as_trained, small_network
from monai.networks.nets import ResNet, SwinUNETR

from pgl_ext.methods import MAE, PGL, PGLMAE
from pgl_ext.networks.build import ENCODERS, NETWORKS, build
from pgl_ext.weights import (
    InputRecord,
    compare_states,
    decoder_file,
    load_decoder,
    load_encoder,
    recorded_architecture,
    recorded_input,
    start_method,
)
from pgl_ext.weights.public import read_public

SIZE = (32, 32, 32)
every = pytest.mark.parametrize("make", PUBLISHED.values(), ids=PUBLISHED)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@every
def test_features_are_those_of_the_stock_class(make, tmp_path):
    """Of a network that is built from the file alone; whatever it has besides is said."""
    published = make()
    path = tmp_path / "published.pth"
    torch.save(published.content, path)
    architecture = recorded_architecture(path)
    assert architecture["family"] == published.family
    network = build(ENCODERS, architecture, path).eval()
    report = load_encoder(network, path)
    assert (report.missing, report.mismatched) == ([], [])
    assert set(published.unexpected) <= set(report.unexpected)
    x = torch.randn(1, network.arguments["in_channels"], *SIZE)
    with torch.no_grad():
        expected = published.features(x)
        for ours, theirs in zip(network.features(x), expected, strict=published.family != "resnet"):
            assert theirs.std() > 1e-3
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_published_sizes(name):
    """Names and shapes alone, of all of the encoder."""
    with torch.device("meta"):
        weights = read_public(FULL_SIZE[name]())
        network = build(ENCODERS, weights.architecture, name)
    keys = set(network.encoder_keys()) - set(network.aliases())
    target = {network.key_prefix + key: value for key, value in network.state_dict().items() if key in keys}
    report = compare_states(weights.state, target)
    assert (report.missing, report.mismatched) == ([], [])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (res_enc, InputRecord(None, [1.5, 1.0, 3.0], [16, 32, 8], 1, "as stored")),
        (plain_unet, InputRecord([-900.0, 1200.5], [1.5, 1.0, 3.0], [16, 32, 8], 1, "as stored")),
        (ct_fm, None),
    ],
)
def test_what_a_file_tells_of_its_input_is_compared(make, expected, tmp_path, caplog):
    """Along x, y, z; the plans of these have z, y, x."""
    published = make()
    torch.save(published.content, tmp_path / "published.pth")
    assert recorded_input(tmp_path / "published.pth") == expected
    with caplog.at_level(logging.WARNING, logger="pgl_ext"):
        method = MAE(build(ENCODERS, recorded_architecture(tmp_path / "published.pth"), ""))
        start_method(method, tmp_path / "published.pth", {"spacing": [1, 1, 1]})
    assert ("spacing [1.5, 1.0, 3.0], here [1.0, 1.0, 1.0] mm" if expected else "are not known") in caplog.text


@pytest.mark.parametrize("turn", [[2, 0, 1], [1, 2, 0]])
def test_plans_that_transpose(turn, tmp_path):
    """Axis i of the network is axis turn[i] of arrays z, y, x."""
    published = res_enc()
    plan = published.content["nnssl_adaptation_plan"]["pretrain_plan"]
    plan["transpose_forward"] = turn
    torch.save(published.content, tmp_path / "file.pth")
    network = build(NETWORKS, recorded_architecture(tmp_path / "file.pth"), "").eval()
    load_encoder(network, tmp_path / "file.pth")
    x = torch.randn(1, 1, *SIZE)
    forward = [0, 1, *(2 + axis for axis in turn)]
    arrays = x.permute(0, 1, 4, 3, 2).permute(forward)
    # The stand-in turns x, y, z to arrays itself, which these are already.
    theirs = [level.permute(0, 1, 4, 3, 2) for level in published.features(arrays.permute(0, 1, 4, 3, 2))]
    back = [0, 1, *(2 + turn.index(axis) for axis in range(3))]
    with torch.no_grad():
        for ours, level in zip(network.features(x), theirs, strict=True):
            torch.testing.assert_close(ours, level.permute(back).permute(0, 1, 4, 3, 2), rtol=1e-4, atol=1e-4)


def test_decoders_are_loaded_too(tmp_path):
    """All of a whole network's but the head; DynUNet's decoder has the kernels of the coarser of two levels."""
    for make in (res_enc, lambda: plain_unet([[3, 3, 3]] * 3), ct_fm):
        torch.save(make().content, tmp_path / "file.pth")
        assert decoder_file(tmp_path / "file.pth") == tmp_path / "file.pth"
        network = build(NETWORKS, recorded_architecture(tmp_path / "file.pth"), "")
        report = load_decoder(network, tmp_path / "file.pth")
        assert (report.missing, report.mismatched) == ([], [])
    torch.save(swin_ssl().content, tmp_path / "file.pth")
    assert decoder_file(tmp_path / "file.pth") is None


def test_the_disruptive_autoencoders_names(tmp_path):
    """MONAI's own filter of those weights is the oracle (``filter_swinunetr``)."""
    from monai.networks.nets.swin_unetr import filter_swinunetr
    from monai.networks.utils import copy_model_state

    stock = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)
    state = {}
    for key, value in as_trained(stock).swinViT.state_dict().items():
        stage, _, rest = key.partition(".")
        state[f"encoder.{key}" if stage == "patch_embed" else f"encoder.{stage}.0.{rest}"] = value.clone()
    torch.save({"model": {**state, "encoder.mask_token": torch.ones(1, 12)}}, tmp_path / "file.pth")
    network = build(NETWORKS, recorded_architecture(tmp_path / "file.pth"), "")
    assert "mask_token" in load_encoder(network, tmp_path / "file.pth").unexpected
    reference = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)
    copy_model_state(reference, state, filter_func=filter_swinunetr)
    for key, value in reference.swinViT.state_dict().items():
        assert torch.equal(network.state_dict()[f"swinViT.{key}"], value), key


class TestWhatDoesNotFit:
    def test_shortcuts_without_parameters(self, tmp_path):
        stock = ResNet("basic", [1, 1, 1, 1], [8, 16, 32, 64], n_input_channels=1, shortcut_type="A")
        torch.save(stock.state_dict(), tmp_path / "resnet_18.pth")
        network = build(ENCODERS, recorded_architecture(tmp_path / "resnet_18.pth"), "")
        with pytest.raises(ValueError, match=r"resnet_18\.pth does not fit.*shortcuts.*type A.*type B"):
            load_encoder(network, tmp_path / "resnet_18.pth")

    def test_another_network(self, tmp_path):
        torch.save(res_enc().content, tmp_path / "file.pth")
        with pytest.raises(
            ValueError, match=r"names are those of nnU-Net's ResEnc U-Net.*'n_blocks_per_stage': \[1, 1, 2\]"
        ):
            load_encoder(small_network("dynunet"), tmp_path / "file.pth")

    @pytest.mark.parametrize(
        "content", [{"a": torch.ones(1)}, {"network_weights": {}, "init_args": 3}, {"state_dict": None}]
    )
    def test_unknown_names(self, content, tmp_path):
        torch.save(content, tmp_path / "file.pth")
        assert recorded_input(tmp_path / "file.pth") is None
        assert decoder_file(tmp_path / "file.pth") is None
        with pytest.raises(FileNotFoundError, match=r"no description .*file\.json"):
            recorded_architecture(tmp_path / "file.pth")

    @pytest.mark.parametrize("spoil", [{"transpose_forward": 5}, {"configurations": []}, {"configurations": {"a": {}}}])
    def test_plans_that_are_none(self, spoil, tmp_path):
        """They are data of others: weights load, and the plan says nothing."""
        content = res_enc().content
        content["nnssl_adaptation_plan"]["pretrain_plan"].update(spoil)
        torch.save(content, tmp_path / "file.pth")
        assert recorded_input(tmp_path / "file.pth") is None
        load_encoder(build(NETWORKS, recorded_architecture(tmp_path / "file.pth"), ""), tmp_path / "file.pth")


class TestPretrainingGoesOn:
    """Methods start from a file, and their targets are copies of what was loaded."""

    @pytest.mark.parametrize("method", [PGL, PGLMAE, MAE])
    def test_online_and_target(self, method, tmp_path, caplog):
        published = res_enc()
        torch.save(published.content, tmp_path / "file.pth")
        network = build(NETWORKS, recorded_architecture(tmp_path / "file.pth"), "", out_channels=1)
        sizes = {} if method is MAE else {"hidden_channels": 8, "out_channels": 4}
        made = method(network, **sizes)
        with caplog.at_level(logging.INFO, logger="pgl_ext"):
            assert start_method(made, tmp_path / "file.pth") is made
        reference = build(NETWORKS, network.architecture, "")
        load_encoder(reference, tmp_path / "file.pth")
        load_decoder(reference, tmp_path / "file.pth")
        decoder = set(network.decoder_keys()) if made.pretrains_decoder else set()
        state = reference.state_dict()
        assert all(torch.equal(network.state_dict()[key], state[key]) for key in {*network.encoder_keys(), *decoder})
        for online, target in made.momentum_pairs():
            assert all(map(torch.equal, online.state_dict().values(), target.state_dict().values()))
        assert ("decoder: " in caplog.text) == made.pretrains_decoder

    def test_of_nothing_it_stays_random(self):
        made = MAE(small_network("dynunet"))
        before = {key: value.clone() for key, value in made.state_dict().items()}
        start_method(made)
        assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
