"""One side of a row of ``peers.py``: ``python peer_sides.py SETTINGS SIDE ROW``, in the environment of that side.

It works whenever a line comes on standard input, and answers each with a line of JSON: seconds for one unit of work.
What libraries print goes to standard error. Imports are within the functions: no environment has all of them.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
KEYS = ["image", "label"]


def turns(units: int, precision: str = "") -> Iterator[None]:
    """Yields where a turn begins; the answer is given when the next one is asked for."""
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        took = {"wall": (time.perf_counter() - wall) / units, "cpu": (time.process_time() - cpu) / units}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**took, "peak": peak, "precision": precision}), file=sys.__stdout__, flush=True)


def our_objects(s: SimpleNamespace, bundle: str, networks: tuple[str, ...] = (), **settings: Any) -> Callable:
    """What gives the objects of a bundle's ``train.json`` by their names, for the cases without validation."""
    from pgl_ext.config_check import StrictWorkflow

    configs = BUNDLES / bundle / "configs"
    workflow = StrictWorkflow(
        [str(configs / name) for name in ("train.json", *networks)],
        workflow_type="train",
        dataset_dir="/",
        data_list_file_path=f"{s.folder}/dataset.json",
        validation_fraction=0,
        output_dir=f"{s.folder}/{s.row}",
        hu_window=None,
        num_workers=0,
        max_epochs=1000,
        **settings,
    )
    workflow.initialize()
    return workflow.parser.get_parsed_content


def our_network(s: SimpleNamespace) -> dict[str, Any]:
    """Settings of ``networks/dynunet.yaml``; as many outputs for deep supervision as nnU-Net has."""
    network = {"filters": s.filters, "strides": strides(s), "deep_supr_num": len(s.filters) - 2}
    return {"patch_size": s.patch, **{f"network_def#{name}": value for name, value in network.items()}}


def strides(s: SimpleNamespace) -> list[int]:
    return [1, *[2] * (len(s.filters) - 1)]


def volume(s: SimpleNamespace) -> Any:
    """Two patches along each axis: (1, X, Y, Z)."""
    import torch

    return torch.randn(1, *(2 * n for n in s.patch), generator=torch.Generator().manual_seed(0))


def our_training(s: SimpleNamespace) -> None:
    from ignite.engine import Events

    # As one epoch, at whose end there would be checkpoints and pictures.
    length = {"steps_per_epoch": 10_000, "batch_size": s.batch_size}
    if s.row != "training":
        length["amp"] = False
    get = our_objects(s, "pgl_segmentation", ("networks/dynunet.yaml",), **length, **our_network(s))
    trainer = get("train#trainer")
    rounds = turns(s.steps, str(trainer.amp_dtype or "float32").removeprefix("torch."))
    next(rounds)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=s.steps), lambda: next(rounds))
    trainer.run()


