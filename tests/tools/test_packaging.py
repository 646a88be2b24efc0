"""What a package consists of; test_packaged_bundles.py runs it."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
import typer
import yaml
from made_weights import TRACED, encoder_record, model_record, small_network
from monai.bundle import ConfigParser
from monai.networks.utils import copy_model_state
from programs import ROOT

from pgl_ext import __version__
from pgl_ext.networks import ResNetEncoder
from pgl_ext.networks.build import NETWORKS
from pgl_ext.task import SegmentationTask
from pgl_ext.tools import cli, packaging
from pgl_ext.tools.packaging import package_bundles
from pgl_ext.weights import EncoderRecord, InputRecord, ModelRecord, save_encoder, save_weights

BUNDLES = [ROOT / "bundles" / name for name in ("pgl_pretrain", "pgl_segmentation")]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    package_bundles(BUNDLES, out)
    return out


@pytest.fixture(params=[bundle.name for bundle in BUNDLES])
def bundle(request, dist) -> Path:
    return dist / "models" / request.param


def texts(folder: Path, *suffixes: str) -> dict[Path, str]:
    return {path: path.read_text() for path in sorted(folder.rglob("*")) if path.suffix in suffixes}


def imported_distributions(nodes: Iterable[ast.AST]) -> set[str]:
    """What has to be installed for the import statements among the nodes, but for Python itself."""
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    # Several distributions of ITK are one package.
    names = packages_distributions() | {"itk": ["itk"]}
    return {names[name][0].lower().replace("_", "-") for name in modules - sys.stdlib_module_names - {"pgl_ext"}}


class TestContents:
    def test_files(self, bundle):
        for name in ("LICENSE", "docs/README.md", "docs/data_license.txt", "configs/logging.conf"):
            assert (bundle / name).read_bytes() == (ROOT / "bundles" / bundle.name / name).read_bytes()
        original = {path.relative_to(ROOT / "bundles") for path in (ROOT / "bundles" / bundle.name).rglob("*.yaml")}
        assert {path.relative_to(bundle.parent) for path in bundle.rglob("*.yaml")} == original
        assert (bundle.parents[1] / "ci" / "unit_tests" / f"test_{bundle.name}.py").is_file()
        assert not (bundle / "models").exists()

    def test_the_package_is_there_as_it_is_but_for_its_tools(self, bundle):
        copies = {path.relative_to(bundle) for path in (bundle / "pgl_ext").rglob("*") if path.is_file()}
        sources = {path.relative_to(ROOT) for path in (ROOT / "pgl_ext").rglob("*.py")} | {Path("pgl_ext/py.typed")}
        assert copies == {path for path in sources if path.parts[1] != "tools"}
        for path in copies:
            assert (bundle / path).read_bytes() == (ROOT / path).read_bytes()

    def test_nothing_but_the_command_line_imports_the_tools(self, bundle):
        for path, text in texts(bundle / "pgl_ext", ".py").items():
            assert "pgl_ext.tools" not in text or path.name == "__main__.py", path

    def test_configs_say_what_those_of_the_repository_say(self, bundle):
        for path, text in texts(bundle / "configs", ".json").items():
            assert json.loads(text) == json.loads((ROOT / "bundles" / path.relative_to(bundle.parent)).read_text())

    def test_json_is_indented_by_four(self, bundle):
        for text in texts(bundle, ".json").values():
            assert text == json.dumps(json.loads(text), indent=4, ensure_ascii=False) + "\n"

    def test_commands_can_be_run_from_the_bundles_folder(self, bundle):
        files = texts(bundle / "configs", ".yaml", ".md") | texts(bundle / "docs", ".md")
        for path, text in files.items():
            for option in re.findall(r"--config_file \"?\[?([^\]\s\"]+)", text):
                for name in option.replace("'", "").split(","):
                    assert (bundle / name).is_file() or name == "simsiam.yaml", f"{path}: {name}"
            for command in re.findall(r"pgl (\w+)", text):
                assert command in typer.main.get_command(cli.app).commands

    def test_no_personal_paths(self, bundle):
        for path, text in texts(bundle, ".py", ".json", ".yaml", ".md", ".txt", ".conf", ".html").items():
            assert not re.search(r"(?<![\w.])/(home|root|Users|work|tmp|mnt)/", text), path

    def test_required_packages_are_complete(self, bundle):
        """What modules import as they are imported, and nothing that none ever does, in the versions of the tests."""
        lines = (ROOT / "requirements.txt").read_text().splitlines()
        pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
        metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
        listed = metadata["required_packages_version"] | {
            name: metadata[f"{key}_version"]
            for name, key in (("torch", "pytorch"), ("monai", "monai"), ("numpy", "numpy"))
        }
        assert listed == {name: pins[name] for name in listed}
        trees = [ast.parse(text) for text in texts(bundle / "pgl_ext", ".py").values()]
        at_once = imported_distributions(node for tree in trees for node in tree.body)
        ever = imported_distributions(node for tree in trees for node in ast.walk(tree))
        # Of the configs, which are YAML in part, of the command line of MONAI, and of torch.utils.tensorboard.
        at_once |= {"pytorch-optimizer", "pyyaml", "fire", "tensorboard"}
        # scikit-image is MONAI's for the largest components.
        assert at_once <= listed.keys() <= at_once | ever | {"scikit-image"}


class TestHashes:
    def test_of_each_file_and_of_all(self, bundle):
        title, whole, *lines = (bundle / "SHA256SUMS").read_text().splitlines(keepends=True)
        assert title == f"# {bundle.name} {__version__}\n"
        assert hashlib.sha256("".join(lines).encode()).hexdigest() in whole
        listed = dict(reversed(line.rstrip("\n").split("  ")) for line in lines)
        files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
        assert listed.keys() == files.keys() - {"SHA256SUMS"}
        for name, digest in listed.items():
            assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest

    def test_zip_holds_the_folder(self, bundle):
        with zipfile.ZipFile(bundle.parents[1] / f"{bundle.name}_v{__version__}.zip") as archive:
            files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
            assert len({(entry.date_time, entry.external_attr) for entry in archive.infolist()}) == 1
        folder = {p.relative_to(bundle.parent).as_posix(): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
        assert files == folder

    def test_same_input_same_bytes(self, bundle, tmp_path):
        """From another place, with other times and permissions, and with what runs leave behind."""
        copy = tmp_path / "elsewhere" / bundle.name
        shutil.copytree(ROOT / "bundles" / bundle.name, copy, copy_function=shutil.copyfile)
        for name in ("configs/__pycache__/a.pyc", "configs/.a.json.swp", "output/metrics.csv", "models/model.pt"):
            (copy / name).parent.mkdir(exist_ok=True)
            (copy / name).write_text("x")
        (copy / "LICENSE").chmod(0o755)
        (archive,) = package_bundles([copy], tmp_path / "out")
        assert archive.read_bytes() == (bundle.parents[1] / archive.name).read_bytes()

    def test_a_package_of_a_package_is_the_same(self, bundle, tmp_path):
        package_bundles([bundle], tmp_path)
        assert (tmp_path / "models" / bundle.name / "SHA256SUMS").read_text() == (bundle / "SHA256SUMS").read_text()


class TestRefused:
    @pytest.fixture
    def copy(self, tmp_path) -> Path:
        return shutil.copytree(BUNDLES[0], tmp_path / "pgl_pretrain")

    @pytest.mark.parametrize(
        "changes", [{"version": "9.9.9"}, {"changelog": {"0.0.1": "first"}}, {"changelog": {}}], ids=str
    )
    def test_versions_that_do_not_agree(self, copy, tmp_path, changes):
        path = copy / "configs" / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        with pytest.raises(ValueError, match=rf"metadata\.json has version .*set version to {__version__}"):
            package_bundles([copy], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_what_is_no_bundle(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a bundle"):
            package_bundles([tmp_path], tmp_path / "out")

    def test_something_else_in_its_place(self, tmp_path):
        (tmp_path / "models" / "pgl_pretrain").mkdir(parents=True)
        with pytest.raises(FileExistsError, match="choose another --out"):
            package_bundles(BUNDLES[:1], tmp_path)

    def test_an_old_package_is_replaced(self, tmp_path):
        old = tmp_path / "models" / "pgl_pretrain"
        old.mkdir(parents=True)
        for name in ("SHA256SUMS", "stale.txt"):
            (old / name).touch()
        package_bundles(BUNDLES[:1], tmp_path)
        assert not (old / "stale.txt").exists()


class TestWeights:
    @pytest.fixture
    def files(self, tmp_path) -> dict[str, Path]:
        """An encoder, a model and a text; they need not be weights to be packed."""
        encoder = ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.125, in_channels=2)
        network = {"in_channels": 2, "encoder": encoder.arguments, "aspp_channels": 16, "decoder_channels": [16, 8, 8]}
        records = {
            "encoder": EncoderRecord(
                architecture=encoder.architecture,
                stride=encoder.stride,
                channels=encoder.channels,
                input=InputRecord(hu_window=[-100, 300], channel_names=["CT", "PET"]),
            ),
            "model": ModelRecord(
                task={"organs": {"liver": [1], "spleen": [2]}, "background_values": [0], "multi_label": False},
                network={"family": "resnet", "arguments": network},
                input=InputRecord([-100, 300], [2, 2, 3], [32, 32, 16], channel_names=["CT", "PET"]),
                pretrained_encoder="/home/someone/encoder.pt",
                data={"lists": ["/home/someone/list.json", "C:\\Users\\someone\\other.json"], "training_cases": 3},
            ),
        }
        paths = {name: tmp_path / f"{name}.pt" for name in records}
        for name, path in paths.items():
            save_weights({"a": torch.arange(3.0)}, path, records[name])
        license_file = tmp_path / "license.txt"
        license_file.write_text("phantoms, CC0")
        return {**paths, "data_license": license_file}

    def test_come_with_their_record(self, files, tmp_path):
        package_bundles([], tmp_path / "out", **files)
        models = tmp_path / "out" / "models"
        expected = {
            "pgl_pretrain": {"model": "encoder", "pgl_encoder": "encoder"},
            "pgl_segmentation": {"model": "model", "pgl_encoder": "encoder"},
        }
        for name, weights in expected.items():
            found = {path.stem for path in (models / name / "models").iterdir()}
            assert found == weights.keys()
            for stem, source in weights.items():
                assert (models / name / "models" / f"{stem}.pt").read_bytes() == files[source].read_bytes()
                found, recorded = (
                    json.loads(path.with_suffix(".json").read_text())
                    for path in (models / name / "models" / f"{stem}.pt", files[source])
                )
                # Folders of the machine are left out.
                data = {"lists": ["list.json", "other.json"], "training_cases": 3}
                public = {"pretrained_encoder": "encoder.pt", "data": data}
                assert found == (recorded | public if source == "model" else recorded)
                assert "someone" not in (models / name / "models" / f"{stem}.json").read_text()
            assert (models / name / "docs" / "data_license.txt").read_text() == "phantoms, CC0"
        formats = {
            name: json.loads((models / name / "configs" / "metadata.json").read_text())["network_data_format"]
            for name in expected
        }
        pred = formats["pgl_segmentation"]["outputs"]["pred"]
        assert pred["channel_def"] == {"0": "background", "1": "liver", "2": "spleen"}
        assert (pred["num_channels"], pred["spatial_shape"]) == (3, [32, 32, 16])
        image = formats["pgl_segmentation"]["inputs"]["image"]
        assert (image["spatial_shape"], image["num_channels"]) == ([32, 32, 16], 2)
        assert image["channel_def"] == {"0": "CT", "1": "PET"}
        assert formats["pgl_pretrain"]["outputs"]["pred"]["num_channels"] == 64

    def test_training_is_that_of_the_model(self, files, tmp_path):
        """Whoever trains the package as it is, without an overlay, goes on where the model is."""
        package_bundles([], tmp_path / "out", **files)
        text = (tmp_path / "out" / "models" / "pgl_segmentation" / "configs" / "train.json").read_text()
        config, record = json.loads(text), ModelRecord.load(files["model"])
        assert config["organs"] == {"liver": [1], "spleen": [2]}
        assert (config["hu_window"], config["spacing"], config["patch_size"]) == ([-100, 300], [2, 2, 3], [32, 32, 16])
        # The network gives its encoder the channels.
        assert config["channel_names"] == record.input.channel_names == ["CT", "PET"]
        assert {**config["encoder"], "in_channels": 2} == record.network["arguments"]["encoder"]
        assert config["network_def"]["decoder_channels"] == [16, 8, 8]

    def test_large_ones_are_listed(self, files, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(packaging, "_LARGE", 100)
        arguments = {"encoder": files["encoder"], "data_license": files["data_license"]}
        package_bundles(BUNDLES[:1], tmp_path / "out", **arguments)
        assert "--encoder_url" in caplog.text
        assert (tmp_path / "out" / "models" / "pgl_pretrain" / "models" / "pgl_encoder.pt").is_file()
        package_bundles(BUNDLES[:1], tmp_path / "out", encoder_url="https://example.org/e.pt", **arguments)
        folder = tmp_path / "out" / "models" / "pgl_pretrain"
        digest = hashlib.sha256(files["encoder"].read_bytes()).hexdigest()
        entry = {"url": "https://example.org/e.pt", "hash_val": digest, "hash_type": "sha256"}
        paths = ["models/pgl_encoder.pt", "models/model.pt"]
        listed = yaml.safe_load((folder / "large_files.yml").read_text())
        assert listed == {"large_files": [{"path": path, **entry} for path in paths]}
        assert {path.name for path in (folder / "models").iterdir()} == {"pgl_encoder.json", "model.json"}

    def test_need_a_licence_and_the_bundle_that_they_belong_to(self, files, tmp_path):
        with pytest.raises(ValueError, match="--data_license"):
            package_bundles([], tmp_path / "out", encoder=files["encoder"])
        with pytest.raises(ValueError, match="belongs to pgl_segmentation"):
            package_bundles(BUNDLES[:1], tmp_path / "out", model=files["model"])
        with pytest.raises(FileNotFoundError, match=r"absent\.pt does not exist"):
            package_bundles([], tmp_path / "out", **{**files, "model": tmp_path / "absent.pt"})


@pytest.mark.parametrize("family", NETWORKS)
class TestFamilies:
    """Packages build the network of the record, with its weights."""

    @pytest.fixture
    def network(self, family):
        return small_network(family).eval()

    @pytest.fixture
    def models(self, network, tmp_path) -> Path:
        encoder = network.feature_network
        save_encoder(encoder, tmp_path / "encoder.pt", encoder_record(encoder))
        record = model_record(network, SegmentationTask({"liver": [1], "spleen": [2]}))
        save_weights(network.state_dict(), tmp_path / "model.pt", record)
        (tmp_path / "license.txt").write_text("none")
        weights = {name: tmp_path / f"{name}.pt" for name in ("model", "encoder")}
        package_bundles([], tmp_path / "dist", data_license=tmp_path / "license.txt", **weights)
        return tmp_path / "dist" / "models"

    @staticmethod
    def built(bundle: Path, config: str, name: str = "network", **settings) -> torch.nn.Module:
        parser = ConfigParser()
        parser.read_config(str(bundle / "configs" / config))
        parser.update({"bundle_root": str(bundle), "device": "cpu", **settings})
        return parser.get_parsed_content(name).eval()

    def test_of_segmentation(self, network, models):
        bundle = models / "pgl_segmentation"
        volumes = torch.rand(1, 1, 40, 28, 20)
        weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
        with torch.no_grad():
            expected = network(volumes)
            for config in ("inference.json", "evaluate.json"):
                assert torch.equal(self.built(bundle, config)(volumes), expected)
            trained = self.built(bundle, "train.json", "network_def")
            trained.load_state_dict(weights)
            assert torch.equal(trained(volumes), expected)

    def test_of_pretraining(self, network, models):
        """Also where MONAI loads the file by the names of tensors, and says nothing of those that it does not find."""
        bundle = models / "pgl_pretrain"
        metadata = json.loads((bundle / "configs" / "metadata.json").read_text())["network_data_format"]
        volumes = torch.rand(1, 1, 64, 32, 32)
        by_name = self.built(bundle, "inference.json", "network_def")
        copy_model_state(by_name, torch.load(bundle / "models" / "model.pt", weights_only=True))
        with torch.no_grad():
            expected = network.features(volumes)[-1]
            for built in (self.built(bundle, "inference.json"), by_name):
                torch.testing.assert_close(built(volumes), expected)
            if network.family not in TRACED:
                torch.testing.assert_close(torch.jit.script(by_name)(volumes), expected)
        assert metadata["outputs"]["pred"]["num_channels"] == expected.shape[1]
        strides = [int(size.removesuffix("*n")) for size in metadata["inputs"]["image"]["spatial_shape"]]
        assert [n // s for n, s in zip(volumes.shape[2:], strides, strict=True)] == list(expected.shape[2:])

    def test_probes(self, network, models):
        """The network whose features the overlay for probing takes."""
        text = (models / "pgl_segmentation" / "configs" / "probe.yaml").read_text()
        (expression,) = re.findall(r'encoder: "\$@network\.(\w+)"', text)
        assert getattr(network, expression) is network.feature_network


class TestOverlays:
    """A package for a task that nothing has been trained for yet; test_task_config.py has the details."""

    OVERLAYS = ("tasks/openkbp.yaml", "small.yaml")

    def test_are_part_of_it(self, tmp_path, caplog):
        package_bundles(BUNDLES[1:], tmp_path, overlays=self.OVERLAYS)
        folder = tmp_path / "models" / "pgl_segmentation"
        config = json.loads((folder / "configs" / "train.json").read_text())
        assert (config["organs"]["Mandible"], config["spacing"], config["max_epochs"]) == (7, [4, 4, 3], 20)
        pred = json.loads((folder / "configs" / "metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
        assert list(pred["channel_def"].values()) == ["background", *config["organs"]]
        assert (pred["num_channels"], pred["spatial_shape"]) == (6, [48, 48, 32])
        assert json.loads((folder / "models" / "model.json").read_text())["steps"] == 0
        # The mandible's 7 would be the fifth organ's name nowhere.
        assert "number them 1, 2, 3" in caplog.text

    def test_same_input_same_bytes(self, tmp_path):
        for out in ("a", "b"):
            package_bundles(BUNDLES[1:], tmp_path / out, overlays=["tasks/phantom.yaml", "small.yaml"])
        sums = [(tmp_path / out / "models" / "pgl_segmentation" / "SHA256SUMS").read_text() for out in ("a", "b")]
        assert sums[0] == sums[1]
        assert "models/model.pt" in sums[0]

    def test_belong_to_segmentation(self, tmp_path):
        with pytest.raises(ValueError, match=r"--overlays a\.yaml belongs to pgl_segmentation"):
            package_bundles(BUNDLES[:1], tmp_path, overlays=["a.yaml"])
