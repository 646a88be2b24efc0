"""What a package consists of; tests/test_packaged_bundles.py runs it."""

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
from importlib.util import resolve_name
from pathlib import Path

import pytest
import torch
import yaml

import pgl_ext.__main__
from pgl_ext import packaging
from pgl_ext.tools.packaging import package_bundles, rewrite_config, rewrite_module, rewrite_text

ROOT = Path(__file__).parents[1]
BUNDLES = [ROOT / "bundles" / name for name in ("pgl_pretrain", "pgl_segmentation")]
SOURCES = sorted(path.relative_to(ROOT / "pgl_ext") for path in (ROOT / "pgl_ext").rglob("*.py"))


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
    return {names[name][0].lower().replace("_", "-") for name in modules - sys.stdlib_module_names}


class TestModules:
    @pytest.mark.parametrize(
        ("path", "source", "expected"),
        [
            ("a.py", "from pgl_ext.losses import X\n", "from .losses import X\n"),
            ("data/a.py", "from pgl_ext.data.cache import X\n", "from ..data.cache import X\n"),
            ("data/__init__.py", "from pgl_ext.settings import x\n", "from ..flags import x\n"),
            ("a.py", "from pgl_ext import __version__\n", "from . import __version__\n"),
            ("data/a.py", "import pgl_ext\n", "from ... import pgl_ext\n"),
            ("a.py", "def f():\n    from pgl_ext.b import (\n        c,\n    )\n", None),
            ("a.py", "import pgl_extra\nfrom pgl_extra.a import b\nfrom .c import d\n", "same"),
            ("a.py", '"""\nfrom pgl_ext.b import c\n"""\n', '"""\nfrom scripts.pgl_ext.b import c\n"""\n'),
        ],
    )
    def test_imports(self, path, source, expected):
        expected = {None: "def f():\n    from .b import (\n        c,\n    )\n", "same": source}.get(expected, expected)
        assert rewrite_module(source, path) == expected

    @pytest.mark.parametrize("line", ["import pgl_ext.losses", "import pgl_ext as p", "import os, pgl_ext"])
    def test_imports_without_a_relative_form(self, line):
        with pytest.raises(ValueError, match=r"data/a\.py, line 2: .*import with 'from'"):
            rewrite_module(f"\n{line}\n", "data/a.py")

    @pytest.mark.parametrize("path", SOURCES, ids=str)
    def test_the_same_modules_are_imported(self, path):
        """As Python resolves the imports, before and after."""

        def imported(source: str, package: str) -> list[str]:
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
            names = [resolve_name("." * node.level + (node.module or ""), package) for node in nodes]
            names += [a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names]
            return sorted(name for name in names if "pgl_ext" in name or name == "scripts")

        source = (ROOT / "pgl_ext" / path).read_text()
        package = ".".join(("pgl_ext", *path.parent.parts))
        before = imported(source, package)
        after = imported(rewrite_module(source, path), f"scripts.{package}")
        # `import pgl_ext` has become `from scripts import pgl_ext`.
        assert after == sorted("scripts" if f"import {name}\n" in source else f"scripts.{name}" for name in before)

    def test_all_of_the_package_is_imported_at_once(self):
        """MONAI Label takes a bundle off the path when a call ends; only commands start with what they need."""
        for path in SOURCES:
            tree = ast.parse((ROOT / "pgl_ext" / path).read_text())
            inside = {id(node) for top in tree.body if not isinstance(top, ast.ImportFrom) for node in ast.walk(top)}
            late = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and id(n) in inside and n.module]
            assert path.name == "__main__.py" or not any(node.module.startswith("pgl_ext") for node in late), path


