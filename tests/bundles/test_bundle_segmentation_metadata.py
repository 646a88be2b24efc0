from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import jsonschema
import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from programs import ROOT, SCHEMA

from pgl_ext.networks import SegmentationNet
from pgl_ext.segmentation.losses import DiceCrossEntropyLoss
from pgl_ext.task import SegmentationTask
from pgl_ext.weights import InputRecord, ModelRecord, save_weights

BUNDLE = ROOT / "bundles" / "pgl_segmentation"
METADATA = BUNDLE / "configs" / "metadata.json"
TRAIN = BUNDLE / "configs" / "train.json"
INFERENCE = BUNDLE / "configs" / "inference.json"

needs_schema = pytest.mark.skipif(not SCHEMA.is_file(), reason=f"the bundle schema {SCHEMA} is not there")

TINY_ENCODER = {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 0.0625}


def parsed(path: Path, **overrides) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(path))
    parser.update({key.replace("__", "::"): value for key, value in overrides.items()})
    return parser


@pytest.fixture
def model_file(tmp_path) -> Path:
    """A tiny trained model, as fine-tuning writes it."""
    task = SegmentationTask({"liver": [1], "spleen": [2]})
    network = SegmentationNet(1, 3, encoder=TINY_ENCODER, aspp_channels=8, decoder_channels=(8, 6, 4))
    inputs = InputRecord(hu_window=[-1024, 325], patch_size=[16, 16, 8])
    record = ModelRecord(task=task.description(), network=network.architecture, input=inputs)
    save_weights(network.state_dict(), tmp_path / "models" / "model.pt", record)
    return tmp_path / "models" / "model.pt"


@pytest.fixture
def dataset_dir(tmp_path) -> Path:
    """Three labelled cases in folders."""
    for number in range(3):
        for folder in ("images", "labels"):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            voxels = np.random.default_rng(number).integers(0, 3, (20, 18, 10)).astype(np.float32)
            image = nibabel.Nifti1Image(voxels, np.eye(4))
            nibabel.save(image, tmp_path / "data" / folder / f"case{number}.nii")
    return tmp_path / "data"


class TestMetadata:
    metadata = json.loads(METADATA.read_text())

    def test_is_complete(self):
        assert self.metadata["version"] in self.metadata["changelog"]
        tensors = self.metadata["network_data_format"]
        for tensor in (tensors["inputs"]["image"], tensors["outputs"]["pred"]):
            assert set(tensor) >= {
                *("type", "format", "num_channels", "spatial_shape", "dtype", "value_range"),
                *("is_patch_data", "channel_def"),
            }

    @needs_schema
    def test_follows_the_schema(self, tmp_path, monkeypatch):
        jsonschema.validate(self.metadata, json.loads(SCHEMA.read_text()))
        # An existing file is used as it is: nothing is downloaded.
        monkeypatch.setattr("monai.apps.utils.urlretrieve", lambda *args, **kwargs: pytest.fail("tried to download"))
        verify_metadata(meta_file=str(METADATA), filepath=str(shutil.copy(SCHEMA, tmp_path)))

    def test_describes_the_default_task(self):
        """Of the configs, of models without a record, and of the metadata: the same."""
        train = parsed(TRAIN, bundle_root=str(TRAIN.parents[1]))
        output = self.metadata["network_data_format"]["outputs"]["pred"]
        record = ModelRecord.load_or_default("nowhere/model.pt", METADATA)
        task = SegmentationTask(**record.task)
        assert train.get_parsed_content("task").description() == task.description()
        assert list(output["channel_def"].values()) == ["background", *task.names]
        assert output["num_channels"] == task.out_channels == record.network["arguments"]["out_channels"]
        assert InputRecord(**train.get_parsed_content("description#input")) == record.input
        for tensor in (output, self.metadata["network_data_format"]["inputs"]["image"]):
            assert tensor["spatial_shape"] == record.input.patch_size


class TestNetworkDefinition:
    @pytest.mark.parametrize("config", [TRAIN, INFERENCE], ids=lambda path: path.name)
    def test_monai_accepts_it_with_the_metadata(self, config, tmp_path, caplog):
        """The default network; on a small patch, which is fast."""
        metadata = json.loads(METADATA.read_text())
        for tensor in (
            *metadata["network_data_format"]["inputs"].values(),
            metadata["network_data_format"]["outputs"]["pred"],
        ):
            tensor["spatial_shape"] = [16, 16, 8]
        (tmp_path / "metadata.json").write_text(json.dumps(metadata))
        with caplog.at_level(logging.INFO):
            verify_net_in_out(
                "network_def",
                meta_file=str(tmp_path / "metadata.json"),
                config_file=str(config),
                device="cpu",
                bundle_root=str(BUNDLE),
            )
        assert "verified with no error" in caplog.text

    @pytest.mark.slow
    def test_monai_accepts_it_with_the_patch_of_the_metadata(self, caplog):
        with caplog.at_level(logging.INFO):
            verify_net_in_out(
                "network_def",
                meta_file=str(METADATA),
                config_file=str(INFERENCE),
                device="cpu",
                bundle_root=str(BUNDLE),
            )
        assert "verified with no error" in caplog.text

    def test_train_and_inference_build_the_same(self):
        with torch.device("meta"):
            networks = [
                parsed(path, bundle_root=str(BUNDLE)).get_parsed_content("network_def") for path in (TRAIN, INFERENCE)
            ]
        shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in networks]
        assert shapes[0] == shapes[1]
        assert sum(p.numel() for p in networks[0].parameters()) == 48_536_270

    def test_is_exported_by_scripting(self, model_file, tmp_path):
        path = tmp_path / "model.ts"
        ckpt_export(
            "network_def",
            filepath=str(path),
            ckpt_file=str(model_file),
            meta_file=str(METADATA),
            config_file=str(INFERENCE),
            model_path=str(model_file),
        )
        network = parsed(INFERENCE, model_path=str(model_file)).get_parsed_content("network_def").eval()
        network.load_state_dict(torch.load(model_file, weights_only=True))
        x = torch.rand(1, 1, 20, 19, 9)
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.load(path).eval()(x), network(x))


