"""The segmentation network as MONAI's commands export it, against PyTorch."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import nibabel
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from made_weights import TRACED, model_record, small_network
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, onnx_export

from pgl_ext.networks import SegmentationNet
from pgl_ext.networks.build import NETWORKS
from pgl_ext.task import SegmentationTask
from pgl_ext.weights import InputRecord, ModelRecord, build_network, network_of, save_weights

CONFIGS = Path(__file__).parents[2] / "bundles" / "pgl_segmentation" / "configs"
INFERENCE = str(CONFIGS / "inference.json")
TENSORRT = str(CONFIGS / "inference_trt.json")
ONNX = str(CONFIGS / "onnx_export.yaml")

# (B, C, X, Y, Z). The stride is (16, 16, 8): most are not divided by it, some not even by two, some are one cell.
SIZES = [
    (1, 1, 48, 48, 24),
    (3, 1, 32, 64, 16),
    (2, 1, 33, 50, 21),
    (1, 1, 17, 40, 9),
    (1, 1, 63, 31, 40),
    (2, 1, 16, 16, 8),
    (1, 1, 7, 5, 3),
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """A tiny model, as fine-tuning writes it, with batch-norm statistics of its own."""
    torch.manual_seed(0)
    encoder = {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 0.0625}
    network = SegmentationNet(1, 3, encoder=encoder, aspp_channels=8, decoder_channels=(8, 6, 4))
    for key, value in network.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(std=0.1)
        elif key.endswith("running_var"):
            value.uniform_(1, 3)
    path = tmp_path_factory.mktemp("export") / "models" / "model.pt"
    record = model_record(
        network, SegmentationTask({"liver": [1], "spleen": [2]}), input=InputRecord(patch_size=[16, 16, 8])
    )
    save_weights(network.state_dict(), path, record)
    return path


@pytest.fixture(scope="module")
def network(model_file) -> SegmentationNet:
    return build_network(model_file)


@pytest.fixture(scope="module")
def onnx_file(model_file) -> Path:
    path = model_file.with_name("model.onnx")
    onnx_export(
        args_file=ONNX, config_file=INFERENCE, ckpt_file=str(model_file), model_path=str(model_file), filepath=str(path)
    )
    return path


@pytest.fixture(scope="module")
def torchscript_file(model_file) -> Path:
    path = model_file.with_name("model_trt.ts")
    ckpt_export(
        "network_def", filepath=str(path), ckpt_file=str(model_file), config_file=INFERENCE, model_path=str(model_file)
    )
    return path


def run_onnx(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["pred"], {"image": x.numpy()})[0])


def assert_same(output: torch.Tensor, network: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        expected = network(x)
    assert output.shape == expected.shape == (len(x), 3, *x.shape[2:])
    assert expected.std() > 0.01
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_onnx(onnx_file, network, size):
    x = torch.randn(size)
    assert_same(run_onnx(onnx_file, x), network, x)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_torchscript(torchscript_file, network, size):
    x = torch.randn(size)
    with torch.no_grad():
        assert_same(torch.jit.load(torchscript_file)(x), network, x)


def test_onnx_file_says_what_is_open(onnx_file):
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    for tensor, name, channels in ((model.graph.input[0], "image", 1), (model.graph.output[0], "pred", 3)):
        assert tensor.name == name
        dims = [dim.dim_param or dim.dim_value for dim in tensor.type.tensor_type.shape.dim]
        assert dims == ["batch", channels, "x", "y", "z"]
    assert len(model.graph.input) == len(model.graph.output) == 1


@pytest.mark.slow
def test_onnx_of_the_default_network(tmp_path):
    torch.manual_seed(0)
    record = ModelRecord.load_or_default(tmp_path / "model.pt", CONFIGS / "metadata.json")
    network = network_of(record).eval()
    path, out = tmp_path / "model.pt", tmp_path / "model.onnx"
    save_weights(network.state_dict(), path, record)
    onnx_export(args_file=ONNX, config_file=INFERENCE, ckpt_file=str(path), model_path=str(path), filepath=str(out))
    x = torch.randn(2, 1, 50, 33, 21)
    with torch.no_grad():
        expected = network(x)
    torch.testing.assert_close(run_onnx(out, x), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


class TestTensorRT:
    """With a TorchScript file in the engine's place, which is loaded the same way: there need not be a GPU here."""

    @pytest.fixture(autouse=True)
    def torch_tensorrt(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))

    @pytest.fixture
    def settings(self, model_file, torchscript_file) -> dict[str, str]:
        return {"model_path": str(model_file), "trt_path": str(torchscript_file), "device": "cpu"}

    def test_the_engine_takes_the_place_of_the_network(self, settings, network):
        parser = ConfigParser()
        parser.read_config([INFERENCE, TENSORRT])
        parser.update(settings)
        assert "torch_tensorrt" in json.dumps(parser.get("imports"))
        x = torch.randn(1, 1, 32, 32, 16)
        with torch.no_grad():
            assert_same(parser.get_parsed_content("network")(x), network, x)

    def test_by_default_it_lies_beside_the_model(self):
        parser = ConfigParser()
        parser.read_config([INFERENCE, TENSORRT])
        parser.update({"bundle_root": "bundle"})
        assert parser.get_parsed_content("trt_path") == "bundle/models/model_trt.ts"

    def test_scans_are_segmented_alike(self, settings, tmp_path):
        voxels = np.random.default_rng(0).normal(size=(30, 24, 20)).astype(np.float32)
        (tmp_path / "scans").mkdir()
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1, 1, 2, 1])), tmp_path / "scans" / "scan.nii")
        found = []
        for name, files in {"pytorch": [INFERENCE], "engine": [INFERENCE, TENSORRT]}.items():
            workflow = ConfigWorkflow(
                files,
                workflow_type="infer",
                logging_file=False,
                dataset_dir=str(tmp_path / "scans"),
                output_dir=str(tmp_path / name),
                overlays=False,
                **{k: v for k, v in settings.items() if name == "engine" or k != "trt_path"},
            )
            workflow.initialize()
            workflow.run()
            found.append(np.asanyarray(nibabel.load(tmp_path / name / "scan_seg.nii.gz").dataobj))
        assert np.unique(found[0]).size > 1
        assert np.mean(found[0] == found[1]) > 0.999


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("family", [family for family in NETWORKS if family != "resnet"])
def test_onnx_of_every_network(family, tmp_path):
    """Of any size but for the transformer, whose windows are of the example's size."""
    network, path = small_network(family).eval(), tmp_path / "model.pt"
    record = model_record(network, SegmentationTask({"liver": [1], "spleen": [2]}))
    save_weights(network.state_dict(), path, record)
    settings = {"args_file": ONNX, "config_file": INFERENCE, "input_shape": [1, 1, 64, 32, 32]}
    onnx_export(**settings, ckpt_file=str(path), model_path=str(path), filepath=str(path.with_suffix(".onnx")))
    for size in [(1, 1, 64, 32, 32), *([] if family == "swinunetr" else [(2, 1, 37, 18, 11)])]:
        x = torch.randn(size)
        assert_same(run_onnx(path.with_suffix(".onnx"), x), network, x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("family", TRACED)
def test_torchscript_of_networks_that_are_traced(family, tmp_path):
    network, path = small_network(family).eval(), tmp_path / "model.pt"
    save_weights(network.state_dict(), path, model_record(network, SegmentationTask({"liver": [1], "spleen": [2]})))
    settings = {"ckpt_file": str(path), "config_file": INFERENCE, "model_path": str(path)}
    with pytest.raises(ValueError, match="--use_trace True --input_shape"):
        ckpt_export("network_def", filepath=str(tmp_path / "scripted.ts"), **settings)
    shape = [1, 1, 64, 32, 32]
    ckpt_export("network_def", filepath=str(tmp_path / "model.ts"), use_trace=True, input_shape=shape, **settings)
    x = torch.randn(shape)
    with torch.no_grad():
        assert_same(torch.jit.load(tmp_path / "model.ts")(x), network, x)