class TestTexts:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("_target_: pgl_ext.methods.PGL", "_target_: scripts.pgl_ext.methods.PGL"),
            ("_target_: scripts.pgl_ext.methods.PGL", "_target_: scripts.pgl_ext.methods.PGL"),
            ("run 'python -m pgl_ext compare'", "run 'python -m scripts.pgl_ext compare'"),
            ("pgl_ext.a, pgl_ext.b.C", "scripts.pgl_ext.a, scripts.pgl_ext.b.C"),
            ("the package `pgl_ext`, pgl_ext.", "the package `pgl_ext`, pgl_ext."),
            ("pgl_ext/methods/, my_pgl_ext.a", "pgl_ext/methods/, my_pgl_ext.a"),
        ],
    )
    def test_names(self, text, expected):
        assert rewrite_text(text) == expected
        assert rewrite_text(expected) == expected

    def test_configs_find_their_scripts_first(self):
        config = {"imports": ["$import os"], "initialize": ["$do()"], "loss": {"_target_": "pgl_ext.losses.X", "ä": 1}}
        text = rewrite_config(json.dumps(config))
        rewritten = json.loads(text)
        assert rewritten["imports"] == ["$import os", "$import sys"]
        assert "sys.path" in rewritten["initialize"][0]
        assert rewritten["initialize"][-1] == "$do()"
        assert rewritten["loss"] == {"_target_": "scripts.pgl_ext.losses.X", "ä": 1}
        assert text == json.dumps(rewritten, indent=4, ensure_ascii=False) + "\n"
        assert rewrite_config(text) == text

    def test_what_initialises_nothing_stays(self):
        assert json.loads(rewrite_config('{"lr": 1}')) == {"lr": 1}