class TestWorkflow:
    def test_monai_finds_the_properties_of_training(self, dataset_dir, tmp_path):
        workflow = ConfigWorkflow(
            [str(TRAIN), str(BUNDLE / "configs" / "small.yaml")],
            workflow_type="train",
            logging_file=False,
            **{
                "dataset_dir": str(dataset_dir),
                "output_dir": str(tmp_path / "out"),
                "encoder#widen_factor": 0.0625,
                "organs": {"liver": 1, "spleen": 2},
            },
        )
        workflow.initialize()
        assert workflow.check_properties() == []

    def test_monai_finds_the_properties_of_inference(self, dataset_dir, model_file, tmp_path):
        workflow = ConfigWorkflow(
            str(INFERENCE),
            workflow_type="infer",
            logging_file=False,
            dataset_dir=str(dataset_dir / "images"),
            output_dir=str(tmp_path / "out"),
            model_path=str(model_file),
        )
        workflow.initialize()
        assert workflow.check_properties() == []

    def test_keys_that_the_model_zoo_asks_for(self):
        assert set(json.loads(INFERENCE.read_text())) >= {
            *("bundle_root", "dataset_dir", "output_dir", "device", "network_def", "network", "preprocessing"),
            *("dataset", "dataloader", "inferer", "postprocessing", "handlers", "evaluator", "initialize", "run"),
        }
        train = json.loads(TRAIN.read_text())
        assert set(train) >= {
            *("bundle_root", "dataset_dir", "output_dir", "device", "network_def", "network", "val_interval"),
            *("initialize", "run", "training"),
        }
        assert set(train["train"]) >= {"trainer", "dataset", "inferer", "handlers", "preprocessing"}

    def test_nothing_of_a_custom_package_is_imported_at_initialization(self):
        """MONAI evaluates ``imports`` and ``initialize`` before a bundle's own folder can be imported from.

        The check of names is left out there, and comes with what is run.
        """
        for path in (BUNDLE / "configs").glob("*.json"):
            config = json.loads(path.read_text())
            steps = [step for step in config.get("initialize", []) if "_disabled_" not in step]
            assert "pgl_ext" not in json.dumps([config.get("imports"), steps]), path.name

    def test_images_are_prepared_as_in_training_everywhere(self):
        blocks = {
            "train.json": "case_preprocessing",
            "inference.json": "preprocessing",
            "evaluate.json": "preprocessing",
            "probe.yaml": "evaluation#preprocessing",
        }
        for name, place in blocks.items():
            block = parsed(BUNDLE / "configs" / name)[place]
            for entry in ("keys", "task", "labels_on_file_grid", "extra"):  # of label maps, and what is kept
                block.pop(entry, None)
            assert block == {
                "_target_": "pgl_ext.transforms.preprocessing",
                "spacing": "@spacing",
                "hu_window": "@hu_window",
                "channel_names": "@channel_names",
                "resample_channels": "@resample_channels",
            }


class TestHandlers:
    """What MONAI Label does to ``train#handlers``, and what it must find there."""

    handlers = json.loads(TRAIN.read_text())["train"]["handlers"]

    def test_are_a_literal_list_of_dicts_without_a_checkpoint_loader(self):
        assert all(isinstance(handler, dict) for handler in self.handlers)
        assert all("CheckpointLoader" not in handler["_target_"] for handler in self.handlers)

    def test_one_put_before_them_shifts_no_reference(self, dataset_dir, tmp_path):
        parser = parsed(
            TRAIN,
            dataset_dir=str(dataset_dir),
            output_dir=str(tmp_path / "out"),
            encoder=TINY_ENCODER,
            organs={"liver": 1, "spleen": 2},
            device="cpu",
            num_workers=0,
        )
        handlers = [{"_target_": "monai.handlers.StatsHandler"}, *self.handlers]
        parser.update({"train#handlers": handlers})
        built = parser.get_parsed_content("train#handlers")
        checkpoints = next(h for h in built if type(h).__name__ == "CheckpointHandler")
        best = [h for h in built if type(h).__name__ == "BestModel"]
        assert best == [checkpoints.objects["best_model"]]


@pytest.mark.parametrize("multi_label", [True, False])
def test_loss_follows_the_task(multi_label):
    parser = parsed(TRAIN, multi_label=multi_label, organs={"kidney": 1, "tumour": 2})
    loss = parser.get_parsed_content("train#loss_function")
    reference = DiceCrossEntropyLoss(multi_label, batch=True)
    logits = torch.randn(2, loss.task.out_channels, 4, 4, 4)
    label = torch.randint(0, 3, (2, 1, 4, 4, 4)).float()
    assert loss(logits, {"label": label}) == reference(logits, loss.task.targets(label))
    assert loss.task.multi_label == multi_label
