"""The contract of networks (``networks.base``), for every family; the oracle is the stock class of its library."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import monai.networks.nets as stock
import pytest
import torch
from monai.bundle import ConfigParser
from programs import CONFIGS, SEGMENTATION_CONFIGS
from torch import nn

from pgl_ext.methods import PGL
from pgl_ext.networks import DynUNet, SegmentationNet, SegResNet
from pgl_ext.networks.base import SegmentationNetwork
from pgl_ext.networks.build import ENCODERS, NETWORKS, build
from pgl_ext.weights import (
    EncoderRecord,
    InputRecord,
    load_decoder,
    load_encoder,
    load_state,
    save_decoder,
    save_encoder,
)

MULTIPLE, ODD = (32, 16, 16), (29, 18, 11)
RESNET = {"layers": (1, 1, 1, 1), "block": "basic", "widen_factor": 0.0625}


class Family(NamedTuple):
    make: Callable[..., SegmentationNetwork]
    stock: Callable[[], nn.Module] | None
    head: tuple[str, ...]


def paper(in_channels: int = 1, out_channels: int = 2) -> SegmentationNet:
    encoder = {**RESNET, "in_channels": in_channels}
    return SegmentationNet(in_channels, out_channels, encoder, aspp_channels=8, decoder_channels=(8, 6, 4))


def dynunet(in_channels: int = 1, out_channels: int = 2, **others) -> DynUNet:
    return DynUNet(in_channels, out_channels, filters=(4, 6, 8), strides=(1, 2, (2, 2, 1)), **others)


def segresnet(in_channels: int = 1, out_channels: int = 2) -> SegResNet:
    return SegResNet(in_channels, out_channels, init_filters=8, blocks_down=(1, 1, 2), blocks_up=(1, 1))


FAMILIES = {
    "resnet": Family(paper, None, ("decoder.head.",)),
    "dynunet": Family(
        dynunet,
        lambda: stock.DynUNet(3, 1, 2, [3] * 3, [1, 2, (2, 2, 1)], [2, (2, 2, 1)], filters=[4, 6, 8]),
        ("output_block.",),
    ),
    "segresnet": Family(
        segresnet, lambda: stock.SegResNet(3, 8, 1, 2, blocks_down=(1, 1, 2), blocks_up=(1, 1)), ("conv_final.2.",)
    ),
}

every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
of_a_library = pytest.mark.parametrize(
    "family", [f for f in FAMILIES.values() if f.stock], ids=["dynunet", "segresnet"]
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_every_family_is_here():
    assert FAMILIES.keys() == NETWORKS.keys() == ENCODERS.keys()


@of_a_library
def test_is_the_librarys_network(family):
    """Its names of tensors, and with the same weights its output."""
    network, reference = family.make().eval(), family.stock().eval()
    assert list(network.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(network.state_dict())
    x = torch.rand(2, 1, *MULTIPLE)
    with torch.no_grad():
        torch.testing.assert_close(network(x), reference(x))


@every
@pytest.mark.parametrize("size", [MULTIPLE, ODD], ids=["multiple", "odd"])
def test_features_and_logits(family, size):
    network = family.make(out_channels=3).eval()
    x = torch.rand(2, 1, *size)
    with torch.no_grad():
        features, (again, logits) = network.features(x), network.features_and_logits(x)
        assert logits.shape == (2, 3, *size)
        torch.testing.assert_close(logits, network(x))
    assert all(torch.equal(a, b) for a, b in zip(features, again, strict=True))
    assert tuple(level.shape[1] for level in features) == tuple(network.level_channels)
    assert len(network.level_strides) == len(network.centres) == len(features)
    if size == MULTIPLE:
        sizes = [tuple(n // s for n, s in zip(size, strides, strict=True)) for strides in network.level_strides]
        assert [tuple(level.shape[2:]) for level in features] == sizes


@every
def test_every_tensor_is_of_the_encoder_the_decoder_or_the_head(family):
    network = family.make()
    encoder, decoder = set(network.encoder_keys()), set(network.decoder_keys())
    assert not encoder & decoder
    rest = set(network.state_dict()) - encoder - decoder
    assert rest
    assert all(key.startswith(family.head) for key in rest)


@every
def test_the_encoder_alone_gives_the_features(family):
    """What a target network is: a copy that nothing of the decoder is needed for, and that shares no tensor."""
    network = family.make().eval()
    copy = network.encoder_copy()
    x = torch.rand(1, 1, *MULTIPLE)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(network.features(x), copy.features(x), strict=True))
    assert len(list(copy.parameters())) == len([p for part in network.encoder_modules() for p in part.parameters()])
    assert not {p.data_ptr() for p in copy.parameters()} & {p.data_ptr() for p in network.parameters()}


@every
def test_gradients_reach_the_encoder_alone_where_features_are_compared(family, make_batch):
    """So that several processes do not wait for those of the decoder."""
    network = family.make()
    encoder = network.feature_network
    method = PGL(encoder, hidden_channels=8, out_channels=4)
    method(make_batch(2))["loss"].backward()
    of_encoder = {id(p) for part in encoder.encoder_modules() for p in part.parameters()}
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == (id(parameter) in of_encoder), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


@every
def test_parameter_groups(family):
    network = family.make()
    encoder, others = network.parameter_groups(0.1, 0.5)
    assert (encoder["lr"], others["lr"]) == (0.05, 0.1)
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)] for p in encoder["params"]} == set(network.encoder_keys()) & set(names.values())
    assert len(encoder["params"]) + len(others["params"]) == len(names)


@every
def test_is_built_again_from_its_record(family):
    network = family.make(in_channels=2, out_channels=3)
    again = build(NETWORKS, network.architecture, "here")
    assert again.architecture == network.architecture
    again.load_state_dict(network.state_dict())


@every
def test_files_of_encoder_and_decoder(family, tmp_path):
    """They make all but the head of a network with other classes equal, and load into the library's class."""
    source, network = family.make(out_channels=1), family.make(out_channels=3)
    record = EncoderRecord(architecture=source.feature_network.architecture, input=InputRecord())
    for ending in ("pt", "safetensors"):
        save_encoder(source.feature_network, tmp_path / f"encoder.{ending}", record)
        save_decoder(source, tmp_path / f"decoder.{ending}", record)
        for report in (
            load_encoder(network, tmp_path / f"encoder.{ending}"),
            load_decoder(network, tmp_path / f"decoder.{ending}"),
        ):
            assert (report.missing, report.unexpected, report.mismatched) == ([], [], [])
    for key, value in network.state_dict().items():
        assert key.startswith(family.head) or torch.equal(value, source.state_dict()[key]), key
    if family.stock:
        reference = family.stock()
        result = reference.load_state_dict(load_state(tmp_path / "encoder.pt"), strict=False)
        assert result.unexpected_keys == []
        assert set(result.missing_keys) == set(reference.state_dict()) - set(source.encoder_keys())


