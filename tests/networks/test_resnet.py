import pytest
import torch
from monai.networks.nets import resnet50
from monai.networks.nets.resnet import ResNet, get_inplanes
from torch import nn

from pgl_ext.networks.heads import ConvHead
from pgl_ext.networks.resnet import ResNetEncoder

SMALL = {"layers": (1, 1, 1, 1), "block": "basic", "widen_factor": 0.0625}

# [arguments, input size, channels of the pyramid, sizes of the pyramid, output stride]
CASES = [
    [
        {"widen_factor": 0.0625},
        (96, 96, 16),
        (4, 16, 32, 64, 128),
        ((48, 48, 16), (24, 24, 8), (12, 12, 4), (6, 6, 2), (6, 6, 2)),
        (16, 16, 8),
    ],
    [
        SMALL,
        (96, 96, 16),
        (4, 4, 8, 16, 32),
        ((48, 48, 16), (24, 24, 8), (12, 12, 4), (6, 6, 2), (6, 6, 2)),
        (16, 16, 8),
    ],
    [
        {**SMALL, "last_stage_stride": 2},
        (96, 96, 16),
        (4, 4, 8, 16, 32),
        ((48, 48, 16), (24, 24, 8), (12, 12, 4), (6, 6, 2), (3, 3, 1)),
        (32, 32, 16),
    ],
    [
        {**SMALL, "stem_stride": 2, "in_channels": 3},
        (32, 48, 64),
        (4, 4, 8, 16, 32),
        ((16, 24, 32), (8, 12, 16), (4, 6, 8), (2, 3, 4), (2, 3, 4)),
        (16, 16, 16),
    ],
    [
        {**SMALL, "stem_stride": 1, "layers": (2, 1, 2, 1), "widen_factor": 0.125},
        (16, 8, 8),
        (8, 8, 16, 32, 64),
        ((16, 8, 8), (8, 4, 4), (4, 2, 2), (2, 1, 1), (2, 1, 1)),
        (8, 8, 8),
    ],
    # Odd sizes round up at every stride.
    [SMALL, (33, 31, 9), (4, 4, 8, 16, 32), ((17, 16, 9), (9, 8, 5), (5, 4, 3), (3, 2, 2), (3, 2, 2)), (16, 16, 8)],
]


@pytest.fixture(scope="module")
def full_encoder() -> ResNetEncoder:
    return ResNetEncoder()