def our_inference(s: SimpleNamespace) -> None:
    from pgl_ext.segmentation.inferers import FlipInferer, VolumeInferer

    get = our_objects(s, "pgl_segmentation", ("networks/dynunet.yaml",), **our_network(s))
    network, task, image = get("network").eval(), get("task"), volume(s)[None]
    # As inference.json makes it.
    inferer = FlipInferer(VolumeInferer(s.patch, 4, 0.5, cpu_thresh=int(2e9) // task.out_channels), task)
    for _ in turns(1, "float32"):
        inferer(image, network)


def our_views(s: SimpleNamespace) -> None:
    get = our_objects(s, "pgl_pretrain", view_size=s.view, batch_size=16, patches_per_volume=16)
    batches = iter(get("train#dataloader"))
    for _ in turns(s.pairs):
        draw(batches, s.pairs, "views")


def our_cases(s: SimpleNamespace) -> None:
    from pgl_ext.data.cache import VolumeCache

    get = our_objects(s, "pgl_segmentation", spacing=None if s.row == "cold" else s.spacing)
    steps = get("case_preprocessing")
    for number, _ in enumerate(turns(len(s.items))):
        folder = Path(s.folder, f"{s.row}_{number}")
        bad = VolumeCache(folder, steps).prepare(s.items)
        assert not bad, bad
        shutil.rmtree(folder)


def draw(batches: Iterator[dict], count: int, key: str) -> None:
    """Take batches with this many samples together."""
    while count > 0:
        count -= len(next(batches)[key])


def plan(s: SimpleNamespace) -> None:
    """nnU-Net's default plan and preprocessed cases; then the plan is given this network, patch and batch."""
    import nnunet

    raw, preprocessed = (Path(s.folder, name, nnunet.DATASET) for name in ("raw", "preprocessed"))
    nnunet.convert(json.loads(Path(s.folder, "dataset.json").read_text()), "test", Path("/"), raw)
    nnunet.prepare_data(preprocessed, threads=1)
    path = preprocessed / f"{nnunet.PLANS}.json"
    plans = json.loads(path.read_text())
    configuration = plans["configurations"][nnunet.CONFIGURATION]
    # Axes are z, y, x there.
    configuration.update(patch_size=s.patch[::-1], batch_size=s.batch_size)
    levels = len(s.filters)
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=levels,
        features_per_stage=s.filters,
        strides=[[stride] * 3 for stride in strides(s)],
        kernel_sizes=[[3] * 3] * levels,
        n_conv_per_stage=[2] * levels,
        n_conv_per_stage_decoder=[2] * (levels - 1),
    )
    path.write_text(json.dumps(plans))


def nnunet_trainer(s: SimpleNamespace) -> Any:
    import nnunet

    trainer = nnunet.make_trainer(Path(s.folder, "preprocessed", nnunet.DATASET))
    trainer.prepare(1, 1, 0, Path(os.devnull))
    return trainer


def nnunet_training(s: SimpleNamespace) -> None:
    trainer = nnunet_trainer(s)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for _ in turns(s.steps, "float32"):
        for _ in range(s.steps):
            trainer.train_step(next(trainer.dataloader_train))


def nnunet_inference(s: SimpleNamespace) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer = nnunet_trainer(s)
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(use_mirroring=False, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json, "", None
    )
    image = volume(s).permute(0, 3, 2, 1).contiguous()
    for _ in turns(1, "float32"):
        predictor.predict_sliding_window_return_logits(image)


def nnunet_cases(s: SimpleNamespace) -> None:
    import nnunet
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    raw, preprocessed = (Path(s.folder, name, nnunet.DATASET) for name in ("raw", "preprocessed"))
    plans = json.loads((preprocessed / f"{nnunet.PLANS}.json").read_text())
    if s.row == "resampled":
        plans["configurations"][nnunet.CONFIGURATION]["spacing"] = s.spacing[::-1]
    manager = PlansManager(plans)
    configuration = manager.get_configuration(nnunet.CONFIGURATION)
    preprocessor = configuration.preprocessor_class(verbose=False)
    dataset = json.loads((raw / "dataset.json").read_text())
    cases = get_filenames_of_train_images_and_targets(str(raw), dataset)
    for number, _ in enumerate(turns(len(cases))):
        folder = Path(s.folder, f"{s.row}_nnunet_{number}")
        folder.mkdir()
        for name, case in cases.items():
            files = str(folder / name), case["images"], case["label"]
            preprocessor.run_case_save(*files, manager, configuration, dataset)
        shutil.rmtree(folder)


def monai_network(s: SimpleNamespace, deep_supervision: bool) -> Any:
    from monai.networks.nets import DynUNet

    labels = json.loads(Path(s.folder, "dataset.json").read_text())["labels"]
    steps = strides(s)
    kernels, heads = [3] * len(steps), len(steps) - 2
    return DynUNet(
        3, 1, len(labels), kernels, steps, steps[1:], s.filters, deep_supervision=deep_supervision, deep_supr_num=heads
    )


def monai_reading(keys: list[str]) -> list:
    from monai import transforms as t

    return [
        t.LoadImaged(keys),
        t.EnsureChannelFirstd(keys),
        t.Orientationd(keys, "RAS", labels=None),
        t.NormalizeIntensityd("image", channel_wise=True),
    ]


def monai_training(s: SimpleNamespace) -> None:
    import torch
    from ignite.engine import Events
    from monai import transforms as t
    from monai.data import CacheDataset, DataLoader
    from monai.engines import SupervisedTrainer
    from monai.losses import DeepSupervisionLoss, DiceCELoss

    steps = [
        *monai_reading(KEYS),
        t.SpatialPadd(KEYS, s.patch),
        t.RandCropByPosNegLabeld(KEYS, "label", s.patch, num_samples=s.batch_size),
        t.RandZoomd(KEYS, 0.15, 0.8, 1.25, mode=["trilinear", "nearest"]),
        t.RandGaussianNoised("image", 0.15),
        t.RandGaussianSmoothd("image", (0.5, 1), (0.5, 1), (0.5, 1), prob=0.15),
        t.RandScaleIntensityd("image", 0.3, 0.15),
        t.RandShiftIntensityd("image", 0.1, prob=0.15),
        *(t.RandFlipd(KEYS, 0.5, axis) for axis in range(3)),
    ]
    network = monai_network(s, deep_supervision=True)
    loss = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True, batch=True))
    trainer = SupervisedTrainer(
        "cpu",
        1_000_000,
        # All patches of a batch from one case.
        DataLoader(CacheDataset(s.items, t.Compose(steps), progress=False), batch_size=1, shuffle=True),
        network,
        torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True),
        lambda logits, label: loss(logits.unbind(1), label),
    )
    rounds = turns(s.steps, "float32")
    next(rounds)
    done = itertools.count(1)
    # Through all epochs, which are as short as the list of cases.
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: next(rounds) if next(done) % s.steps == 0 else None)
    trainer.run()


