import json
import logging
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from made_weights import as_trained, edit_json, encoder_record, input_record, model_record, small_network
from monai.handlers import CheckpointLoader
from monai.networks.nets import ResNet
from torch import nn

from pgl_ext.networks import ResNetEncoder, SegmentationNet
from pgl_ext.networks.build import prepare_network
from pgl_ext.task import SegmentationTask
from pgl_ext.weights import (
    ModelRecord,
    build_network,
    load_encoder,
    load_model,
    load_pretrained,
    model_files,
    network_of,
    save_decoder,
    save_encoder,
    save_weights,
)

ENCODER = {"layers": (1, 1, 1, 1), "block": "basic", "widen_factor": 0.0625}
TASK = SegmentationTask({"kidney": [1, 2], "tumour": [2]}, multi_label=True)
METADATA = Path(__file__).parents[2] / "bundles" / "pgl_segmentation" / "configs" / "metadata.json"
SAME_INPUT = {"hu_window": [-1024, 325], "spacing": None, "patch_size": [192, 192, 48]}


def make_network(seed: int = 0, encoder: dict = ENCODER, **arguments) -> SegmentationNet:
    torch.manual_seed(seed)
    return SegmentationNet(
        **{"out_channels": 2, "encoder": encoder, "aspp_channels": 8, "decoder_channels": (8, 6, 4), **arguments}
    )


def make_encoder(seed: int = 1, **arguments) -> ResNetEncoder:
    """As after training: no tensor has its initial value."""
    torch.manual_seed(seed)
    return as_trained(ResNetEncoder(**{**ENCODER, **arguments}))


def assert_encoder_is(network: nn.Module, expected: dict) -> None:
    state = network.encoder.state_dict()
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key


@pytest.fixture
def encoder_file(tmp_path):
    path = tmp_path / "pgl_encoder.pt"
    save_encoder(make_encoder(), path, encoder_record(make_encoder()))
    return path


