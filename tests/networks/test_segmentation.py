import itertools
import math

import pytest
import torch
from torch import nn

from pgl_ext.networks import ResNetEncoder, SegmentationNet
from pgl_ext.networks.segmentation import ASPP, Decoder, PlainDecoder

TINY_ENCODER = {"layers": (1, 1, 1, 1), "block": "basic", "widen_factor": 0.0625}
TINY = {"encoder": TINY_ENCODER, "aspp_channels": 8, "decoder_channels": (8, 6, 4)}
MULTIPLE = (32, 32, 16)


def make(seed: int = 0, **arguments) -> SegmentationNet:
    torch.manual_seed(seed)
    return SegmentationNet(**{"out_channels": 3, **TINY, **arguments})


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def network() -> SegmentationNet:
    """The default network, without memory: nothing runs through it."""
    with torch.device("meta"):
        return SegmentationNet()


class TestPaperNetwork:
    def test_parameters(self, network):
        assert count(network) == 48_536_270
        assert count(network.encoder) == 46_155_072
        assert count(network.aspp) + count(network.decoder) == 2_381_198

    def test_published_sums(self, network):
        """48.54 M, of which 2.38 M are not the encoder's."""
        assert round(count(network) / 1e6, 2) == 48.54
        assert round((count(network.aspp) + count(network.decoder)) / 1e6, 2) == 2.38

    def test_each_class_adds_one_weight_per_channel_and_a_bias(self, network):
        with torch.device("meta"):
            assert count(network) - count(SegmentationNet(out_channels=13)) == 32 + 1

    def test_only_the_last_convolution_has_a_bias(self, network):
        convolutions = [m for m in network.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
        assert [m for m in convolutions if m.bias is not None] == [network.decoder.head]


class TestAnySize:
    network = make().eval()

    @pytest.mark.parametrize(
        "size", [(32, 32, 16), (33, 31, 17), (16, 16, 8), (1, 1, 1), (5, 40, 3), (47, 2, 30)], ids=str
    )
    def test_logits_are_on_the_input_grid(self, size):
        with torch.no_grad():
            logits = self.network(torch.rand(2, 1, *size))
        assert logits.shape == (2, 3, *size)
        assert torch.isfinite(logits).all()

    @pytest.mark.parametrize("stem_stride", [1, 2, (2, 2, 1)], ids=str)
    def test_other_strides(self, stem_stride):
        network = make(encoder={**TINY_ENCODER, "stem_stride": stem_stride}).eval()
        for size in (MULTIPLE, (19, 18, 9)):
            with torch.no_grad():
                assert network(torch.rand(1, 1, *size)).shape == (1, 3, *size)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_an_odd_size_does_not_stretch_the_map(self, axis):
        """Near the first corner nothing knows of voxels at the far end, but for the global mean."""
        network = make().eval()
        # The branch of the global mean sees the whole input.
        nn.init.zeros_(network.aspp.pooled[0].weight)
        size = [16, 16, 16]
        size[axis] = 385
        x = torch.randn(1, 1, *size)
        with torch.no_grad():
            near, whole = network(x.narrow(2 + axis, 0, 384)), network(x)
        torch.testing.assert_close(near.narrow(2 + axis, 0, 16), whole.narrow(2 + axis, 0, 16), atol=1e-5, rtol=1e-4)


def test_torchscript_equals_eager():
    network = make().eval()
    scripted = torch.jit.script(network)
    for size in (MULTIPLE, (33, 31, 17)):
        x = torch.randn(2, 1, *size)
        with torch.no_grad():
            torch.testing.assert_close(scripted(x), network(x))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_reach_every_parameter(dropout):
    network = make(dropout=dropout)
    network(torch.rand(2, 1, *MULTIPLE)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_batch_of_one_can_be_trained_on():
    network = make().train()
    network(torch.rand(1, 1, *MULTIPLE)).sum().backward()


def test_output_depends_on_every_level_of_the_encoder():
    network = make().eval()
    x = torch.rand(1, 1, *MULTIPLE)
    with torch.no_grad():
        features = network.encoder(x)
        reference = network(x)
        for level in (0, 1, 2, 4):
            changed = list(features)
            changed[level] = torch.zeros_like(changed[level])
            network.encoder.features = lambda _, changed=changed: changed
            assert not torch.allclose(network(x), reference), level


class TestInitialisation:
    def test_convolutions_are_kaiming_uniform(self):
        """Within +-sqrt(6 / fan-in), which uniform numbers nearly reach; their deviation is sqrt(2 / fan-in)."""
        network = make(encoder={**TINY_ENCODER, "widen_factor": 0.25}, aspp_channels=64, decoder_channels=(64, 32, 16))
        seen = 0
        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                weight = module.weight.detach()
                bound = math.sqrt(6 / weight[0].numel())
                assert weight.abs().max() <= bound, name
                if weight.numel() > 2000:
                    seen += 1
                    assert weight.abs().max() > 0.98 * bound, name
                    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1), name
                if module.bias is not None:
                    assert (module.bias == 0).all()
        assert seen > 10

    def test_follows_the_global_seed(self):
        first, second, other = make(1), make(1), make(2)
        weights = [network.encoder.conv1.weight for network in (first, second, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_batch_norms_start_as_identity(self):
        for module in make().modules():
            if isinstance(module, nn.BatchNorm3d):
                assert (module.weight == 1).all()
                assert (module.bias == 0).all()


class TestEncoder:
    def test_a_module_is_used_as_it_is(self):
        encoder = ResNetEncoder(**TINY_ENCODER)
        before = {key: value.clone() for key, value in encoder.state_dict().items()}
        network = make(encoder=encoder)
        assert network.encoder is encoder
        assert all(torch.equal(value, before[key]) for key, value in network.encoder.state_dict().items())

    def test_parameter_names_are_those_of_encoder_files(self):
        own = {key.removeprefix("encoder.") for key in make().state_dict() if key.startswith("encoder.")}
        assert own == set(ResNetEncoder(**TINY_ENCODER).state_dict())

    def test_more_input_channels(self):
        network = make(in_channels=2)
        assert network.encoder.conv1.in_channels == 2
        assert network.eval()(torch.rand(1, 2, *MULTIPLE)).shape == (1, 3, *MULTIPLE)

    def test_other_number_of_channels(self):
        with pytest.raises(ValueError, match="encoder takes 1 channels, but in_channels is 2: give both the same"):
            make(in_channels=2, encoder=ResNetEncoder(**TINY_ENCODER))

    def test_levels_that_do_not_double(self):
        with pytest.raises(ValueError, match=r"strides are .*\(32, 32, 16\).*last_stage_stride=1"):
            make(encoder={**TINY_ENCODER, "last_stage_stride": 2})

    def test_unknown_argument(self):
        with pytest.raises(TypeError, match="depth"):
            make(encoder={"depth": 50})


class TestDropout:
    def test_acts_in_training_alone(self):
        network = make(dropout=0.5)
        x = torch.rand(1, 1, *MULTIPLE)
        # Batch statistics would be the same in both passes; only dropout makes them differ.
        assert not torch.equal(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))

    def test_drops_whole_channels_before_decoder_and_head(self):
        network = make(dropout=0.5, aspp_channels=32, decoder_channels=(32, 32, 32))
        shares = []
        for module in (network.dropout, network.decoder.dropout):
            module.register_forward_hook(lambda m, args, out: shares.append((out == 0).all((2, 3, 4)).float().mean()))
        network(torch.rand(4, 1, *MULTIPLE))
        assert len(shares) == 2
        assert all(0.2 < share < 0.8 for share in shares)

    def test_has_no_parameters(self):
        assert make(dropout=0.5).state_dict().keys() == make().state_dict().keys()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"in_channels": 2, "out_channels": 5, "dropout": 0.25}, {"encoder": {**TINY_ENCODER, "stem_stride": 1}}],
    ids=str,
)
def test_architecture_builds_the_same_network(arguments):
    network = make(**arguments)
    again = SegmentationNet(**network.arguments)
    assert again.architecture == network.architecture == {"family": "resnet", "arguments": network.arguments}
    shapes = [{key: value.shape for key, value in n.state_dict().items()} for n in (network, again)]
    assert shapes[0] == shapes[1]
    again.load_state_dict(network.state_dict())
    x = torch.rand(1, arguments.get("in_channels", 1), *MULTIPLE)
    assert torch.equal(again.eval()(x), network.eval()(x))