@of_a_library
def test_a_stock_file_is_loaded(family, tmp_path):
    """Whole networks of the library, without a record."""
    reference, network = family.stock(), family.make(out_channels=4)
    torch.save(reference.state_dict(), tmp_path / "stock.pt")
    report = load_encoder(network, tmp_path / "stock.pt")
    assert report.missing == report.mismatched == []
    assert report.unexpected
    assert all(torch.equal(network.state_dict()[key], reference.state_dict()[key]) for key in network.encoder_keys())


@every
def test_scripts(family):
    network = family.make().eval()
    scripted = torch.jit.script(network)
    for size in (MULTIPLE, ODD):
        x = torch.rand(1, 1, *size)
        with torch.no_grad():
            torch.testing.assert_close(scripted(x), network(x))


@every
def test_views_have_to_be_multiples_of_the_stride(family):
    network = family.make().feature_network
    stride = network.level_strides[-1]
    network.check_view_size([2 * s for s in stride])
    with pytest.raises(ValueError, match=r"not a multiple of the encoder's output stride.*--view_size"):
        network.check_view_size([stride[0] + 1, *stride[1:]])


class TestDeepSupervision:
    def test_logits_of_several_levels_in_training_alone(self):
        network = dynunet(deep_supervision=True)
        x = torch.rand(2, 1, *ODD)
        assert network(x).shape == (2, 2, 2, *ODD)
        assert network.eval()(x).shape == (2, 2, *ODD)
        torch.jit.script(network)

    def test_heads_belong_to_the_head(self):
        network = dynunet(deep_supervision=True)
        rest = set(network.state_dict()) - set(network.encoder_keys()) - set(network.decoder_keys())
        assert {key.split(".")[0] for key in rest} == {"output_block", "deep_supervision_heads"}
        assert all(torch.isfinite(p).all() for p in network.parameters())


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (DynUNet, {"filters": (4, 8, 8), "strides": (2, 2, 2)}, "begin with 1"),
        (DynUNet, {"filters": (4, 8, 8), "strides": (1, 2)}, "as many as there are filters, 3"),
        (SegResNet, {"blocks_down": (1, 1), "blocks_up": (1, 1)}, "one number less"),
    ],
)
def test_arguments_that_cannot_be(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("name", ["dynunet", "dynunet_small", "segresnet", "segresnet_small"])
def test_overlays_of_both_bundles_are_one_network(name):
    networks = []
    for configs, key in ((CONFIGS, "encoder"), (SEGMENTATION_CONFIGS, "network_def")):
        parser = ConfigParser()
        parser.read_config([str(configs / "train.json"), str(configs / "networks" / f"{name}.yaml")])
        parser["organs"] = {"liver": 1}
        with torch.device("meta"):
            networks.append(parser.get_parsed_content(key))
    first, second = networks
    assert inspect.getmodule(type(first)).__name__ == f"pgl_ext.networks.{name.removesuffix('_small')}"
    assert (first.encoder_keys(), first.decoder_keys()) == (second.encoder_keys(), second.decoder_keys())
    of_outputs = {"out_channels", "deep_supervision", "deep_supr_num"}
    assert first.arguments.keys() == second.arguments.keys()
    for argument in first.arguments.keys() - of_outputs:
        assert first.arguments[argument] == second.arguments[argument], argument