class TestLoadPretrained:
    def test_loads_all_of_the_encoder_and_nothing_else(self, encoder_file, caplog):
        network, untouched = make_network(), make_network().state_dict()
        with caplog.at_level(logging.INFO, logger="pgl_ext"):
            assert load_pretrained(network, encoder_file, input=SAME_INPUT) is network
        expected = make_encoder().state_dict()
        assert_encoder_is(network, expected)
        for key, value in network.state_dict().items():
            assert key.startswith("encoder.") or torch.equal(value, untouched[key]), key
        assert f"{len(expected)} of {len(expected)} tensors loaded" in caplog.text
        assert str(encoder_file) in caplog.text
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_says_what_is_loaded_later(self, encoder_file, caplog):
        """As MONAI Label loads, by a handler of MONAI that says nothing and takes what it finds."""
        network = load_pretrained(make_network())
        loader = CheckpointLoader(str(encoder_file), {"model": network}, strict=False)
        with caplog.at_level(logging.INFO, logger="pgl_ext"):
            loader(Engine(lambda *_: None))
        expected, total = make_encoder().state_dict(), len(network.state_dict())
        assert_encoder_is(network, expected)
        assert f"all {len(expected)} tensors of the encoder: {len(expected)} of {total} tensors loaded" in caplog.text
        assert "aspp." in caplog.text

    @pytest.mark.parametrize("keys", ["none", "some"])
    def test_later_too_all_of_the_encoder_or_an_error(self, keys):
        network = load_pretrained(make_network())
        state = {f"encoder.{key}": value for key, value in make_encoder().state_dict().items()}
        state = {} if keys == "none" else {key: value for key, value in state.items() if "layer4" not in key}
        with pytest.raises(ValueError, match=r"tensors of its encoder are not among them: .*missing .*encoder file"):
            network.load_state_dict(state, strict=False)

    def test_random_initialisation(self, caplog):
        network = make_network()
        before = {key: value.clone() for key, value in network.state_dict().items()}
        with caplog.at_level(logging.INFO, logger="pgl_ext"):
            load_pretrained(network)
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
        assert "random initialisation" in caplog.text

    @pytest.mark.parametrize(
        ("recorded", "task", "words"),
        [
            ({}, {"hu_window": [-200, 300]}, ["clipped to [-1024, 325] HU, here [-200.0, 300.0]", "--hu_window"]),
            ({}, {"hu_window": None}, ["[-1024, 325] HU, here None"]),
            ({"hu_window": None}, {}, ["clipped to None HU, here [-1024.0, 325.0]"]),
            ({}, {"spacing": (2, 2, 3)}, ["spacing as stored, here [2.0, 2.0, 3.0] mm", "--spacing"]),
            ({"spacing": [1, 1, 1]}, {}, ["spacing [1, 1, 1], here as stored mm"]),
            ({"spacing": [1, 1, 1]}, {"spacing": [1, 1, 2]}, ["spacing [1, 1, 1], here [1.0, 1.0, 2.0] mm"]),
        ],
    )
    def test_warns_of_other_input(self, tmp_path, caplog, recorded, task, words):
        path = tmp_path / "encoder.pt"
        save_encoder(make_encoder(), path, encoder_record(make_encoder(), input=input_record(**recorded)))
        network = load_pretrained(make_network(), path, input={**SAME_INPUT, **task})
        assert_encoder_is(network, make_encoder().state_dict())
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert all(word in warning for word in (*words, str(path)))

    def test_two_differences_are_two_warnings(self, encoder_file, caplog):
        load_pretrained(make_network(), encoder_file, input={"hu_window": [0, 1], "spacing": [1, 1, 1]})
        assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 2

    @pytest.mark.parametrize(("recorded", "given"), [([-1024, 325], (-1024.0, 325.0)), ([-1024.0, 325], [-1024, 325])])
    def test_equal_numbers_of_another_type_are_no_difference(self, tmp_path, caplog, recorded, given):
        path = tmp_path / "encoder.pt"
        record = encoder_record(make_encoder(), input=input_record(hu_window=recorded, spacing=[1, 2.0, 3]))
        save_encoder(make_encoder(), path, record)
        load_pretrained(make_network(), path, input={"hu_window": given, "spacing": (1.0, 2, 3)})
        assert not [r for r in caplog.records if r.levelno == logging.WARNING]

    def test_warns_where_there_is_no_json(self, encoder_file, caplog):
        encoder_file.with_suffix(".json").unlink()
        network = load_pretrained(make_network(), encoder_file, input=SAME_INPUT)
        assert_encoder_is(network, make_encoder().state_dict())
        assert "no JSON beside it" in caplog.text

    def test_damaged_json_is_named(self, encoder_file):
        encoder_file.with_suffix(".json").write_text('{"input": ')
        with pytest.raises(ValueError, match=r"pgl_encoder\.json is damaged.*copy it again"):
            load_pretrained(make_network(), encoder_file, input=SAME_INPUT)

    @pytest.mark.parametrize("layout", ["plain", "MedicalNet", "with a classifier"])
    def test_other_layouts(self, tmp_path, layout):
        """A ResNet of MONAI as it is, at MONAI's own stride, which has the same tensors."""
        torch.manual_seed(3)
        stock = ResNet(
            "basic",
            [1, 1, 1, 1],
            [4, 8, 16, 32],
            n_input_channels=1,
            feed_forward=layout == "with a classifier",
            num_classes=5,
            bias_downsample=False,
        )
        state = stock.state_dict()
        if layout == "MedicalNet":
            state = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
        path = tmp_path / "stock.pt"
        torch.save(state, path)
        network = load_pretrained(make_network(), path, input=SAME_INPUT)
        assert_encoder_is(network, stock.state_dict())

    def test_bottlenecks_of_the_default_encoder(self, tmp_path):
        """ResNet-50 as the paper's, sixteen times narrower."""
        stock = ResNet(
            "bottleneck", [3, 4, 6, 3], [4, 8, 16, 32], n_input_channels=1, feed_forward=False, bias_downsample=False
        )
        torch.save(stock.state_dict(), tmp_path / "stock.pt")
        network = make_network(encoder={"widen_factor": 1 / 16})
        assert_encoder_is(load_pretrained(network, tmp_path / "stock.pt"), stock.state_dict())

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            ({"layers": (2, 1, 1, 1)}, ["72 of 72", "unexpected (12): layer1.1.bn1.bias"]),
            ({"widen_factor": 0.125}, ["mismatched", "conv1.weight: (8, 1, 7, 7, 7), (4, 1, 7, 7, 7)"]),
            (
                {"block": "bottleneck"},
                ["mismatched", "layer1.0.conv1.weight: (4, 4, 1, 1, 1), (4, 4, 3, 3, 3)", "unexpected"],
            ),
            ({"in_channels": 2}, ["mismatched (1)", "conv1.weight: (4, 2, 7, 7, 7), (4, 1, 7, 7, 7)"]),
        ],
        ids=str,
    )
    def test_another_architecture(self, tmp_path, other, words):
        path = tmp_path / "other.pt"
        save_encoder(make_encoder(**other), path, encoder_record(make_encoder(**other)))
        network, before = make_network(), make_network().state_dict()
        with pytest.raises(ValueError, match="does not fit the encoder") as error:
            load_pretrained(network, path)
        assert all(word in str(error.value) for word in (*words, "other.json"))
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

    def test_shortcuts_with_a_bias(self, tmp_path):
        """MONAI's default, of which the batch norm behind the shortcut leaves nothing: the features are the same."""
        stock = ResNet("basic", [1, 1, 1, 1], [4, 8, 16, 32], n_input_channels=1, feed_forward=False)
        for value in stock.state_dict().values():
            value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else torch.tensor(12))
        assert stock.layer4[0].downsample[0].bias is not None
        torch.save(stock.state_dict(), tmp_path / "stock.pt")
        # At the stride of MONAI's, where the deepest map is what it pools.
        encoder = ResNetEncoder(**ENCODER, stem_stride=1, last_stage_stride=2)
        report = load_encoder(encoder, tmp_path / "stock.pt")
        assert report.unexpected == []
        x = torch.rand(1, 1, 32, 32, 16)
        with torch.no_grad():
            torch.testing.assert_close(encoder.eval()(x)[-1].mean((2, 3, 4)), stock.eval()(x), rtol=1e-4, atol=1e-4)

    def test_tensors_that_are_missing_are_listed(self, tmp_path):
        state = make_encoder().state_dict()
        del state["layer2.0.conv1.weight"]
        torch.save(state, tmp_path / "part.pt")
        with pytest.raises(ValueError, match=r"missing \(1\): layer2\.0\.conv1\.weight"):
            load_pretrained(make_network(), tmp_path / "part.pt")

    def test_truncated_file(self, encoder_file):
        encoder_file.write_bytes(encoder_file.read_bytes()[:-3000])
        with pytest.raises(ValueError, match=r"pgl_encoder\.pt can not be read.*copy or export it again"):
            load_pretrained(make_network(), encoder_file)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pt"):
            load_pretrained(make_network(), tmp_path / "none.pt")

    def test_a_network_of_something_else(self, tmp_path):
        torch.save({"weight": torch.zeros(3)}, tmp_path / "linear.pt")
        with pytest.raises(ValueError, match=r"missing \(\d\d\).*unexpected \(1\): weight"):
            load_pretrained(make_network(), tmp_path / "linear.pt")

    def test_prepared_for_training(self, encoder_file):
        """As the bundle's config does, with another memory layout and synchronised batch norm."""
        network = make_network()
        keys = list(network.state_dict())
        loaded = load_pretrained(network, encoder_file)
        assert prepare_network(loaded, "cpu", channels_last=True, sync_batch_norm=True) is network
        assert list(network.state_dict()) == keys
        assert network.encoder.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
        assert_encoder_is(network, make_encoder().state_dict())
        # What is loaded later is still checked.
        with pytest.raises(ValueError, match="tensors of its encoder are not among them"):
            network.load_state_dict({}, strict=False)