def test_architecture_of_a_given_encoder():
    network = make(encoder=ResNetEncoder(**TINY_ENCODER))
    assert network.arguments["encoder"] == network.encoder.arguments
    assert SegmentationNet(**network.arguments).state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_parameter_groups(factor):
    network = make()
    groups = network.parameter_groups(0.2, factor)
    assert [group["lr"] for group in groups] == [0.2 * factor, 0.2]
    encoder, others = (group["params"] for group in groups)
    assert all(a is b for a, b in zip(encoder, network.encoder.parameters(), strict=True))
    rest = [parameter for name, parameter in network.named_parameters() if not name.startswith("encoder.")]
    assert all(a is b for a, b in zip(others, rest, strict=True))


class TestParts:
    def test_aspp_sees_as_far_as_its_dilations(self):
        """A voxel reaches cells 0, 2, 4 and 8 away on each axis, and through the global mean all others alike."""
        aspp = ASPP(1, 4).eval()
        x = torch.zeros(1, 1, 21, 1, 1, requires_grad=True)
        # Batch norm at rest lets zeros stand at the kink of every ReLU; a shift keeps all of them open.
        for module in aspp.modules():
            if isinstance(module, nn.BatchNorm3d):
                nn.init.constant_(module.bias, 1.0)
            elif isinstance(module, nn.Conv3d):
                nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        aspp(x)[0, :, 10].sum().backward()
        reached = x.grad[0, 0, :, 0, 0]
        far = float(reached[0])
        assert far > 0
        offsets = {abs(int(i) - 10) for i in (reached > far * 1.001).nonzero()}
        assert offsets == {0, 2, 4, 8}

    @pytest.mark.parametrize("size", [(3, 4, 2), (4, 4, 4), (1, 1, 1)], ids=str)
    def test_decoder_doubles_three_times_and_follows_its_skips(self, size):
        doubled = [tuple(n * 2**k for n in size) for k in (1, 2, 3)]
        # One smaller: the size before it was rounded up on the way down.
        sizes = [tuple(max(1, n - (k == 2)) for n in s) for k, s in enumerate(doubled)]
        decoder = Decoder(5, (6, 4, 3), (7, 5, 3), 2).eval()
        skips = [torch.rand(1, c, *s) for c, s in zip((6, 4, 3), sizes, strict=True)]
        assert decoder(torch.rand(1, 5, *size), skips).shape == (1, 2, *sizes[-1])


