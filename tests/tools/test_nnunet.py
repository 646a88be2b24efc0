"""Exports for nnU-Net; the oracle is its own network, built as nnU-Net builds it from the plans that are written."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from made_weights import as_trained, encoder_record, input_record, small_network

from pgl_ext.networks import ResNetEncoder
from pgl_ext.networks.build import NETWORKS
from pgl_ext.tools.export import export_nnunet
from pgl_ext.tools.nnunet import CONFIGURATION, PLANS
from pgl_ext.weights import (
    load_decoder,
    load_encoder,
    recorded_architecture,
    recorded_input,
    save_decoder,
    save_encoder,
)

INPUT = input_record(hu_window=None, spacing=[1.0, 1.5, 3.0], patch_size=[32, 24, 16])
ARGUMENTS = {
    "resenc": {"features_per_stage": (4, 6, 8), "strides": (1, (2, 2, 1), 2), "n_blocks_per_stage": (1, 1, 2),
               "kernel_sizes": [(3, 3, 1), 3, 3]},
    "dynunet": {"filters": (4, 6, 8), "strides": (1, (2, 2, 1), 2)},
}  # fmt: skip


def network_of(family: str, **arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    return as_trained(NETWORKS[family](1, 1, **{**ARGUMENTS[family], **arguments})).eval()


def written(network: torch.nn.Module, folder: Path, decoder: bool = True) -> Path:
    save_encoder(network, folder / "pgl_encoder.pt", encoder_record(network, input=INPUT))
    if decoder:
        save_decoder(network, folder / "pgl_decoder.pt", encoder_record(network, input=INPUT))
    return folder / "pgl_encoder.pt"


def nnunets_network(configuration: dict) -> torch.nn.Module:
    """As nnU-Net builds it: modules by name, and two classes more than it was pre-trained with."""
    architecture = configuration["architecture"]
    arguments = dict(architecture["arch_kwargs"])
    for name in architecture["_kw_requires_import"]:
        if arguments[name] is not None:
            module, _, found = arguments[name].rpartition(".")
            arguments[name] = getattr(importlib.import_module(module), found)
    module, _, found = architecture["network_class_name"].rpartition(".")
    return getattr(importlib.import_module(module), found)(1, num_classes=3, deep_supervision=True, **arguments)


def load_as_nnunet(network: torch.nn.Module, path: Path) -> None:
    """Its rule: every tensor but those of segmentation layers, of equal shape."""
    weights, state = torch.load(path, weights_only=True)["network_weights"], network.state_dict()
    needed = [key for key in state if ".seg_layers." not in key]
    assert all(weights[key].shape == state[key].shape for key in needed)
    network.load_state_dict({**state, **{key: weights[key] for key in needed}})


@pytest.mark.parametrize("turn", [None, [1, 0, 2]], ids=["z, y, x", "y, z, x"])
@pytest.mark.parametrize("family", ARGUMENTS)
def test_nnunets_network_gives_the_same(family, turn, tmp_path):
    """At every level of encoder and decoder, on arrays z, y, x, or as its plans transpose these."""
    network = network_of(family)
    plans = None
    if turn is not None:
        plans = tmp_path / "nnUNetPlans.json"
        plans.write_text(json.dumps({"transpose_forward": turn, "configurations": {"3d_fullres": {"batch_size": 2}}}))
    out = export_nnunet(written(network, tmp_path), tmp_path / "out.pth", plans)
    content = json.loads((tmp_path / "pglPlans.json").read_text())
    configuration = content["configurations"][CONFIGURATION]
    theirs = nnunets_network(configuration).eval()
    load_as_nnunet(theirs, out)
    order = turn or [0, 1, 2]
    assert configuration["patch_size"] == [[16, 24, 32][axis] for axis in order]
    assert configuration["spacing"] == [[3.0, 1.5, 1.0][axis] for axis in order]
    assert content["plans_name"] == PLANS
    x = torch.randn(1, 1, 16, 16, 8)
    array = x.permute(0, 1, *(4 - axis for axis in order))
    with torch.no_grad():
        skips = theirs.encoder(array)
        features = network.features(x)
        level = skips[-1]
        for up, stage, skip in zip(theirs.decoder.transpconvs, theirs.decoder.stages, skips[-2::-1], strict=True):
            level = stage(torch.cat((up(level), skip), dim=1))
        head = network.output_block.conv.conv if family == "dynunet" else network.decoder["seg_layers"]["1"]
        logits = head(level)
        back = [0, 1, *(2 + order.index(2 - axis) for axis in range(3))]
        for ours, their in zip([*features, network(x)], [*skips, logits], strict=True):
            torch.testing.assert_close(ours, their.permute(back), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ARGUMENTS)
def test_it_is_read_again(family, tmp_path):
    """With what its plans tell."""
    network = network_of(family)
    out = export_nnunet(written(network, tmp_path), tmp_path / "out.pth", _plans(tmp_path))
    assert recorded_input(out).spacing == [1.0, 1.5, 3.0]
    again = NETWORKS[family](**{**recorded_architecture(out)["arguments"], "out_channels": 1})
    assert (load_encoder(again, out).missing, load_decoder(again, out).missing) == ([], [])
    x = torch.randn(1, 1, 16, 16, 8)
    with torch.no_grad():
        for ours, theirs in zip(again.eval().features(x), network.features(x), strict=True):
            torch.testing.assert_close(ours, theirs)


def _plans(folder: Path) -> Path:
    (folder / "nnUNetPlans.json").write_text(json.dumps({"configurations": {"3d_fullres": {"batch_size": 2}}}))
    return folder / "nnUNetPlans.json"


def test_a_decoder_that_is_not_there_is_random(tmp_path, caplog):
    network = network_of("resenc")
    out = export_nnunet(written(network, tmp_path, decoder=False), tmp_path / "out.pth")
    assert "has no decoder" in caplog.text
    load_as_nnunet(
        nnunets_network(json.loads((tmp_path / "pglPlans.json").read_text())["configurations"][CONFIGURATION]), out
    )


@pytest.mark.parametrize(
    "network",
    [
        small_network("segresnet"),
        small_network("dynunet", kernel_size=[[3, 3, 1], 3, 3]),
        small_network("dynunet", res_block=True),
        ResNetEncoder((1, 1, 1, 1), "basic", 0.0625),
    ],
    ids=["segresnet", "kernels", "residual", "resnet"],
)
def test_networks_that_nnunet_does_not_have(network, tmp_path):
    save_encoder(network, tmp_path / "e.pt", encoder_record(network))
    with pytest.raises(ValueError, match=r"e\.pt holds a .*, which nnU-Net does not have.*--architecture resenc"):
        export_nnunet(tmp_path / "e.pt", tmp_path / "out.pth")


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"reads no \.safetensors.*\.pth"):
        export_nnunet(written(network_of("dynunet"), tmp_path), tmp_path / "out.safetensors")