@pytest.mark.parametrize(("arguments", "size", "channels", "sizes", "stride"), CASES)
def test_pyramid(arguments, size, channels, sizes, stride):
    encoder = ResNetEncoder(**arguments).eval()
    assert encoder.stride == encoder.level_strides[-1] == stride
    assert encoder.channels == channels
    with torch.no_grad():
        features = encoder(torch.rand(1, arguments.get("in_channels", 1), *size))
    assert [tuple(f.shape) for f in features] == [(1, c, *s) for c, s in zip(channels, sizes, strict=True)]
    for level_stride, level_size in zip(encoder.level_strides, sizes, strict=True):
        assert level_size == tuple(-(-n // s) for n, s in zip(size, level_stride, strict=True))


class TestPaperEncoder:
    def test_parameters_and_channels(self, full_encoder):
        assert sum(p.numel() for p in full_encoder.parameters()) == 46_155_072
        assert full_encoder.channels == (64, 256, 512, 1024, 2048)

    def test_loads_into_stock_monai(self, full_encoder):
        stock = resnet50(
            spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type="B", bias_downsample=False
        )
        stock.load_state_dict(full_encoder.state_dict(), strict=True)
        ResNetEncoder().load_state_dict(stock.state_dict(), strict=True)


def test_equals_stock_resnet_at_the_same_stride():
    """Undilated and with a stem stride of 1, the deepest map is what MONAI's ResNet pools."""
    stock = ResNet(
        "basic",
        [1, 1, 1, 1],
        get_inplanes(),
        n_input_channels=1,
        widen_factor=0.0625,
        feed_forward=False,
        bias_downsample=False,
    ).eval()
    encoder = ResNetEncoder(**SMALL, stem_stride=1, last_stage_stride=2).eval()
    encoder.load_state_dict(stock.state_dict(), strict=True)
    x = torch.rand(1, 1, 32, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)[-1].mean((2, 3, 4)), stock(x))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("last_stage_stride", [1, 2])
@pytest.mark.parametrize("axis", [0, 2])
def test_feature_j_is_centred_on_voxel_stride_times_j(block, last_stage_stride, axis):
    """What the aligner's "exact" mode relies on, measured as the voxels that feature j's gradient reaches."""
    encoder = ResNetEncoder((1, 1, 1, 1), block, 0.0625, last_stage_stride=last_stage_stride).eval()
    for module in encoder.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    # The maximum of a pooling window would pass its gradient to one voxel only: averaging sees the same window.
    encoder.maxpool = nn.AvgPool3d(3, 2, padding=1)
    # Long enough on one axis for the field of view, which the short axes cut off.
    size = [16, 16, 16]
    size[axis] = 384
    x = torch.ones(1, 1, *size, requires_grad=True)
    deepest = encoder(x)[-1].movedim(2 + axis, 0)
    stride, j = encoder.stride[axis], len(deepest) // 2
    deepest[j].sum().backward()
    reached = x.grad[0, 0].movedim(axis, 0).sum((1, 2)).double()
    support = reached.nonzero()[:, 0]
    assert 0 < support[0] < support[-1] < size[axis] - 1
    assert support[0] + support[-1] == 2 * stride * j
    torch.testing.assert_close(reached[support], reached[support].flip(0), rtol=1e-5, atol=0)


def test_scriptable():
    encoder = ResNetEncoder(**SMALL).eval()
    x = torch.rand(1, 1, 32, 32, 16)
    with torch.no_grad():
        expected, scripted = encoder(x), torch.jit.script(encoder)(x)
    for a, b in zip(scripted, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_reach_every_parameter():
    encoder = ResNetEncoder(**SMALL)
    encoder(torch.rand(2, 1, 32, 32, 16))[-1].square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())


class TestViewSize:
    encoder = ResNetEncoder(**SMALL)

    @pytest.mark.parametrize("view_size", [(96, 96, 16), [16, 32, 8], (192, 192, 64)])
    def test_multiples(self, view_size):
        self.encoder.check_view_size(view_size)

    @pytest.mark.parametrize(
        ("view_size", "suggestion"),
        [
            ((96, 96, 15), "[96, 96, 16]"),
            ((100, 96, 16), "[96, 96, 16]"),
            ((8, 96, 4), "[16, 96, 8]"),
            ((0, 16, 8), "[16, 16, 8]"),
            ((96, 96), "[96, 96, 16]"),
        ],
    )
    def test_others(self, view_size, suggestion):
        with pytest.raises(ValueError, match=r"output stride \(16, 16, 8\)") as error:
            self.encoder.check_view_size(view_size)
        assert str(tuple(view_size)) in str(error.value)
        if len(view_size) == 3:
            assert suggestion in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": (1, 1, 1)}, r"four stages, got \(1, 1, 1\)"),
        ({"last_stage_stride": 3}, "last_stage_stride must be 1 or 2, got 3"),
        ({"block": "dense"}, "dense"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNetEncoder(**{**SMALL, **arguments})


class TestHead:
    def test_shape_and_parameters(self):
        head = ConvHead(32, 64, 16)
        assert head(torch.rand(2, 32, 6, 6, 2)).shape == (2, 16, 6, 6, 2)
        # Both convolutions, the second one's bias, the norm's scale and shift.
        assert sum(p.numel() for p in head.parameters()) == 32 * 64 + 64 * 16 + 16 + 2 * 64

    def test_acts_on_each_cell_by_itself(self):
        head = ConvHead(8, 16, 4).eval()
        x = torch.rand(1, 8, 3, 3, 2)
        cell = head(x[..., 1:2, 2:3, :1])
        torch.testing.assert_close(head(x)[..., 1:2, 2:3, :1], cell)
