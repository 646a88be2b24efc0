"""What holds for the files of both bundles."""

from __future__ import annotations

import json

import pytest
from programs import CONFIGS, ROOT, SEGMENTATION_CONFIGS

BUNDLES = (CONFIGS.parent, SEGMENTATION_CONFIGS.parent)
CONFIG_FILES = sorted(path for bundle in BUNDLES for path in (bundle / "configs").glob("*.json"))

either_bundle = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)


@either_bundle
def test_required_files(bundle):
    names = ("metadata.json", "train.json", "multi_gpu_train.json", "inference.json", "logging.conf")
    for name in ("LICENSE", "docs/README.md", "docs/data_license.txt", *(f"configs/{name}" for name in names)):
        assert (bundle / name).stat().st_size > 0, name


@either_bundle
def test_licence_is_the_same_everywhere(bundle):
    assert (bundle / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: str(path.relative_to(ROOT / "bundles")))
def test_a_package_beside_the_configs_is_found_before_it_is_needed(path):
    """By every workflow, and by checks and exports, which build the network of ``inference.json`` without one."""
    config, find = json.loads(path.read_text()), "$sys.path.insert(1, @bundle_root)"
    if "initialize" in config:
        assert config["initialize"][0] == find
        assert "$import sys" in config["imports"]
    if path.name == "inference.json":
        assert list(config["network_def"])[:2] == ["_target_", "_requires_"]
        assert config["network_def"]["_requires_"] == find
