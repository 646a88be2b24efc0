"""What is done with packaged bundles in processes of their own: ``python packaged_checks.py CHECK FOLDER ...``.

FOLDER is what `pgl package` has written. Any other copy of the package fails in these processes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser, ckpt_export, create_workflow, load, run, verify_metadata, verify_net_in_out
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, ModelType
from monai.fl.utils.exchange_object import ExchangeObject

NAMES = ("pgl_pretrain", "pgl_segmentation")
CONFIGS = ["configs/train.json", "configs/small.yaml"]


def model_zoo(folder: str, name: str, schema: str = "") -> None:
    """The zoo's checks of metadata, network and export, of one bundle."""
    bundle = Path(folder) / "models" / name
    configs = {
        "meta_file": str(bundle / "configs" / "metadata.json"),
        "config_file": str(bundle / "configs" / "inference.json"),
    }
    if schema:
        verify_metadata(meta_file=configs["meta_file"], filepath=shutil.copy(schema, "schema.json"))
    verify_net_in_out("network_def", device="cpu", n=2, bundle_root=str(bundle), **configs)
    model = str(bundle / "models" / "model.pt")
    ckpt_export("network_def", filepath="model.ts", ckpt_file=model, bundle_root=str(bundle), **configs)
    torch.jit.load("model.ts")(torch.rand(1, 1, 32, 32, 16))


def one_process(folder: str) -> None:
    """Both bundles beside a third one with `scripts` of its own; they share the code of the first."""
    Path("third/scripts").mkdir(parents=True)
    Path("third/scripts/__init__.py").write_text("THIRD = True\n")
    sys.path.insert(0, "third")
    import scripts

    for name in NAMES:
        bundle = Path(folder) / "models" / name
        root = {"bundle_root": str(bundle)}
        # MONAI hands on what it knows nothing of to the workflow, and fills the dictionary up.
        network = load(
            name,
            bundle_dir=bundle.parent,
            workflow_type="inference",
            source="monaihosting",
            device="cpu",
            args_file=dict(root),
        )
        weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
        state = network.state_dict()
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[key], value) for key, value in weights.items())
        workflow = create_workflow(
            config_file=str(bundle / "configs" / "train.json"), workflow_type="train", **root, dataset_dir="none"
        )
        for part in (network, workflow.network_def):
            code = Path(sys.modules[type(part).__module__].__file__)
            assert code.is_relative_to(Path(folder) / "models" / NAMES[0] / "pgl_ext"), code
        assert workflow.version == json.loads((bundle / "configs" / "metadata.json").read_text())["version"]
    assert scripts.THIRD


def federated(folder: str, name: str, dataset_dir: str, settings: str) -> None:
    """Two rounds of one client: weights, training, evaluation; what `docs/README.md` of the bundles describes."""
    arguments = {**json.loads(settings), "dataset_dir": dataset_dir, "max_epochs": 2}
    client = MonaiAlgo(
        bundle_root=f"{folder}/models/{name}",
        send_weight_diff=False,
        config_train_filename=CONFIGS,
        train_kwargs={**arguments, "output_dir": "client"},
        config_evaluate_filename=CONFIGS,
        eval_kwargs={**arguments, "output_dir": "client/evaluation"},
        best_model_filepath=str(Path("client/models/model.pt").absolute()),
    )
    client.initialize()
    draws = recorded_draws(type(client.trainer.data_loader.batch_sampler))
    weights = {key: value.clone() for key, value in client.get_weights().weights.items()}
    for number in (1, 2):
        client.train(ExchangeObject(weights=weights))
        new = {key: value.clone() for key, value in client.get_weights().weights.items()}
        assert any(not torch.equal(new[key], value) for key, value in weights.items() if value.is_floating_point())
        assert client.trainer.state.epoch == number
        weights = new
    assert {epoch for epoch, _ in draws} == {0, 1}, "the second round has drawn what the first one had"
    metrics = client.evaluate(ExchangeObject(weights=weights)).metrics
    assert np.isfinite(list(metrics.values())).all()
    assert metrics
    if name == "pgl_segmentation":
        best = client.get_weights(extra={ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL})
        assert best.weights.keys() == weights.keys()
    client.finalize()


def monai_label(bundle: str, cases: str) -> None:
    """Train as MONAI Label does, from the encoder, and again from what came of it, then without validation."""
    os.environ["MONAI_LABEL_APP_DIR"] = bundle
    configs, model = Path(bundle) / "configs", Path(bundle) / "models" / "model.pt"
    handlers = ConfigParser.load_config_file(str(configs / "train.json"))["train"]["handlers"]
    listed = [{name: f"{cases}/{name}s/case{number}.nii.gz" for name in ("image", "label")} for number in range(3)]
    for weights, validation in (("pgl_encoder.pt", listed[2:]), ("model.pt", [])):
        loader = {
            "_target_": "CheckpointLoader",
            "load_path": str(model.with_name(weights)),
            "load_dict": {"model": "$@network"},
            "strict": False,
        }
        overrides = {
            "bundle_root": bundle,
            "device": "cpu",
            "train#trainer#max_epochs": 2,
            "train#dataset#data": listed[:2],
            "validate#dataset#data": validation,
            "train#handlers": [loader, *handlers],
        }
        before = model.read_bytes()
        run(
            run_id="run",
            meta_file=str(configs / "metadata.json"),
            config_file=str(configs / "train.json"),
            num_workers=0,
            **overrides,
        )
        assert model.read_bytes() != before, f"training from {weights} has left the model as it was"
        assert json.loads(model.with_suffix(".json").read_text())["data"]["validation_cases"] == len(validation)


def recorded_draws(sampler: type) -> list[tuple[int, int]]:
    """What samplers of a class draw from now on: (epoch, index)."""
    draws: list[tuple[int, int]] = []
    iterate = sampler.__iter__

    def recorded(self):
        for batch in iterate(self):
            draws.extend(batch)
            yield batch

    sampler.__iter__ = recorded
    return draws


if __name__ == "__main__":
    torch.set_num_threads(1)
    {check.__name__: check for check in (model_zoo, one_process, federated, monai_label)}[sys.argv[1]](*sys.argv[2:])