class TestContents:
    def test_files(self, bundle):
        for name in (
            "LICENSE",
            "docs/README.md",
            "docs/data_license.txt",
            "configs/logging.conf",
            "scripts/__init__.py",
        ):
            assert (bundle / name).is_file()
        copied = {
            path.relative_to(bundle / "scripts" / "pgl_ext") for path in (bundle / "scripts" / "pgl_ext").rglob("*.py")
        }
        assert copied == set(SOURCES)
        original = {path.relative_to(ROOT / "bundles") for path in (ROOT / "bundles" / bundle.name).rglob("*.yaml")}
        assert {path.relative_to(bundle.parent) for path in bundle.rglob("*.yaml")} == original
        assert (bundle.parents[1] / "ci" / "unit_tests" / f"test_{bundle.name}.py").is_file()
        assert not (bundle / "models").exists()

    def test_nothing_needs_the_installed_package(self, bundle):
        for path, text in texts(bundle / "configs", ".json", ".yaml").items():
            assert not re.search(r"(?<!scripts\.)pgl_ext\.", text), path
        for path, text in texts(bundle / "scripts", ".py").items():
            for node in ast.walk(ast.parse(text)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not any(name.startswith("pgl_ext") for name in names), path

    def test_json_is_indented_by_four(self, bundle):
        for text in texts(bundle, ".json").values():
            assert text == json.dumps(json.loads(text), indent=4, ensure_ascii=False) + "\n"

    def test_commands_can_be_run_from_the_bundles_folder(self, bundle):
        files = texts(bundle / "configs", ".yaml", ".md") | texts(bundle / "docs", ".md")
        for path, text in files.items():
            for option in re.findall(r"--config_file \"?\[?([^\]\s\"]+)", text):
                for name in option.replace("'", "").split(","):
                    assert (bundle / name).is_file() or name == "simsiam.yaml", f"{path}: {name}"
            assert "python -m pgl_ext" not in text
            for command in re.findall(r"python -m scripts\.pgl_ext (\w+)", text):
                assert callable(getattr(pgl_ext.__main__, command))

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
        trees = [ast.parse(text) for text in texts(bundle / "scripts", ".py").values()]
        at_once = imported_distributions(node for tree in trees for node in tree.body)
        ever = imported_distributions(node for tree in trees for node in ast.walk(tree))
        # Of the configs, of the command line of MONAI, and of torch.utils.tensorboard.
        at_once |= {"pytorch-optimizer", "fire", "tensorboard"}
        assert at_once <= listed.keys() <= at_once | ever


class TestHashes:
    def test_of_each_file_and_of_all(self, bundle):
        title, whole, *lines = (bundle / "SHA256SUMS").read_text().splitlines(keepends=True)
        assert title == f"# {bundle.name} {pgl_ext.__version__}\n"
        assert hashlib.sha256("".join(lines).encode()).hexdigest() in whole
        listed = dict(reversed(line.rstrip("\n").split("  ")) for line in lines)
        files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
        assert listed.keys() == files.keys() - {"SHA256SUMS"}
        for name, digest in listed.items():
            assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest

    def test_zip_holds_the_folder(self, bundle):
        with zipfile.ZipFile(bundle.parents[1] / f"{bundle.name}_v{pgl_ext.__version__}.zip") as archive:
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
        with pytest.raises(ValueError, match=rf"metadata\.json has version .*set version to {pgl_ext.__version__}"):
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
    def files(self, tmp_path, make_encoder) -> dict[str, Path]:
        """An encoder, a model and a text; they need not be weights to be packed."""
        layout = make_encoder().architecture
        descriptions = {
            "encoder": {"architecture": layout, "stride": [16, 16, 8], "channels": [8, 16, 32, 64]},
            "model": {
                "task": {"organs": {"liver": [1], "spleen": [2]}, "background_values": [0], "multi_label": False},
                "network": {"in_channels": 1, "encoder": layout, "aspp_channels": 16, "decoder_channels": [16, 8, 8]},
                "normalization": {"clip_hu": [-100, 300]},
                "spacing": [2, 2, 3],
                "patch_size": [32, 32, 16],
            },
        }
        paths = {name: tmp_path / f"{name}.pt" for name in descriptions}
        for name, path in paths.items():
            torch.save({"a": torch.arange(3.0)}, path)
            path.with_suffix(".json").write_text(json.dumps(descriptions[name]))
        license_file = tmp_path / "license.txt"
        license_file.write_text("phantoms, CC0")
        return {**paths, "data_license": license_file}

    def test_come_with_their_description(self, files, tmp_path):
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
                text = (models / name / "models" / f"{stem}.json").read_text()
                assert json.loads(text) == json.loads(files[source].with_suffix(".json").read_text())
            assert (models / name / "docs" / "data_license.txt").read_text() == "phantoms, CC0"
        formats = {
            name: json.loads((models / name / "configs" / "metadata.json").read_text())["network_data_format"]
            for name in expected
        }
        pred = formats["pgl_segmentation"]["outputs"]["pred"]
        assert pred["channel_def"] == {"0": "background", "1": "liver", "2": "spleen"}
        assert (pred["num_channels"], pred["spatial_shape"]) == (3, [32, 32, 16])
        assert formats["pgl_segmentation"]["inputs"]["image"]["spatial_shape"] == [32, 32, 16]
        assert formats["pgl_pretrain"]["outputs"]["pred"]["num_channels"] == 64

    def test_training_is_that_of_the_model(self, files, tmp_path):
        """Whoever trains the package as it is, without an overlay, goes on where the model is."""
        package_bundles([], tmp_path / "out", **files)
        text = (tmp_path / "out" / "models" / "pgl_segmentation" / "configs" / "train.json").read_text()
        config, recorded = json.loads(text), json.loads(files["model"].with_suffix(".json").read_text())
        assert config["organs"] == {"liver": [1], "spleen": [2]}
        assert (config["hu_window"], config["spacing"], config["patch_size"]) == ([-100, 300], [2, 2, 3], [32, 32, 16])
        assert config["encoder"] == recorded["network"]["encoder"]
        assert config["network_def"]["decoder_channels"] == [16, 8, 8]
        assert config["network_def"]["_target_"] == "scripts.pgl_ext.networks.SegmentationNet"
        assert "sys.path" in config["initialize"][0]

    def test_folders_of_the_machine_are_left_out(self, files, tmp_path):
        path = files["model"].with_suffix(".json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pretrained_encoder": "/home/someone/encoder.pt"}))
        package_bundles([], tmp_path / "out", **files)
        text = (tmp_path / "out" / "models" / "pgl_segmentation" / "models" / "model.json").read_text()
        assert json.loads(text)["pretrained_encoder"] == "encoder.pt"

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


class TestOverlays:
    """A package for a task that nothing has been trained for yet; tests/test_task_config.py has the details."""

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
