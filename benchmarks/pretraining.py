"""Training steps as they are run, against the bare networks on ready tensors, for training_step.py and gpu/speed.py."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Events
from monai.transforms import Compose, SelectItemsd
from pytorch_optimizer import LARS

from pgl_ext.data.cache import VolumeCache
from pgl_ext.data.dataset import EpochBatchSampler, VolumeDataset
from pgl_ext.data.loader import TrainingLoader
from pgl_ext.engines import PretrainTrainer
from pgl_ext.handlers import TargetEMA
from pgl_ext.methods import PGL
from pgl_ext.networks import ResNetEncoder
from pgl_ext.networks.build import prepare_network
from pgl_ext.transforms import (
    BatchIntensityd,
    RandBatchBlur,
    RandBatchBrightness,
    RandBatchGamma,
    RandBatchNoise,
    RandOverlappingViewsd,
    preprocessing,
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
    cache = VolumeCache(folder / "cache", preprocessing("image"))
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
    dataset: VolumeDataset,
    batch_size: int,
    micro_batch_size: int,
    steps: int,
    amp_dtype: str | None = None,
    num_workers: int = 0,
    channels_last: bool | None = None,
    compile: bool = False,
    encoder: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Alternate real training steps (data, augmentation, loss, optimiser, momentum) with bare ones.

    Args:
        device: ``cpu`` or ``cuda``.
        dataset: from :func:`make_dataset`.
        batch_size, micro_batch_size, steps, num_workers, compile: as in the bundle's ``train.json``.
        amp_dtype: ``bfloat16`` or ``float16``; None: full precision.
        channels_last: memory layout; None: on GPUs.
        encoder: arguments of the encoder; None: the paper's.

    Returns:
        median seconds of a training step, of its wait for data, and of a bare step; pairs per second; peak memory in
        GiB.
    """
    torch.manual_seed(0)
    cuda = device.startswith("cuda")
    method = PGL(ResNetEncoder(**(encoder or {})))
    channels_last = cuda if channels_last is None else channels_last
    network = prepare_network(method, device, channels_last=channels_last, compile=compile)
    half = None if amp_dtype is None else getattr(torch, amp_dtype)
    optimizer = LARS([p for p in method.parameters() if p.requires_grad], lr=0.2, weight_decay=1e-6)
    intensity = BatchIntensityd("views", [RandBatchNoise(), RandBatchBlur(), RandBatchBrightness(), RandBatchGamma()])
    times: dict[str, list[float]] = {"step": [], "data": [], "bare": []}

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    draws = -(-batch_size // len(dataset))
    sampler = EpochBatchSampler(len(dataset), batch_size, max_epochs=steps, patches_per_volume=draws)
    loader = TrainingLoader(dataset, sampler, num_workers, device)
    trainer = PretrainTrainer(
        device,
        max_epochs=steps,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        batch_transform=intensity,
        micro_batch_size=micro_batch_size,
        amp=amp_dtype is not None,
        amp_dtype=amp_dtype or "bfloat16",
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
        bare_step(method, ready, micro_batch_size, half)
        times["step"].append(end - clock["start"])
        times["data"].append(clock["batch"] - clock["start"])
        times["bare"].append(now() - end)

    trainer.run()
    result = {name: statistics.median(values[1:]) for name, values in times.items()}
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pairs = sampler.draws / sampler.steps
    return {**result, "pairs": pairs, "pairs_per_s": pairs / result["step"], "peak_gib": peak / 2**30}