class TestPlainDecoder:
    """The decoder without skips, of a method that wants every level's map."""

    def test_maps_come_coarse_to_fine_in_the_sizes_asked_for(self):
        decoder = PlainDecoder(5, (6, 4, 3)).eval()
        sizes = [[6, 8, 3], [11, 16, 6], [22, 32, 12]]
        maps = decoder(torch.rand(2, 5, 3, 4, 2), sizes)
        assert [tuple(m.shape) for m in maps] == [(2, c, *s) for c, s in zip((6, 4, 3), sizes, strict=True)]

    def test_is_the_decoder_whose_skips_are_zero(self):
        torch.manual_seed(0)
        decoder = Decoder(5, (6, 4, 3), (7, 5, 3), 2).eval()
        plain = PlainDecoder(5, (7, 5, 3)).eval()
        shared = {key: value for key, value in decoder.state_dict().items() if ".up." in key or ".refine." in key}
        plain.load_state_dict(shared, strict=True)
        sizes = [[6, 8, 4], [12, 15, 8], [24, 30, 15]]
        skips = [torch.zeros(1, c, *s) for c, s in zip((6, 4, 3), sizes, strict=True)]
        x = torch.rand(1, 5, 3, 4, 2)
        torch.testing.assert_close(decoder.head(plain(x, sizes)[-1]), decoder(x, skips))

    def test_torchscript_equals_eager(self):
        decoder = PlainDecoder(5, (4, 3)).eval()
        x, sizes = torch.rand(1, 5, 2, 2, 2), [[4, 3, 4], [8, 6, 7]]
        for scripted, eager in zip(torch.jit.script(decoder)(x, sizes), decoder(x, sizes), strict=True):
            torch.testing.assert_close(scripted, eager)


def test_levels_of_the_default_encoder_are_factors_of_two():
    with torch.device("meta"):
        strides = ResNetEncoder().level_strides
    levels = (strides[0], strides[1], strides[2], strides[4])
    assert all(tuple(2 * f for f in fine) == coarse for fine, coarse in itertools.pairwise(levels))
