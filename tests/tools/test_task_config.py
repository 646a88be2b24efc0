"""The train.json of a bundle for one task, and the model that its training would start from."""

from __future__ import annotations

import json

import pytest
import torch
from made_weights import SMALL, encoder_record, model_record, small_network
from monai.bundle import ConfigParser
from programs import SEGMENTATION_CONFIGS

from pgl_ext.networks import ResNetEncoder, SegmentationNet
from pgl_ext.networks.build import NETWORKS
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.task_config import task_config, write_initial_model
from pgl_ext.weights import (
    EncoderRecord,
    InputRecord,
    ModelRecord,
    build_network,
    load_model,
    save_encoder,
    save_weights,
)

OVERLAYS = ("tasks/openkbp.yaml", "small.yaml")


@pytest.fixture
def encoder(tmp_path, make_encoder):
    """A file of an encoder that neither train.json nor an overlay has."""
    encoder = make_encoder(seed=3)
    record = EncoderRecord(architecture=encoder.architecture, input=InputRecord())
    save_encoder(encoder, tmp_path / "encoder.pt", record)
    return tmp_path / "encoder.pt"


@pytest.fixture
def model(tmp_path, make_encoder):
    """A file of a model of two organs, on such an encoder."""
    network = SegmentationNet(1, 3, make_encoder(), aspp_channels=16, decoder_channels=(16, 8, 8))
    record = ModelRecord(
        task=SegmentationTask({"liver": [1, 3], "spleen": 2}).description(),
        network=network.architecture,
        input=InputRecord(hu_window=[-100, 300], spacing=[2, 2, 3], patch_size=[32, 32, 16]),
    )
    save_weights(network.state_dict(), tmp_path / "model.pt", record)
    return tmp_path / "model.pt"


def test_overlays_are_merged_as_monai_does():
    files = [str(SEGMENTATION_CONFIGS / name) for name in ("train.json", *OVERLAYS)]
    expected = ConfigParser(ConfigParser.load_config_files(files))
    found = ConfigParser(task_config(SEGMENTATION_CONFIGS, OVERLAYS))
    for name in ("organs", "background_values", "patch_size", "encoder", "network_def", "lr", "max_epochs", "train"):
        assert found[name] == expected[name], name
    assert found["patch_size"] == [48, 48, 32]  # of small.yaml, the later one


def test_without_anything_it_is_as_it_was():
    assert task_config(SEGMENTATION_CONFIGS) == json.loads((SEGMENTATION_CONFIGS / "train.json").read_text())


def test_an_overlay_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("organs: {heart: 1}\n")
    assert task_config(SEGMENTATION_CONFIGS, [str(tmp_path / "mine.yaml")])["organs"] == {"heart": 1}


def test_weights_fit_the_network(encoder, model):
    """Whatever the overlays say of layouts."""
    for arguments in ({"encoder": encoder}, {"model": model}, {"encoder": encoder, "model": model}):
        parser = ConfigParser(task_config(SEGMENTATION_CONFIGS, OVERLAYS, **arguments))
        network = parser.get_parsed_content("network_def")
        for path in arguments.values():
            keys = network.load_state_dict(torch.load(path, weights_only=True), strict=path == model)
            assert not [key for key in keys.missing_keys if key.startswith("encoder.")]
            assert not keys.unexpected_keys


def test_a_models_task_comes_first(model):
    config = task_config(SEGMENTATION_CONFIGS, OVERLAYS, model)
    task = ModelRecord.load(model).task
    assert {name: config[name] for name in task} == task
    assert [config[name] for name in ("hu_window", "spacing", "patch_size")] == [[-100, 300], [2, 2, 3], [32, 32, 16]]
    assert config["lr"] == 0.2  # of which a model says nothing


def test_every_family_is_here():
    assert SMALL.keys() == NETWORKS.keys()


def write_encoder(network, path):
    save_encoder(network.feature_network, path, encoder_record(network.feature_network))
    return path


