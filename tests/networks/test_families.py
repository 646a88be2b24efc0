"""The contract of networks (``networks.base``), for every family; the oracle is the stock class of its library."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import NamedTuple

import monai.networks.nets as stock
import pytest
import torch
from dynamic_network_architectures.architectures import unet as nnunet
from made_weights import SMALL, TRACED, small_network
from monai.bundle import ConfigParser
from programs import CONFIGS, SEGMENTATION_CONFIGS
from torch import nn

from pgl_ext.methods import MAE, PGL
from pgl_ext.networks import (
    DynUNet,
    MedNeXt,
    ResidualEncoderUNet,
    SegmentationNet,
    SegResNet,
    SegResNetDS,
    SwinUNETR,
    UNet,
)
from pgl_ext.networks.base import SegmentationNetwork, encoder_of
from pgl_ext.networks.build import ENCODERS, NETWORKS, build
from pgl_ext.networks.dense import DenseFeatures
from pgl_ext.weights import (
    EncoderRecord,
    InputRecord,
    load_decoder,
    load_encoder,
    load_state,
    save_decoder,
    save_encoder,
)

MULTIPLE, ODD = (64, 32, 32), (37, 18, 11)
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


def segresnet_ds(in_channels: int = 1, out_channels: int = 2, **others) -> SegResNetDS:
    return SegResNetDS(in_channels, out_channels, init_filters=8, blocks_down=(1, 1, 2), norm="INSTANCE", **others)


def unet(in_channels: int = 1, out_channels: int = 2) -> UNet:
    return UNet(in_channels, out_channels, channels=(4, 6, 8), strides=(2, (2, 2, 1)))


def swinunetr(in_channels: int = 1, out_channels: int = 2) -> SwinUNETR:
    return SwinUNETR(in_channels, out_channels, **SMALL["swinunetr"])


def mednext(in_channels: int = 1, out_channels: int = 2, **others) -> MedNeXt:
    return MedNeXt(in_channels, out_channels, 4, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 2), **others)


def resenc(in_channels: int = 1, out_channels: int = 2, **others) -> ResidualEncoderUNet:
    return ResidualEncoderUNet(in_channels, out_channels, (4, 6, 8), (1, 2, (2, 2, 1)), (1, 2, 2), **others)


def stock_resenc() -> nn.Module:
    kinds = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    settings = {"conv_bias": True, "norm_op_kwargs": {"affine": True}, "nonlin_kwargs": {"inplace": True}}
    sizes = {"kernel_sizes": 3, "strides": (1, 2, [2, 2, 1]), "n_blocks_per_stage": (1, 2, 2), "num_classes": 2}
    return nnunet.ResidualEncoderUNet(1, 3, (4, 6, 8), n_conv_per_stage_decoder=1, **kinds, **settings, **sizes)


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
    "segresnet_ds": Family(
        segresnet_ds,
        lambda: stock.SegResNetDS(3, 8, 1, 2, norm="INSTANCE", blocks_down=(1, 1, 2)),
        ("up_layers.1.head.",),
    ),
    "unet": Family(unet, lambda: stock.UNet(3, 1, 2, (4, 6, 8), (2, (2, 2, 1)), num_res_units=2), ("model.2.",)),
    "swinunetr": Family(swinunetr, lambda: stock.SwinUNETR(1, 2, **SMALL["swinunetr"]), ("out.",)),
    "mednext": Family(
        mednext,
        lambda: stock.MedNeXt(
            3, 4, 1, 2, 2, 2, 2, 3, False, True, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 2)
        ),
        ("out_0.",),
    ),
    "resenc": Family(resenc, stock_resenc, ("decoder.seg_layers.",)),
}

every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
of_a_library = pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.stock], ids=[*FAMILIES][1:])
supervised = pytest.mark.parametrize("name", ["dynunet", "segresnet_ds", "mednext", "resenc"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_every_family_is_here():
    assert FAMILIES.keys() == NETWORKS.keys() == ENCODERS.keys()


@of_a_library
def test_is_the_librarys_network(family):
    """Its names of tensors, but for heads that are not used, and with the same weights its output."""
    network, reference = family.make().eval(), family.stock().eval()
    missing, unexpected = reference.load_state_dict(network.state_dict(), strict=False)
    assert unexpected == []
    assert all(key.startswith(family.head) for key in missing)
    assert list(network.state_dict()) == [key for key in reference.state_dict() if key not in missing]
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
def test_gradients_reach_everything_where_voxels_are_restored(family):
    network = family.make()
    network.features_and_logits(torch.rand(2, 1, *MULTIPLE))[1].square().mean().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@every
def test_parameter_groups(family):
    network = family.make()
    encoder, others = network.parameter_groups(0.1, 0.5)
    assert (encoder["lr"], others["lr"]) == (0.05, 0.1)
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)] for p in encoder["params"]} == set(network.encoder_keys()) & set(names.values())
    assert len(encoder["params"]) + len(others["params"]) == len(names)


@every
def test_the_encoder_of_a_network_and_of_a_method(family):
    """Whatever the network calls its parts."""
    network = family.make()
    assert encoder_of(network) is encoder_of(MAE(network)) is network.feature_network


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


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", ["script", "trace"])
@pytest.mark.parametrize("part", [nn.Module.eval, DenseFeatures], ids=["network", "features"])
def test_is_torchscript(name, way, part):
    """Compiled or traced, it gives the same, for any size but for the transformer."""
    network, x = part(FAMILIES[name].make()).eval(), torch.rand(1, 1, *MULTIPLE)
    if way == "script" and name in TRACED:
        with pytest.raises(ValueError, match=r"can not be scripted.*by tracing, with --use_trace True --input_shape"):
            torch.jit.script(network)
        return
    with torch.no_grad():
        exported = torch.jit.script(network) if way == "script" else torch.jit.trace(network, x, check_trace=False)
        for x in (torch.rand(2, 1, *MULTIPLE), torch.rand(1, 1, *ODD))[: 1 if name == "swinunetr" else 2]:
            torch.testing.assert_close(exported(x), network(x))


@every
def test_views_have_to_be_multiples_of_the_stride(family):
    network = family.make().feature_network
    stride = network.level_strides[-1]
    network.check_view_size([2 * s for s in stride])
    with pytest.raises(ValueError, match=r"not a multiple of the encoder's output stride.*--view_size"):
        network.check_view_size([stride[0] + 1, *stride[1:]])


@supervised
class TestDeepSupervision:
    def make(self, name):
        return build(NETWORKS, {"family": name, "arguments": self.arguments(name)}, "here")

    def arguments(self, name):
        return NETWORKS[name].with_deep_supervision(small_network(name).arguments)

    def test_logits_of_several_levels_in_training_alone(self, name):
        network, x = self.make(name), torch.rand(2, 1, *ODD)
        logits = network(x)
        assert logits.shape == (2, logits.shape[1], 3, *ODD)
        logits.square().mean().backward()
        assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []
        with torch.no_grad():
            finest = network.eval()(x)
        assert finest.shape == (2, 3, *ODD)
        if name not in TRACED:
            torch.jit.script(network)

    def test_heads_belong_to_the_head(self, name):
        network, plain = self.make(name), small_network(name)
        rest = set(network.state_dict()) - set(network.encoder_keys()) - set(network.decoder_keys())
        assert (network.encoder_keys(), network.decoder_keys()) == (plain.encoder_keys(), plain.decoder_keys())
        assert len(rest) > len(set(plain.state_dict()) - set(plain.encoder_keys()) - set(plain.decoder_keys()))
        assert all(torch.isfinite(p).all() for p in network.parameters())


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (DynUNet, {"filters": (4, 8, 8), "strides": (2, 2, 2)}, "begin with 1"),
        (DynUNet, {"filters": (4, 8, 8), "strides": (1, 2)}, "as many as there are filters, 3"),
        (SegResNet, {"blocks_down": (1, 1), "blocks_up": (1, 1)}, "one number less"),
        (SegResNetDS, {"blocks_down": (1, 1), "dsdepth": 2}, "dsdepth has to be from 1 to 1"),
        (UNet, {"channels": (4, 8), "strides": (2, 2)}, "one less than channels"),
        (MedNeXt, {"blocks_down": (1, 1), "blocks_up": (1,)}, "as many numbers as blocks_down"),
        (ResidualEncoderUNet, {"strides": (1, 2)}, "as many as there are features_per_stage, 6"),
    ],
)
def test_arguments_that_cannot_be(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(("name", "package"), [("swinunetr", "einops"), ("resenc", "dynamic_network_architectures")])
def test_packages_that_are_missing(name, package, monkeypatch):
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs the package '{package.replace('_', '-')}': pip install"):
        FAMILIES[name].make()


@pytest.mark.parametrize("name", [family + size for family in [*FAMILIES][1:] for size in ("", "_small")])
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
    of_outputs = {"out_channels", "deep_supervision", "deep_supr_num", "dsdepth"}
    assert {k: v for k, v in first.arguments.items() if k not in of_outputs} == {
        k: v for k, v in second.arguments.items() if k not in of_outputs
    }