class TestLoadPretrainedWithADecoder:
    """What ``weights.load_decoder`` loads, and what the user is told."""

    @pytest.fixture
    def decoder_file(self, tmp_path):
        path = tmp_path / "pgl_decoder.pt"
        save_decoder(make_network(seed=5, out_channels=1), path, encoder_record(make_encoder()))
        return path

    def test_beside_an_encoder(self, encoder_file, decoder_file, caplog):
        network, untouched = make_network(), make_network().state_dict()
        source = torch.load(decoder_file, weights_only=True)
        with caplog.at_level(logging.INFO, logger="pgl_ext"):
            load_pretrained(network, encoder_file, decoder_file, SAME_INPUT)
        assert_encoder_is(network, make_encoder().state_dict())
        for key, value in network.state_dict().items():
            if not key.startswith("encoder."):
                assert torch.equal(value, (untouched if key.startswith("decoder.head.") else source)[key]), key
        assert f"{decoder_file}: {len(source)} of {len(source)} tensors loaded\n" in caplog.text
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_alone(self, decoder_file, caplog):
        network, before = make_network(), make_network().encoder.state_dict()
        with caplog.at_level(logging.INFO, logger="pgl_ext"):
            load_pretrained(network, decoder=decoder_file, input=SAME_INPUT)
        assert_encoder_is(network, before)
        assert torch.equal(
            network.aspp.join[0].weight, torch.load(decoder_file, weights_only=True)["aspp.join.0.weight"]
        )
        assert "no pretrained_encoder: random initialisation" in caplog.text

    def test_warns_of_other_input(self, decoder_file, caplog):
        load_pretrained(make_network(), decoder=decoder_file, input={**SAME_INPUT, "hu_window": [0, 1]})
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert f"{decoder_file} was pre-trained on other input" in warning

    def test_nothing_fits(self, decoder_file):
        network = make_network(aspp_channels=16, decoder_channels=(9, 7, 5))
        with pytest.raises(ValueError, match=r"nothing of .*pgl_decoder\.pt fits.*mismatched"):
            load_pretrained(network, decoder=decoder_file)

    def test_missing_file(self, encoder_file, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pt"):
            load_pretrained(make_network(), encoder_file, tmp_path / "none.pt")


@pytest.fixture
def model_file(tmp_path):
    """What fine-tuning writes, and the network it was written from."""
    network = make_network(seed=4, dropout=0.25)
    path = tmp_path / "models" / "model.pt"
    prepared = input_record(hu_window=[-200, 300], spacing=[1.5, 1.5, 3])
    save_weights(network.state_dict(), path, model_record(network, TASK, version="1.2.3", input=prepared))
    return path, network.eval()


class TestModelRecord:
    def test_content(self, model_file):
        record = ModelRecord.load(model_file[0])
        assert SegmentationTask(**record.task).description() == TASK.description()
        assert record.network == model_file[1].architecture
        assert record.input.hu_window == [-200, 300]
        assert record.input.spacing == [1.5, 1.5, 3]
        assert record.input.patch_size == [32, 32, 16]
        assert record.version == "1.2.3"

    @pytest.mark.parametrize("load", [ModelRecord.load, lambda path: ModelRecord.load_or_default(path, METADATA)])
    def test_the_weights_need_not_be_there(self, model_file, load):
        model_file[0].unlink()
        assert load(model_file[0]).input.patch_size == [32, 32, 16]

    def test_without_a_file_it_is_the_default_task(self, tmp_path):
        record = ModelRecord.load_or_default(tmp_path / "model.pt", METADATA)
        task = SegmentationTask(**record.task)
        assert len(task.names) == 13
        assert task.values == tuple(range(14))
        assert not task.multi_label
        assert task.out_channels == record.network["arguments"]["out_channels"] == 14
        assert record.network["arguments"]["in_channels"] == record.input.channels == 1
        assert record.input.hu_window == [-1024, 325]
        assert record.input.spacing is None
        assert record.input.patch_size == [192, 192, 48]

    def test_of_a_bundle_of_one_organ(self, tmp_path):
        metadata = json.loads(METADATA.read_text())
        outputs = metadata["network_data_format"]["outputs"]["pred"]
        outputs.update(num_channels=1, channel_def={"0": "spleen"})
        (tmp_path / "metadata.json").write_text(json.dumps(metadata))
        record = ModelRecord.load_or_default(tmp_path / "model.pt", tmp_path / "metadata.json")
        assert SegmentationTask(**record.task).multi_label
        assert record.network["arguments"]["out_channels"] == 1

    def test_without_file_and_bundle(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"model\.pt does not exist.*--model_path"):
            ModelRecord.load_or_default(tmp_path / "model.pt", tmp_path / "metadata.json")

    def test_weights_without_their_json_are_not_the_default_task(self, model_file):
        model_file[0].with_suffix(".json").unlink()
        with pytest.raises(FileNotFoundError, match=r"no description .*model\.json beside model\.pt: copy both"):
            ModelRecord.load_or_default(model_file[0], METADATA)

    def test_spacing_as_stored_and_no_clipping(self, model_file):
        edit_json(model_file[0], input={"spacing": None, "hu_window": None, "patch_size": [16, 16, 8]})
        record = ModelRecord.load(model_file[0])
        assert record.input.spacing is None
        assert record.input.hu_window is None

    def test_the_json_of_an_encoder(self, encoder_file):
        with pytest.raises(ValueError, match=r"pgl_encoder\.json .*lacks \['network', 'task'\].*model\.pt"):
            ModelRecord.load(encoder_file)

    def test_no_patch_size(self, model_file):
        edit_json(model_file[0], input={"hu_window": None})
        with pytest.raises(ValueError, match=r"model\.json .*lacks a patch_size.*model\.pt"):
            ModelRecord.load(model_file[0])

    @pytest.mark.parametrize("content", ["", '{"task": ', "[1, 2]"])
    def test_damaged_json(self, model_file, content):
        model_file[0].with_suffix(".json").write_text(content)
        with pytest.raises(ValueError, match=r"model\.json .*copy it again"):
            ModelRecord.load(model_file[0])


class TestModelFiles:
    def test_round_trip(self, model_file):
        path, network = model_file
        empty = network_of(ModelRecord.load(path))
        assert load_model(empty, path) is empty
        x = torch.rand(1, 1, 20, 32, 16)
        for again in (empty, build_network(path)):
            assert not again.training
            with torch.no_grad():
                assert torch.equal(again(x), network(x))

    def test_the_network_is_built_without_the_weights(self, model_file):
        model_file[0].unlink()
        network = network_of(ModelRecord.load(model_file[0]))
        assert network.architecture == model_file[1].architecture
        with pytest.raises(FileNotFoundError, match=r"model\.pt does not exist.*--model_path"):
            build_network(model_file[0])

    def test_missing(self, model_file, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist.*--model_path") as error:
            load_model(model_file[1], tmp_path / "none.pt")
        assert str(tmp_path) in str(error.value)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"out_channels": 3}, ["mismatched (2)", "decoder.head.weight: (2, 4, 1, 1, 1), (3, 4, 1, 1, 1)"]),
            ({"encoder": {**ENCODER, "layers": (1, 2, 1, 1)}}, ["missing (12)", "encoder.layer2.1.conv1.weight"]),
        ],
        ids=["classes", "encoder"],
    )
    def test_misfit(self, model_file, arguments, words):
        network = make_network(seed=9, **arguments)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        with pytest.raises(ValueError, match="does not fit the network") as error:
            load_model(network, model_file[0])
        assert all(word in str(error.value) for word in (*words, str(model_file[0]), "JSON"))
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

    def test_more_tensors_than_the_network_has(self, model_file):
        path, network = model_file
        torch.save({**network.state_dict(), "extra": torch.zeros(1)}, path)
        edit_json(path, sha256=None)
        with pytest.raises(ValueError, match=r"unexpected \(1\): extra"):
            load_model(network, path)

    def test_truncated(self, model_file):
        path, network = model_file
        path.write_bytes(path.read_bytes()[:-3000])
        with pytest.raises(ValueError, match=r"model\.pt can not be read"):
            load_model(network, path)

    def test_architecture_of_another_version(self, model_file):
        architecture = model_file[1].architecture
        edit_json(
            model_file[0], network={**architecture, "arguments": {**architecture["arguments"], "attention": True}}
        )
        with pytest.raises(ValueError, match=r"'attention'.*Install the version of pgl_ext"):
            build_network(model_file[0])