def monai_inference(s: SimpleNamespace) -> None:
    import torch
    from monai.inferers import SlidingWindowInferer

    network, image = monai_network(s, deep_supervision=False).eval(), volume(s)[None]
    inferer = SlidingWindowInferer(s.patch, 4, 0.5, "gaussian")
    for _ in turns(1, "float32"):
        with torch.no_grad():
            inferer(image, network)


def monai_views(s: SimpleNamespace) -> None:
    from monai import transforms as t
    from monai.data import CacheDataset, DataLoader
    from torch.utils.data import RandomSampler

    views = ["image", "second"]
    smallest, largest = ([round(factor * n) for n in s.view] for factor in (1.1, 1.4))
    steps = [*monai_reading(["image"]), t.CopyItemsd("image", names="second")]
    for view in views:
        steps.append(t.RandSpatialCropd(view, smallest, largest, random_center=True, random_size=True))
        steps.append(t.Resized(view, s.view, mode="trilinear"))
        steps += [t.RandFlipd(view, 0.5, axis) for axis in range(3)]
    dataset = CacheDataset(s.items, t.Compose([*steps, t.SelectItemsd(views)]), progress=False)
    sampler = RandomSampler(dataset, replacement=True, num_samples=1_000_000)
    batches = iter(DataLoader(dataset, batch_size=16, sampler=sampler))
    for _ in turns(s.pairs):
        draw(batches, s.pairs, "second")


WORK: dict[str, dict[str, Callable[[SimpleNamespace], None]]] = {
    "ours": {"training": our_training, "inference": our_inference, "views": our_views, "cold": our_cases},
    "nnunet": {"training": nnunet_training, "inference": nnunet_inference, "cold": nnunet_cases, "plan": plan},
    "monai": {"training": monai_training, "inference": monai_inference, "views": monai_views},
}


def main() -> None:
    path, side, row = sys.argv[1:]
    settings = SimpleNamespace(**json.loads(Path(path).read_text()), row=row)
    settings.items = json.loads(Path(settings.folder, "dataset.json").read_text())["training"]
    sys.stdout = sys.stderr
    WORK[side]["cold" if row == "resampled" else row.partition(",")[0]](settings)


if __name__ == "__main__":
    main()
