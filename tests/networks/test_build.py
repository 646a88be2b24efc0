from __future__ import annotations

import pytest
import torch
from torch import nn

from pgl_ext.networks import ResNetEncoder, SegmentationNet
from pgl_ext.networks.build import ENCODERS, NETWORKS, build, fast_half_precision, prepare_network

TINY = {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 0.0625}


class TestBuild:
    def test_what_an_encoder_says_of_itself_builds_it_again(self):
        encoder = ResNetEncoder(**TINY, in_channels=2, stem_stride=1, last_stage_stride=2)
        again = build(ENCODERS, encoder.architecture, "here")
        assert again.architecture == encoder.architecture
        again.load_state_dict(encoder.state_dict())
        x = torch.rand(1, 2, 16, 16, 16)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(again.eval()(x), encoder.eval()(x), strict=True))

    @pytest.mark.parametrize(
        ("classes", "expected"), [(ENCODERS, ResNetEncoder), (NETWORKS, SegmentationNet)], ids=["encoder", "network"]
    )
    def test_families(self, classes, expected):
        arguments = (
            TINY if classes is ENCODERS else {"encoder": TINY, "aspp_channels": 4, "decoder_channels": [4, 4, 4]}
        )
        assert type(build(classes, {"family": "resnet", "arguments": arguments}, "here")) is expected
        with pytest.raises(ValueError, match=r"'swin'.* of FILE is not known.*resnet, dynunet, segresnet, .*: install"):
            build(classes, {"family": "swin", "arguments": arguments}, "FILE")

    def test_overrides(self):
        architecture = {"family": "resnet", "arguments": TINY}
        assert build(ENCODERS, architecture, "here", last_stage_stride=2, widen_factor=0.125).arguments == {
            **TINY,
            "widen_factor": 0.125,
            "in_channels": 1,
            "stem_stride": [2, 2, 1],
            "last_stage_stride": 2,
        }
        assert architecture["arguments"] == TINY
        with pytest.raises(ValueError, match=r"'depth'.*FILE is not one of ResNetEncoder"):
            build(ENCODERS, architecture, "FILE", depth=3)


class TestPrepareNetwork:
    def test_keeps_the_parameter_names(self, make_pgl):
        keys = list(make_pgl().state_dict())
        method = make_pgl()
        assert prepare_network(method, "cpu", channels_last=True, compile=True) is method
        assert list(method.state_dict()) == keys
        weight = method.encoder.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last_3d)

    def test_batch_norm_is_synchronised_on_both_networks(self, make_pgl):
        method = prepare_network(make_pgl(), "cpu", sync_batch_norm=True)
        norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
        assert any(isinstance(m, nn.SyncBatchNorm) for m in method.target_encoder.modules())
        # The target that momentum follows is the converted one.
        assert all(target in list(method.modules()) for _, target in method.momentum_pairs())


class TestFastHalfPrecision:
    @pytest.mark.parametrize(
        ("device", "units", "expected"),
        [
            ("cuda:0", {}, True),
            ("cpu", {"amx_bf16": False, "avx512_bf16": True}, True),
            ("cpu", {"amx_bf16": True}, True),
            ("cpu", {"amx_bf16": False, "avx512_f": True}, False),
        ],
    )
    def test_is_on_gpus_and_cpus_with_units_for_it(self, monkeypatch, device, units, expected):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
        assert fast_half_precision(device) is expected

    def test_versions_of_pytorch_that_do_not_say(self, monkeypatch):
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        assert not fast_half_precision("cpu")