class TestSeveralModels:
    @pytest.fixture
    def folds(self, tmp_path) -> list[Path]:
        """Eleven, so that the order of their names is not that of their numbers; the last is of another family."""
        paths = [tmp_path / f"fold_{number}" / "models" / "model.pt" for number in range(11)]
        for number, path in enumerate(paths):
            network = make_network(seed=number) if number < 10 else small_network("dynunet", out_channels=2)
            save_weights(network.state_dict(), path, model_record(network, TASK))
        return paths

    def test_of_a_folder_they_are_its_folds_in_order(self, folds, tmp_path):
        assert model_files(tmp_path) == model_files(str(tmp_path)) == model_files(folds) == list(map(str, folds))

    def test_one_file_is_itself(self, folds, tmp_path):
        assert model_files(folds[3]) == [str(folds[3])]
        assert model_files(tmp_path / "none.pt") == [str(tmp_path / "none.pt")]

    def test_each_has_the_weights_of_its_file(self, folds, tmp_path):
        files = model_files(tmp_path)
        networks = load_model(network_of(ModelRecord.load_or_default(files, METADATA)), files)
        assert not any(network.training for network in networks)
        for network, file in zip(networks, folds, strict=True):
            for key, value in torch.load(file, weights_only=True).items():
                assert torch.equal(network.state_dict()[key], value), (file, key)

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            (
                {"input": {**SAME_INPUT, "patch_size": [32, 32, 16], "spacing": [1, 1, 2]}},
                r"input spacing None, .*fold_2.* has \[1, 1, 2\]",
            ),
            (
                {"input": {**SAME_INPUT, "patch_size": [32, 32, 16], "hu_window": None}},
                r"input hu_window \[-1024, 325\], .*fold_2.* has None",
            ),
            ({"task": {**TASK.description(), "background_values": [9]}}, r"background_values \[0\], .*has \[9\]"),
        ],
    )
    def test_of_other_input_or_another_task(self, folds, entries, message):
        edit_json(folds[2], **entries)
        with pytest.raises(ValueError, match=message):
            ModelRecord.load_or_default(folds, METADATA)

    def test_one_is_missing(self, folds):
        folds[1].unlink()
        with pytest.raises(FileNotFoundError, match="fold_1"):
            load_model(make_network(seed=0), folds)
