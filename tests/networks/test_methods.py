"""Methods on networks: a step of training, and the files that it leaves.

The grid of 8 networks and 7 methods is sampled: PGL with restoration, which uses encoder and decoder, on every network,
and every other method on at least two; each network has at least two methods. The paper's network is in the tests of
each method. The ablations of PGL change views, which networks do not see. Exports: ``test_families.py`` (TorchScript of
each network and of each encoder), ``tests/weights/test_exports.py`` (ONNX of each).
"""

from __future__ import annotations

import pytest
import torch
from made_weights import encoder_record, small_network

from pgl_ext.methods import BYOL, HSSL, MAE, PGL, PGLMAE, ModelsGenesis, PCRLv2
from pgl_ext.networks.build import NETWORKS, build
from pgl_ext.tools.export import export_decoder, export_encoder
from pgl_ext.weights import load_decoder, load_encoder

HEADS = {"hidden_channels": 8, "out_channels": 4}
METHODS = {
    "pgl": lambda network: PGL(network.feature_network, **HEADS),
    "byol": lambda network: BYOL(network.feature_network, **HEADS),
    "mae": MAE,
    "pgl_mae": lambda network: PGLMAE(network, **HEADS),
    "models_genesis": ModelsGenesis,
    "pcrlv2": lambda network: PCRLv2(network.feature_network, 8, (8, 4)),
}
OTHERS = {
    "dynunet": ["byol", "pcrlv2"],
    "segresnet": ["pgl", "models_genesis"],
    "segresnet_ds": ["pcrlv2", "mae"],
    "unet": ["models_genesis", "pgl"],
    "swinunetr": ["pgl", "mae", "pcrlv2"],
    "mednext": ["byol", "pgl"],
    "resenc": ["pcrlv2", "mae", "models_genesis"],
}
SAMPLED = [(family, method) for family in NETWORKS for method in ("pgl_mae", *OTHERS.get(family, ()))]


def make_batch() -> dict[str, torch.Tensor]:
    """Two pairs of views, the second one flipped, with what any of the methods needs."""
    views = torch.rand(2, 2, 1, 64, 32, 32)
    affines = torch.eye(4).repeat(2, 2, 1, 1)
    affines[:, 1, 0, 0], affines[:, 1, 0, 3] = -1, 63
    mask = torch.rand(2, 2, 1, 64, 32, 32) < 0.6
    return {"views": views, "affines": affines, "mask": mask, "deformed": views**2, "local_views": views[..., :16]}


@pytest.mark.parametrize(("family", "name"), SAMPLED)
def test_a_step_and_its_files(family, name, tmp_path):
    torch.manual_seed(0)
    network = small_network(family, out_channels=1)
    method = METHODS[name](network)
    method(make_batch())["loss"].backward()
    lacking = [key for key, value in method.named_parameters() if value.requires_grad and value.grad is None]
    assert lacking == []
    assert all(torch.isfinite(value.grad).all() for value in method.parameters() if value.grad is not None)
    record = encoder_record(network.feature_network)
    torch.save({"network": method.state_dict(), "description": record.to_json()}, tmp_path / "checkpoint.pt")
    again = build(NETWORKS, network.architecture, "here", out_channels=3)
    report = load_encoder(again, export_encoder(tmp_path / "checkpoint.pt", tmp_path / "encoder.pt"))
    assert report.missing == report.unexpected == []
    if method.pretrains_decoder:
        report = load_decoder(again, export_decoder(tmp_path / "checkpoint.pt", tmp_path / "decoder.pt"))
        assert report.missing == report.unexpected == []


@pytest.mark.parametrize("family", sorted(set(NETWORKS) - {"resnet"}))
def test_hssl_says_which_network_it_needs(family):
    with pytest.raises(ValueError, match=r"needs the paper's network.*leave the overlay"):
        HSSL(small_network(family), 2, 2)


def test_pcrlv2_says_how_many_levels_there_are():
    with pytest.raises(ValueError, match="asks for 3 levels, but the network has 1 finer ones than its deepest"):
        PCRLv2(small_network("unet"), 8, (8, 4, 4))
