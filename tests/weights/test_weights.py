import hashlib
import json
import re
from unittest.mock import Mock

import pytest
import torch
from made_weights import SMALL, as_trained, checkpoint_content, encoder_record, input_record, small_network
from monai.networks.nets import FlexibleUNet, ResNet
from safetensors import safe_open
from torch import nn

from pgl_ext.files import write_atomically
from pgl_ext.networks import ResNetEncoder, SegmentationNet
from pgl_ext.networks.build import NETWORKS
from pgl_ext.networks.segmentation import ASPP, PlainDecoder
from pgl_ext.tools.export import export_decoder, export_encoder
from pgl_ext.weights import (
    EncoderRecord,
    LoadReport,
    build_encoder,
    load_decoder,
    load_encoder,
    load_model,
    load_pretrained,
    load_state,
    save_decoder,
    save_encoder,
    save_weights,
)

# Of the encoder that make_encoder makes.
RECORD = encoder_record(ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.125))


def equal(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


@pytest.fixture
def source(make_encoder) -> ResNetEncoder:
    """The encoder whose weights are saved, with batch-norm statistics of its own."""
    encoder = make_encoder(seed=1)
    encoder.bn1.running_mean.fill_(0.5)
    encoder.bn1.num_batches_tracked.fill_(7)
    return encoder


@pytest.fixture
def network(make_encoder) -> ResNetEncoder:
    """The encoder that is loaded into."""
    return make_encoder(seed=2)


@pytest.fixture
def untouched(make_encoder, network):
    """Whether the network still is what it was."""
    return lambda: equal(network, make_encoder(seed=2))


class TestSaveAndLoad:
    def test_round_trip(self, source, network, tmp_path):
        path = tmp_path / "models" / "encoder.pt"
        save_encoder(source, path, RECORD)
        assert not equal(source, network)
        report = load_encoder(network, path)
        assert equal(source, network)
        assert report == LoadReport(loaded=list(source.state_dict()))
        count = len(source.state_dict())
        assert str(report) == f"{count} of {count} tensors loaded"

    def test_into_a_network_with_an_encoder(self, source, make_pgl, tmp_path):
        save_encoder(source, tmp_path / "encoder.pt", RECORD)
        method = make_pgl(seed=2)
        load_encoder(method, tmp_path / "encoder.pt")
        assert equal(method.encoder, source)
        assert equal(method.projector, make_pgl(seed=2).projector)

    def test_the_file_is_a_plain_state_dict(self, source, tmp_path):
        save_encoder(source.to(memory_format=torch.channels_last_3d), tmp_path / "encoder.pt", RECORD)
        state = torch.load(tmp_path / "encoder.pt", weights_only=True)
        assert type(state) is dict
        assert set(state) == {f"encoder.{key}" for key in source.state_dict()}
        assert all(value.is_contiguous() and not value.requires_grad for value in state.values())
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_record(self, source, tmp_path):
        save_encoder(source, tmp_path / "encoder.pt", RECORD)
        content = json.loads((tmp_path / "encoder.json").read_text())
        assert content.pop("sha256") == {".pt": hashlib.sha256((tmp_path / "encoder.pt").read_bytes()).hexdigest()}
        assert content == RECORD.to_json()
        assert EncoderRecord.load(tmp_path / "encoder.pt") == RECORD
        rebuilt = build_encoder(tmp_path / "encoder.pt", load=False)
        assert not equal(rebuilt, source)
        load_encoder(rebuilt, tmp_path / "encoder.pt")
        assert equal(rebuilt, source)

    def test_no_record(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no description .*encoder\.json"):
            EncoderRecord.load(tmp_path / "encoder.pt")


class TestChecksum:
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_a_file_with_the_record_of_another(self, source, network, untouched, tmp_path, suffix):
        """It would be read without an error, and the values are others."""
        for name, encoder in (("a", source), ("b", network)):
            save_encoder(encoder, tmp_path / f"{name}{suffix}", RECORD)
        (tmp_path / f"a{suffix}").write_bytes((tmp_path / f"b{suffix}").read_bytes())
        with pytest.raises(ValueError, match=rf"a\{suffix} is not the file that .*a\.json was written with"):
            load_encoder(network, tmp_path / f"a{suffix}")
        assert untouched()

    @pytest.mark.parametrize("content", [None, "[]", "{", "{}", '{"sha256": 3}', '{"sha256": {}}'])
    def test_without_one_nothing_is_compared(self, source, network, tmp_path, content):
        save_encoder(source, tmp_path / "e.pt", RECORD)
        record = tmp_path / "e.json"
        record.unlink() if content is None else record.write_text(content)
        load_encoder(network, tmp_path / "e.pt")
        assert equal(source, network)

    def test_two_formats_have_one_record(self, source, network, tmp_path):
        for suffix in (".pt", ".safetensors"):
            save_encoder(source, tmp_path / f"e{suffix}", RECORD)
        for suffix in (".pt", ".safetensors"):
            load_encoder(network, tmp_path / f"e{suffix}")
        assert json.loads((tmp_path / "e.json").read_text())["sha256"].keys() == {".pt", ".safetensors"}

    def test_killed_between_the_two_files(self, source, network, tmp_path, monkeypatch):
        """The record of the file that was replaced is not compared with the new one."""
        save_encoder(network, tmp_path / "e.pt", RECORD)
        with monkeypatch.context() as patched:
            patched.setattr("pgl_ext.weights.files._sha256", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                save_encoder(source, tmp_path / "e.pt", RECORD)
        load_encoder(network, tmp_path / "e.pt")
        assert equal(source, network)


@pytest.mark.parametrize("load", [load_encoder, load_decoder, load_model])
class TestFilesThatAreNoWeights:
    @pytest.mark.parametrize(
        ("content", "command"),
        [
            ("version https://git-lfs.github.com/spec/v1\noid sha256:0123456789\nsize 12345\n", "git lfs pull"),
            ("/annex/objects/MD5E-s12345--0123456789.pt\n", "git annex get"),
        ],
    )
    def test_a_pointer(self, network, tmp_path, load, content, command):
        (tmp_path / "file.pt").write_text(content)
        with pytest.raises(ValueError, match=rf"file\.pt is a pointer of .*: fetch it with `{command}`"):
            load(network, tmp_path / "file.pt")

    def test_a_checkpoint(self, network, tmp_path, load):
        torch.save({"network": {"online.encoder.conv1.weight": torch.ones(1)}, "step": 10}, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=r"file\.pt is a checkpoint, .*'pgl export .*file\.pt OUT'"):
            load(network, tmp_path / "file.pt")


class TestForeignFiles:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {f"encoder.{k}": v for k, v in state.items()},
            lambda state: {f"module.{k}": v for k, v in state.items()},
            lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
            lambda state: {"state_dict": {f"module.encoder.{k}": v for k, v in state.items()}},
        ],
        ids=["monai", "encoder", "module", "medicalnet", "module.encoder"],
    )
    def test_layouts(self, source, network, tmp_path, wrap):
        torch.save(wrap(source.state_dict()), tmp_path / "file.pt")
        report = load_encoder(network, tmp_path / "file.pt")
        assert equal(source, network)
        assert report.unexpected == []

    def test_a_whole_network_gives_its_encoder_alone(self, make_pgl, network, tmp_path):
        torch.save(make_pgl(seed=1).state_dict(), tmp_path / "pgl.pt")
        report = load_encoder(network, tmp_path / "pgl.pt")
        # The target's keys begin with "target_encoder.", not "encoder.".
        assert equal(network, make_pgl(seed=1).encoder)
        assert report.unexpected == []

    def test_a_classifier_is_reported_and_left_out(self, source, network, tmp_path):
        torch.save({**source.state_dict(), "fc.weight": torch.ones(3, 64), "fc.bias": torch.ones(3)}, tmp_path / "r.pt")
        report = load_encoder(network, tmp_path / "r.pt")
        assert equal(source, network)
        assert report.unexpected == ["fc.bias", "fc.weight"]
        assert "unexpected (2): fc.bias, fc.weight" in str(report)

    def test_missing_tensors(self, source, network, untouched, tmp_path):
        state = source.state_dict()
        del state["layer1.0.conv1.weight"], state["bn1.running_var"]
        torch.save(state, tmp_path / "part.pt")
        with pytest.raises(ValueError, match="does not fit the encoder") as error:
            load_encoder(network, tmp_path / "part.pt")
        assert "part.pt" in str(error.value)
        assert "missing (2): bn1.running_var, layer1.0.conv1.weight" in str(error.value)
        assert untouched()

    def test_tensors_of_another_shape(self, network, untouched, tmp_path):
        wider = ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.25)
        save_encoder(wider, tmp_path / "wide.pt", encoder_record(wider))
        with pytest.raises(ValueError, match="mismatched") as error:
            load_encoder(network, tmp_path / "wide.pt")
        assert "conv1.weight: (16, 1, 7, 7, 7), (8, 1, 7, 7, 7)" in str(error.value)
        assert "wide.json" in str(error.value)
        assert untouched()

    def test_a_deeper_network(self, source, tmp_path):
        torch.save(source.state_dict(), tmp_path / "shallow.pt")
        deeper = ResNetEncoder(layers=(2, 1, 1, 1), block="basic", widen_factor=0.125)
        with pytest.raises(ValueError, match=r"missing \(\d+\): layer1\.1\.conv1\.weight"):
            load_encoder(deeper, tmp_path / "shallow.pt")

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
    def test_truncated_files(self, source, network, untouched, tmp_path, share):
        path = tmp_path / "encoder.pt"
        save_encoder(source, path, RECORD)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"encoder\.pt can not be read as PyTorch weights") as error:
            load_encoder(network, path)
        assert "\n" not in str(error.value)
        assert untouched()

    @pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(3), {}, {"state_dict": None}, {1: torch.ones(1)}])
    def test_other_content(self, network, untouched, tmp_path, content):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match=r"odd\.pt"):
            load_encoder(network, tmp_path / "odd.pt")
        assert untouched()

    def test_pickled_objects_are_refused(self, network, untouched, tmp_path):
        torch.save(network, tmp_path / "model.pt")
        with pytest.raises(ValueError, match="not a weights file"):
            load_encoder(network, tmp_path / "model.pt")

    def test_no_file(self, network, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pt"):
            load_encoder(network, tmp_path / "none.pt")

    def test_a_long_report_is_shortened(self):
        report = LoadReport(missing=[f"layer{i}" for i in range(20)])
        assert str(report).endswith("missing (20): " + ", ".join(f"layer{i}" for i in range(8)) + ", ...")


def decoder_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what a decoder file holds."""
    state = network.state_dict().items()
    return {
        key: value.clone()
        for key, value in state
        if key.startswith(("aspp.", "decoder.")) and not key.startswith("decoder.head.")
    }


class TestDecoder:
    @pytest.fixture
    def make_network(self, make_encoder):
        """Builds a segmentation network; the same seed gives the same weights, none of which has its initial value."""

        def make(seed: int = 0, out_channels: int = 2, **widths) -> SegmentationNet:
            widths = {"aspp_channels": 8, "decoder_channels": (8, 6, 4), **widths}
            network = SegmentationNet(1, out_channels, make_encoder(seed), **widths)
            for value in network.state_dict().values():
                value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else torch.tensor(12 + seed))
            return network

        return make

    @pytest.fixture
    def path(self, make_network, tmp_path):
        path = tmp_path / "models" / "pgl_decoder.pt"
        save_decoder(make_network(seed=1, out_channels=1), path, RECORD)
        return path

    def test_the_file_is_a_plain_state_dict(self, make_network, path):
        state, expected = torch.load(path, weights_only=True), decoder_of(make_network(seed=1, out_channels=1))
        assert type(state) is dict
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in state.items())
        assert EncoderRecord.load(path) == RECORD

    @pytest.mark.parametrize("out_channels", [1, 3])
    def test_all_but_the_last_convolution_is_loaded(self, make_network, path, out_channels):
        """Also where its shape is that of the file: what it was trained for is no organ."""
        network = make_network(seed=2, out_channels=out_channels)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        report = load_decoder(network, path)
        source = torch.load(path, weights_only=True)
        assert sorted(report.loaded) == sorted(source)
        assert (report.missing, report.mismatched, report.unexpected) == ([], [], [])
        for key, value in network.state_dict().items():
            assert torch.equal(value, source[key] if key in report.loaded else before[key]), key

    def test_of_a_decoder_without_skips_what_fits(self, make_network, tmp_path):
        part = nn.Module()
        part.aspp, part.decoder = ASPP(64, 8), PlainDecoder(8, (8, 6, 4))
        save_weights(part.state_dict(), tmp_path / "part.pt", RECORD)
        network = make_network()
        before = decoder_of(network)
        report = load_decoder(network, tmp_path / "part.pt")
        assert sorted(report.loaded) == sorted(decoder_of(part))
        assert len(report.missing) == 3 * 6  # convolution and batch norm of each skip
        assert all(".project." in key for key in report.missing)
        assert report.unexpected == []
        for key, value in decoder_of(network).items():
            assert torch.equal(value, decoder_of(part)[key] if key in report.loaded else before[key]), key

    def test_of_other_widths_what_fits(self, make_network, tmp_path):
        """The pyramid pooling and the first level."""
        save_decoder(make_network(seed=1, decoder_channels=(8, 5, 4)), tmp_path / "other.pt", RECORD)
        network, source = make_network(seed=2), torch.load(tmp_path / "other.pt", weights_only=True)
        report = load_decoder(network, tmp_path / "other.pt")
        assert "decoder.levels.1.up.0.weight: (8, 5, 2, 2, 2), (8, 6, 2, 2, 2)" in report.mismatched
        fitting = [key for key in source if key.startswith(("aspp.", "decoder.levels.0."))]
        assert set(fitting) <= set(report.loaded)
        assert all(torch.equal(network.state_dict()[key], source[key]) for key in fitting)

    @pytest.mark.parametrize(
        "widths", [{"aspp_channels": 16, "decoder_channels": (9, 7, 5)}, {}], ids=["widths", "part"]
    )
    def test_nothing_fits(self, make_network, tmp_path, widths):
        """The counts of batches have no shape, and are no decoder; nor is an encoder file."""
        network, source = make_network(seed=2), make_network(seed=1, **widths)
        if widths:
            save_decoder(source, tmp_path / "other.pt", RECORD)
        else:
            save_encoder(source.encoder, tmp_path / "other.pt", RECORD)
        before = decoder_of(network)
        with pytest.raises(
            ValueError, match=r"nothing of .*other\.pt fits the decoder: .*pgl_decoder\.pt.*aspp_channels"
        ):
            load_decoder(network, tmp_path / "other.pt")
        assert all(torch.equal(value, before[key]) for key, value in decoder_of(network).items())

    @pytest.mark.parametrize("out", ["decoder.pt", "decoder.safetensors"])
    @pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "decoder file"])
    def test_export(self, make_network, path, tmp_path, checkpoint, out):
        network = make_network(seed=1, out_channels=1)
        if checkpoint:
            path = tmp_path / "checkpoint_00000012.pt"
            torch.save(checkpoint_content(network, RECORD), path)
        found, expected = load_state(export_decoder(path, tmp_path / "out" / out)), decoder_of(network)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
        assert EncoderRecord.load(tmp_path / "out" / out) == RECORD

    def test_nothing_to_export(self, make_network, tmp_path):
        save_encoder(make_network().encoder, tmp_path / "encoder.pt", RECORD)
        with pytest.raises(
            ValueError, match=r"encoder\.pt holds no decoder.*give a training checkpoint, or the decoder file"
        ):
            export_decoder(tmp_path / "encoder.pt", tmp_path / "out.pt")

    def test_damaged_and_missing_files(self, make_network, path, tmp_path):
        path.write_bytes(path.read_bytes()[:-3000])
        with pytest.raises(ValueError, match=r"pgl_decoder\.pt can not be read.*copy or export it again"):
            load_decoder(make_network(), path)
        with pytest.raises(FileNotFoundError, match=r"none\.pt"):
            load_decoder(make_network(), tmp_path / "none.pt")


class TestExportEncoder:
    @pytest.fixture
    def checkpoint(self, make_pgl, tmp_path):
        path = tmp_path / "checkpoint_00000012.pt"
        torch.save(checkpoint_content(make_pgl(seed=1), RECORD), path)
        return path

    def test_as_encoder_file(self, checkpoint, network, make_encoder, tmp_path):
        assert export_encoder(checkpoint, tmp_path / "out" / "encoder.pt") == tmp_path / "out" / "encoder.pt"
        load_encoder(network, tmp_path / "out" / "encoder.pt")
        assert equal(network, make_encoder(seed=1))
        assert EncoderRecord.load(tmp_path / "out" / "encoder.pt") == RECORD

    def test_for_stock_monai(self, checkpoint, make_encoder, tmp_path):
        path = export_encoder(checkpoint, str(tmp_path / "resnet.pt"), to="monai")
        resnet = ResNet(
            block="basic",
            layers=[1, 1, 1, 1],
            block_inplanes=[8, 16, 32, 64],
            n_input_channels=1,
            conv1_t_stride=(2, 2, 1),
            feed_forward=False,
            shortcut_type="B",
            bias_downsample=False,
        )
        resnet.load_state_dict(torch.load(path, weights_only=True), strict=True)
        encoder = make_encoder(seed=1)
        image = torch.randn(1, 1, 32, 32, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            # Stock MONAI strides stage 4, which the encoder dilates: up to there the features are the same.
            x = resnet.eval().maxpool(resnet.act(resnet.bn1(resnet.conv1(image))))
            x = resnet.layer3(resnet.layer2(resnet.layer1(x)))
            assert torch.equal(x, encoder.eval()(image)[3])
        assert EncoderRecord.load(path) == RECORD

    @pytest.mark.parametrize(
        ("stem_stride", "last_stage_stride", "levels_alike"),
        [(2, 2, 5), ((2, 2, 1), 1, 0)],
        ids=["strides of MONAI", "default strides"],
    )
    def test_for_flexible_unet(self, tmp_path, stem_stride, last_stage_stride, levels_alike):
        """Its resnet10, which has one block per stage; whatever the strides, the tensors are the same."""
        torch.manual_seed(1)
        encoder = ResNetEncoder((1, 1, 1, 1), "basic", stem_stride=stem_stride, last_stage_stride=last_stage_stride)
        save_encoder(encoder, tmp_path / "encoder.pt", encoder_record(encoder))
        path = export_encoder(tmp_path / "encoder.pt", tmp_path / "flexible.pt")
        unet = FlexibleUNet(1, 2, "resnet10", spatial_dims=3, decoder_channels=(8, 8, 8, 8, 8))
        before = {key: value.clone() for key, value in unet.state_dict().items() if not key.startswith("encoder.")}
        state = torch.load(path, weights_only=True)
        assert {key for key in unet.state_dict() if key.startswith("encoder.")} == set(state)
        unet.load_state_dict({**before, **state}, strict=True)
        assert equal(unet.encoder, encoder)
        image = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            maps = zip(unet.eval().encoder(image), encoder.eval()(image), strict=True)
            assert (
                sum(theirs.shape == ours.shape and torch.equal(theirs, ours) for theirs, ours in maps) == levels_alike
            )

    def test_default_encoder_has_the_tensors_of_flexible_unet(self):
        with torch.device("meta"):
            unet, encoder = FlexibleUNet(1, 2, "resnet50", spatial_dims=3), ResNetEncoder()
        theirs = {key: value.shape for key, value in unet.encoder.state_dict().items()}
        assert theirs == {key: value.shape for key, value in encoder.state_dict().items()}

    @pytest.mark.parametrize("to", ["pgl", "monai"])
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_formats(self, checkpoint, network, make_encoder, tmp_path, to, suffix):
        """Every export can be loaded here again, and exported again where its keys are ours."""
        path = export_encoder(checkpoint, tmp_path / f"{to}{suffix}", to)
        assert load_encoder(network, path).unexpected == []
        assert equal(network, make_encoder(seed=1))
        assert EncoderRecord.load(path) == RECORD
        if to != "monai":
            again = export_encoder(path, tmp_path / "again.pt")
            expected = {f"encoder.{key}": value for key, value in make_encoder(seed=1).state_dict().items()}
            state = torch.load(again, weights_only=True)
            assert state.keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in state.items())

    def test_safetensors_file(self, checkpoint, make_encoder, tmp_path):
        """As the format's own library reads it."""
        path = export_encoder(checkpoint, tmp_path / "encoder.safetensors", "monai")
        expected = make_encoder(seed=1).state_dict()
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(expected)
            assert all(torch.equal(file.get_tensor(key), value) for key, value in expected.items())
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert json.loads(metadata["description"]) == RECORD.to_json()

    def test_a_damaged_safetensors_file(self, checkpoint, network, tmp_path):
        path = export_encoder(checkpoint, tmp_path / "encoder.safetensors")
        path.write_bytes(path.read_bytes()[:-3000])
        with pytest.raises(ValueError, match=r"encoder\.safetensors can not be read"):
            load_encoder(network, path)

    def test_nnunets_network_is_not_monais(self, tmp_path):
        network = NETWORKS["resenc"](1, 1, features_per_stage=(4, 6), strides=(1, 2), n_blocks_per_stage=(1, 1))
        save_encoder(network, tmp_path / "encoder.pt", encoder_record(network))
        with pytest.raises(ValueError, match=r"encoder\.pt holds a resenc, .*--to nnunet"):
            export_encoder(tmp_path / "encoder.pt", tmp_path / "out.pt", to="monai")

    def test_a_stock_file(self, source, tmp_path):
        """MONAI's keys alone do not say what network they are of."""
        torch.save(source.state_dict(), tmp_path / "stock.pt")
        with pytest.raises(FileNotFoundError, match=r"no description .*stock\.json"):
            export_encoder(tmp_path / "stock.pt", tmp_path / "out.pt")
        assert not (tmp_path / "out.pt").exists()

    def test_an_encoder_file_without_its_json(self, source, tmp_path):
        save_encoder(source, tmp_path / "encoder.pt", RECORD)
        (tmp_path / "encoder.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"no description .*encoder\.json"):
            export_encoder(tmp_path / "encoder.pt", tmp_path / "out.pt")

    def test_a_damaged_checkpoint(self, checkpoint, tmp_path):
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"checkpoint_00000012\.pt can not be read"):
            export_encoder(checkpoint, tmp_path / "out.pt")


class TestWriteAtomically:
    def test_an_error_while_writing_leaves_the_old_file_alone(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(b"old")

        def fail_halfway(file):
            file.write(b"half of the new conte")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            write_atomically(fail_halfway, path)
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
        assert path.read_bytes() == b"old"

    def test_makes_folders_and_replaces(self, tmp_path):
        path = tmp_path / "a" / "b" / "file"
        for content in (b"first", b"second"):
            write_atomically(lambda file, content=content: file.write(content), path)
            assert path.read_bytes() == content
        assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_load_state_reads_tensors_and_plain_values(tmp_path):
    content = {"tensor": torch.arange(3), "number": 1.5, "list": [1, (2, "x")], "none": None}
    torch.save(content, tmp_path / "file.pt")
    loaded = load_state(tmp_path / "file.pt")
    assert torch.equal(loaded.pop("tensor"), torch.arange(3))
    assert loaded == {"number": 1.5, "list": [1, (2, "x")], "none": None}


class TestOneChannelInANetworkOfSeveral:
    @pytest.mark.parametrize("family", SMALL)
    def test_of_equal_channels_it_sees_what_it_saw_of_one(self, family, tmp_path):
        one, three = small_network(family).eval(), small_network(family, in_channels=3).eval()
        as_trained(one)
        save_encoder(one.feature_network, tmp_path / "encoder.pt", encoder_record(one.feature_network))
        report = load_encoder(three, tmp_path / "encoder.pt")
        assert "; repeated (" in str(report)
        x = torch.rand(1, 1, 16, 16, 16)
        for before, now in zip(one.features(x), three.features(x.expand(1, 3, -1, -1, -1)), strict=True):
            torch.testing.assert_close(now, before, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("names", [["PET", "CT"], ["CT", "PET", "MR"]])
    def test_the_same_channels_in_another_order_or_number(self, tmp_path, names):
        network = small_network("dynunet", in_channels=2)
        record = encoder_record(network, input=input_record(channel_names=["CT", "PET"]))
        save_encoder(network, tmp_path / "encoder.pt", record)
        with pytest.raises(ValueError, match=rf"\['CT', 'PET'\], here they are {re.escape(str(names))}"):
            load_pretrained(network, tmp_path / "encoder.pt", input={"channel_names": names})
