from __future__ import annotations

import json
import logging
import shutil

import jsonschema
import pytest
import torch
from monai.bundle import ConfigParser, verify_metadata, verify_net_in_out
from programs import ROOT, SCHEMA

BUNDLE = ROOT / "bundles" / "pgl_pretrain"
METADATA = BUNDLE / "configs" / "metadata.json"
INFERENCE = BUNDLE / "configs" / "inference.json"

needs_schema = pytest.mark.skipif(not SCHEMA.is_file(), reason=f"the bundle schema {SCHEMA} is not there")


def test_metadata_is_complete():
    metadata = json.loads(METADATA.read_text())
    assert metadata["version"] in metadata["changelog"]
    tensors = metadata["network_data_format"]
    for tensor in (tensors["inputs"]["image"], tensors["outputs"]["pred"]):
        assert set(tensor) >= {
            *("type", "format", "num_channels", "spatial_shape", "dtype", "value_range"),
            *("is_patch_data", "channel_def"),
        }


@needs_schema
def test_metadata_follows_the_schema(tmp_path, monkeypatch):
    jsonschema.validate(json.loads(METADATA.read_text()), json.loads(SCHEMA.read_text()))
    # An existing file is used as it is: nothing is downloaded.
    monkeypatch.setattr("monai.apps.utils.urlretrieve", lambda *args, **kwargs: pytest.fail("tried to download"))
    verify_metadata(meta_file=str(METADATA), filepath=str(shutil.copy(SCHEMA, tmp_path)))


def test_monai_accepts_network_and_metadata(caplog):
    with caplog.at_level(logging.INFO):
        verify_net_in_out("network_def", meta_file=str(METADATA), config_file=str(INFERENCE), device="cpu", n=2)
    assert "verified with no error" in caplog.text


def test_network_can_be_scripted():
    parser = ConfigParser()
    parser.read_config(str(INFERENCE))
    network = parser.get_parsed_content("network_def").eval()
    assert torch.jit.script(network)(torch.rand(1, 1, 16, 16, 8)).shape == (1, 2048, 1, 1, 1)


def test_inference_has_the_keys_that_the_model_zoo_asks_for():
    config = json.loads(INFERENCE.read_text())
    assert set(config) >= {
        *("bundle_root", "dataset_dir", "output_dir", "device", "network_def", "network", "preprocessing", "dataset"),
        *("dataloader", "inferer", "postprocessing", "handlers", "evaluator", "initialize", "run"),
    }


def test_inference_prepares_volumes_as_training_does():
    inference = json.loads(INFERENCE.read_text())["preprocessing"]
    assert inference == json.loads((BUNDLE / "configs" / "train.json").read_text())["volume_preprocessing"]
    assert inference["_target_"] == "pgl_ext.transforms.preprocessing"


def test_nothing_of_a_custom_package_is_imported_at_initialization():
    """MONAI evaluates ``imports`` and ``initialize`` before a bundle's own folder can be imported from."""
    config = json.loads(INFERENCE.read_text())
    # The check of names is left out there, and comes with what is run.
    steps = [step for step in config["initialize"] if "_disabled_" not in step]
    assert "pgl_ext" not in json.dumps([config["imports"], steps])
