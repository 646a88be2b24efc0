"""Training steps as they are run, against the bare networks on ready tensors; used by training_step.py and gpu.py."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Events
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, NormalizeIntensityd, SelectItemsd
from pytorch_optimizer import LARS

from pgl_ext.data.cache import VolumeCache
from pgl_ext.data.dataset import EpochBatchSampler, VolumeDataset
from pgl_ext.engines import PretrainTrainer
from pgl_ext.networks.build import prepare_network
from pgl_ext.handlers import TargetEMA
from pgl_ext.methods import PGL
from pgl_ext.networks import ResNetEncoder
from pgl_ext.transforms import (
    BatchIntensityd,
    RandBatchBlur,
    RandBatchBrightness,
    RandBatchGamma,
    RandBatchNoise,
    RandOverlappingViewsd,
)

VIEW_SIZE = (96, 96, 16)


def make_dataset(folder: Path, volumes: int, shape: tuple[int, int, int], memory_limit_gib: float) -> VolumeDataset:
    """Random smooth volumes on disk and in the cache, as pre-training finds them."""
    rng = np.random.default_rng(0)
    items = []
    for number in range(volumes):
        coarse = rng.normal(0, 300, [max(2, n // 8) for n in shape])
        volume = np.kron(coarse, np.ones((8, 8, 8)))[: shape[0], : shape[1], : shape[2]]
        path = folder / f"volume{number}.nii.gz"
        nib.save(nib.Nifti1Image(volume.astype(np.int16), np.eye(4)), path)
        items.append({"image": str(path)})
    preprocessing = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), NormalizeIntensityd("image")])
    cache = VolumeCache(folder / "cache", preprocessing)
    assert not cache.prepare(items, show_progress=False)
    views = Compose([RandOverlappingViewsd("image", VIEW_SIZE), SelectItemsd(["views", "affines"])])
    return VolumeDataset(items, cache, views, memory_limit_gib=memory_limit_gib)


def bare_step(method: PGL, views: torch.Tensor, micro_batch_size: int, dtype: torch.dtype | None) -> None:
    """Forward and backward of the online networks, forward of the target's: what no implementation can leave out."""
    method.zero_grad(set_to_none=True)
    for part in views.split(micro_batch_size):
        flat = part.flatten(0, 1)
        with torch.autocast(views.device.type, dtype=dtype, enabled=dtype is not None):
            prediction = method.predictor(method.projector(method.encoder(flat)[-1]))
            with torch.no_grad():
                method.target_projector(method.target_encoder(flat)[-1])
        prediction.sum().backward()


def measure(
    device: str,
    batch_size: int,
    micro_batch_size: int,
    steps: int,
    amp: bool,
    num_workers: int,
    volumes: int,
    shape: tuple[int, int, int],
    memory_limit_gib: float | None,
    compile: bool = False,
) -> dict[str, float]:
    """Alternate real training steps (data, augmentation, loss, optimiser, momentum) with bare ones.

    Returns:
        median seconds of a training step, of its wait for data, and of a bare step; pairs per second; peak memory in
        GiB.
    """
    torch.manual_seed(0)
    cuda = device.startswith("cuda")
    method = PGL(ResNetEncoder())
    network = prepare_network(method, device, channels_last=cuda, compile=compile)
    optimizer = LARS([p for p in method.parameters() if p.requires_grad], lr=0.2, weight_decay=1e-6)
    intensity = BatchIntensityd("views", [RandBatchNoise(), RandBatchBlur(), RandBatchBrightness(), RandBatchGamma()])
    times: dict[str, list[float]] = {"step": [], "data": [], "bare": []}

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder), volumes, shape, memory_limit_gib)
        draws = -(-batch_size // volumes)
        sampler = EpochBatchSampler(volumes, batch_size, max_epochs=steps, patches_per_volume=draws)
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=cuda)
        trainer = PretrainTrainer(
            device,
            max_epochs=steps,
            train_data_loader=loader,
            network=network,
            optimizer=optimizer,
            batch_transform=intensity,
            micro_batch_size=micro_batch_size,
            amp=amp,
            non_blocking=True,
            train_handlers=[TargetEMA(method, steps)],
        )
        clock = {}
        ready = torch.randn(batch_size, 2, 1, *VIEW_SIZE, device=device)

        @trainer.on(Events.GET_BATCH_STARTED)
        def start() -> None:
            clock["start"] = now()

        @trainer.on(Events.GET_BATCH_COMPLETED)
        def got_batch() -> None:
            clock["batch"] = now()

        @trainer.on(Events.ITERATION_COMPLETED)
        def stop() -> None:
            end = now()
            bare_step(method, ready, micro_batch_size, torch.bfloat16 if amp else None)
            times["step"].append(end - clock["start"])
            times["data"].append(clock["batch"] - clock["start"])
            times["bare"].append(now() - end)

        trainer.run()
    result = {name: statistics.median(values[1:]) for name, values in times.items()}
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pairs = sampler.draws / sampler.steps
    return {**result, "pairs": pairs, "pairs_per_s": pairs / result["step"], "peak_gib": peak / 2**30}
