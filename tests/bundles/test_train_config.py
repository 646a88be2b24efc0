"""What keeps the configs readable: their length, names that are documented, and no references by place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from programs import CONFIGS, ROOT, SEGMENTATION_CONFIGS

# What MONAI and the Model Zoo look for by these names.
OF_MONAI = {
    *("imports", "bundle_root", "dataset_dir", "output_dir", "device", "network_def", "network", "val_interval"),
    *("train", "validate", "initialize", "run", "training", "optimizer", "lr_scheduler", "amp"),
}
# What the settings make up, which nobody sets from outside.
WIRING = {
    *("task", "volume_preprocessing", "case_preprocessing", "cache", "volumes", "cases", "prepared_network"),
    *("steps_per_epoch", "total_steps", "description", "in_monai_label"),
}
CONFIG_FILES = sorted(
    path
    for folder in ("bundles", "studies")
    for ending in ("json", "yaml")
    for path in ROOT.glob(f"{folder}/**/*.{ending}")
)

either = pytest.mark.parametrize("configs", [CONFIGS, SEGMENTATION_CONFIGS], ids=lambda path: path.parent.name)


def documented(configs: Path) -> set[str]:
    """Names in the tables of a bundle's README, as ``--name`` or ``name``, those of parts by what they are part of."""
    lines = (configs.parent / "docs" / "README.md").read_text(encoding="utf-8").splitlines()
    code = re.findall(r"`([^`]+)`", "\n".join(line for line in lines if line.startswith("|")))
    names = [match[1] for text in code if (match := re.match(r"(?:--)?([\w#]+)(?: |$)", text))]
    return {name.split("#")[0] for name in names}


@either
def test_length(configs):
    assert len((configs / "train.json").read_text().splitlines()) <= 300


@either
def test_every_setting_is_documented(configs):
    assert len(WIRING) <= 12
    settings = {name for name in json.loads((configs / "train.json").read_text()) if not name.startswith("_desc_")}
    assert settings - OF_MONAI - WIRING - documented(configs) == set()


def test_what_is_wiring_is_there():
    names = {
        name for configs in (CONFIGS, SEGMENTATION_CONFIGS) for name in json.loads((configs / "train.json").read_text())
    }
    assert names >= WIRING


def by_place(text: str) -> list[str]:
    """References to entries of lists by their number."""
    return re.findall(r"[@%][\w#]*#\d+|#handlers#\d+", text)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_reference_is_by_place(path):
    assert by_place(path.read_text(encoding="utf-8")) == []


def test_a_reference_by_place_is_found():
    text = '{"a": "@train#handlers#0", "b": "$@x#1.y", "train#handlers#2#_disabled_": true, "c": "%d#3", "e": "@f#g2"}'
    assert by_place(text) == ["@train#handlers#0", "@x#1", "#handlers#2", "%d#3"]


def test_how_scans_are_prepared_is_said_in_few_lines():
    """In the top-level entries of the JSON configs that say so."""
    texts = [path.read_text(encoding="utf-8") for path in CONFIG_FILES if path.suffix == ".json"]
    entry = re.compile(r'^ {4}"\w*preprocessing": \{$.*?^ {4}\},?$', flags=re.M | re.S)
    blocks = [block for text in texts for block in entry.findall(text)]
    assert len(blocks) == sum(text.count('"pgl_ext.transforms.preprocessing"') for text in texts) == 5
    assert sum(len(block.splitlines()) for block in blocks) <= 45


@either
@pytest.mark.parametrize(
    "overlays", [[], ["networks/dynunet"], ["small", "networks/dynunet_small"], ["networks/segresnet"]]
)
def test_networks_have_the_channels_that_are_named(configs, overlays):
    """In pre-training as many outputs too, to restore each channel."""
    names = ["T1", "T2", "FLAIR"]
    segmentation = configs == SEGMENTATION_CONFIGS
    parser = ConfigParser()
    parser.read_config([configs / "train.json", *(configs / f"{name}.yaml" for name in overlays)])
    parser.update({"channel_names": names, **({"organs": {"tumour": 1}} if segmentation else {})})
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def" if segmentation else "segmentation_network").eval()
        assert network(torch.zeros(1, 3, 64, 64, 32)).shape[1] == (2 if segmentation else 3)
    assert parser.get_parsed_content("description#input#channel_names") == names