@pytest.mark.parametrize("family", NETWORKS)
class TestFamilies:
    """Whatever network the overlays name, it is that of the weights."""

    OVERLAYS = pytest.mark.parametrize(
        "overlays", [OVERLAYS, ("networks/dynunet.yaml", "tasks/phantom.yaml", "small.yaml")], ids=["paper", "dynunet"]
    )

    @OVERLAYS
    def test_of_a_model(self, family, overlays, tmp_path):
        network = small_network(family)
        record = model_record(network, SegmentationTask({"liver": [1, 3], "spleen": 2}))
        save_weights(network.state_dict(), tmp_path / "model.pt", record)
        config = json.loads(json.dumps(task_config(SEGMENTATION_CONFIGS, overlays, tmp_path / "model.pt")))
        again = ConfigParser(config).get_parsed_content("network_def")
        assert again.architecture == network.architecture
        again.load_state_dict(network.state_dict())

    @OVERLAYS
    def test_of_an_encoder(self, family, overlays, tmp_path):
        encoder = write_encoder(small_network(family, out_channels=1), tmp_path / "encoder.pt")
        config = json.loads(json.dumps(task_config(SEGMENTATION_CONFIGS, overlays, encoder=encoder)))
        write_initial_model(config, tmp_path / "initial.pt", encoder)
        network = build_network(tmp_path / "initial.pt")
        assert type(network) is NETWORKS[family]
        assert network.arguments["out_channels"] == SegmentationTask(config["organs"]).out_channels
        state = network.state_dict()
        for key, value in torch.load(encoder, weights_only=True).items():
            assert torch.equal(state[key], value), key

    def test_of_both(self, family, tmp_path):
        network = small_network(family)
        encoder = write_encoder(small_network(family, out_channels=1), tmp_path / "encoder.pt")
        save_weights(network.state_dict(), tmp_path / "model.pt", model_record(network, SegmentationTask({"a": 1})))
        task_config(SEGMENTATION_CONFIGS, (), tmp_path / "model.pt", encoder)
        other = write_encoder(small_network("segresnet", init_filters=16), tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"other\.pt does not fit .*model\.pt"):
            task_config(SEGMENTATION_CONFIGS, (), tmp_path / "model.pt", other)


def test_an_overlays_network_is_kept_where_it_takes_the_encoder(tmp_path):
    """With what an encoder does not depend on."""
    encoder = write_encoder(small_network("dynunet", out_channels=1), tmp_path / "encoder.pt")
    network = {"_target_": "pgl_ext.networks.DynUNet", **SMALL["dynunet"], "deep_supervision": True}
    network["out_channels"] = "$@task.out_channels"
    (tmp_path / "mine.json").write_text(json.dumps({"network_def": network}))
    assert task_config(SEGMENTATION_CONFIGS, [str(tmp_path / "mine.json")], encoder=encoder)["network_def"] == network


class TestRefused:
    def test_missing_overlays(self):
        with pytest.raises(FileNotFoundError, match=r"config tasks/absent\.yaml is neither in"):
            task_config(SEGMENTATION_CONFIGS, ["tasks/absent.yaml"])

    def test_weights_of_two_layouts(self, encoder, model):
        path = encoder.with_suffix(".json")
        record = json.loads(path.read_text())
        record["architecture"]["arguments"]["widen_factor"] = 0.25
        path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=r"encoder\.pt does not fit .*model\.pt"):
            task_config(SEGMENTATION_CONFIGS, (), model, encoder)

    def test_an_encoder_without_segmentation_network(self, tmp_path):
        encoder = ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.0625, last_stage_stride=2)
        save_encoder(encoder, tmp_path / "encoder.pt", encoder_record(encoder))
        with pytest.raises(ValueError, match=r"encoder\.pt can not be packaged .* last_stage_stride=1"):
            task_config(SEGMENTATION_CONFIGS, (), encoder=tmp_path / "encoder.pt")

    @pytest.mark.parametrize(
        ("network", "message"),
        [
            ({"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 1}, "is a Conv3d"),
            ({"_target_": "pgl_ext.networks.DynUNet", "aspp_channels": 64}, "can not be built.*aspp_channels.*_small"),
        ],
    )
    def test_networks_that_a_model_file_can_not_be_of(self, network, message, tmp_path):
        config = task_config(SEGMENTATION_CONFIGS, OVERLAYS) | {"network_def": network}
        with pytest.raises(ValueError, match=message):
            write_initial_model(config, tmp_path / "initial.pt")

    def test_what_is_no_encoder(self, encoder):
        encoder.with_suffix(".json").write_text("{}")
        with pytest.raises(ValueError, match=r"encoder\.json does not describe an encoder"):
            task_config(SEGMENTATION_CONFIGS, (), encoder=encoder)


class TestInitialModel:
    def test_is_a_model_file_with_the_encoders_weights(self, encoder, tmp_path):
        config = task_config(SEGMENTATION_CONFIGS, OVERLAYS, encoder=encoder)
        write_initial_model(config, tmp_path / "initial.pt", encoder)
        network = load_model(build_network(tmp_path / "initial.pt"), tmp_path / "initial.pt")
        for key, value in torch.load(encoder, weights_only=True).items():
            assert torch.equal(network.state_dict()[key], value), key
        record = ModelRecord.load(tmp_path / "initial.pt")
        assert list(record.task["organs"]) == list(config["organs"])
        assert record.input == InputRecord(config["hu_window"], config["spacing"], [48, 48, 32])
        assert (record.steps, record.pretrained_encoder) == (0, "encoder.pt")

    def test_is_the_same_each_time_and_draws_nothing(self, tmp_path):
        config = task_config(SEGMENTATION_CONFIGS, OVERLAYS)
        before = torch.get_rng_state()
        for name in ("a.pt", "b.pt"):
            write_initial_model(config, tmp_path / name)
            torch.rand(1)
        torch.set_rng_state(before)
        write_initial_model(config, tmp_path / "c.pt")
        assert torch.equal(torch.get_rng_state(), before)
        assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
