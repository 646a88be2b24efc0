"""Training steps against the bare networks in several variants, until the time is up; then the kernels of a bare step.

Prints a table; ``speed.json`` in ``WORK`` has the figures, by which the campaign chooses precision and length.
"""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from pretraining import bare_step, make_dataset, measure
from settings import CORES, TINY, WORK, setting
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pgl_ext.methods import PGL
from pgl_ext.networks import ResNetEncoder
from pgl_ext.networks.build import prepare_network

CUDA = torch.cuda.is_available()
DEFAULTS: dict[str, Any] = {
    "batch_size": 128,
    "micro_batch_size": 64,
    "amp_dtype": "bfloat16",
    "num_workers": min(12, max(1, CORES - 3)),
    "channels_last": True,
    "compile": False,
    "flat_batch_norm": False,
    "cudnn_benchmark": True,
    "deterministic": True,
}
ON_CPU = {"batch_size": 2, "micro_batch_size": 1, "num_workers": 0, "amp_dtype": None}
ENCODER = {"layers": (1, 1, 1, 1), "widen_factor": 0.25} if TINY else {}
VARIANTS: dict[str, dict[str, Any]] = {
    "micro-batch 64": {},
    "default: micro-batch 16": {"micro_batch_size": 16},
    "64, batch norm in 4-D": {"flat_batch_norm": True},
    "128, batch norm in 4-D": {"flat_batch_norm": True, "micro_batch_size": 128},
    "64, batch norm in 4-D, not deterministic": {"flat_batch_norm": True, "deterministic": False},
    "64, contiguous": {"channels_last": False},
    "64, no cudnn.benchmark": {"cudnn_benchmark": False, "deterministic": False},
    "64, float16": {"amp_dtype": "float16"},
    "64, compiled": {"compile": True},
    "128, compiled": {"compile": True, "micro_batch_size": 128},
    "64, 8 workers": {"num_workers": 8},
}
HEAD = ("variant", "pairs/s", "step s", "bare s", "data s", "of bare", "peak GiB", "seconds taken")

_stock_batch_norm = nn.BatchNorm3d.forward


def _flat_batch_norm(self: nn.BatchNorm3d, x: torch.Tensor) -> torch.Tensor:
    """Batch norm on (B, C, X, Y * Z), whose channels-last kernels are cuDNN's in bfloat16 too."""
    if x.dim() != 5 or not x.is_contiguous(memory_format=torch.channels_last_3d):
        return _stock_batch_norm(self, x)
    if self.training:
        self.num_batches_tracked.add_(1)
    parts = self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
    return F.batch_norm(x.flatten(3), *parts).unflatten(3, x.shape[3:])


@contextmanager
def switches(settings: dict[str, Any]) -> Iterator[None]:
    """Set cuDNN's switches and the kind of batch norm."""
    torch.backends.cudnn.benchmark = settings.pop("cudnn_benchmark")
    torch.backends.cudnn.deterministic = settings.pop("deterministic")
    nn.BatchNorm3d.forward = _flat_batch_norm if settings.pop("flat_batch_norm") else _stock_batch_norm
    try:
        yield
    finally:
        nn.BatchNorm3d.forward = _stock_batch_norm


def line(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def variant(name: str, change: dict[str, Any], dataset: Any, steps: int) -> dict[str, Any] | None:
    """Measure one variant and print its row."""
    settings = {**DEFAULTS, **change, **({} if CUDA else ON_CPU)}
    start = time.time()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    try:
        arguments = dict(settings)
        with switches(arguments):
            result = measure("cuda" if CUDA else "cpu", dataset, steps=steps, encoder=ENCODER, **arguments)
    except Exception as error:
        traceback.print_exc()
        line(name, f"FAILED {type(error).__name__}: {str(error)[:150]}", *[""] * 6)
        return None
    share = f"{100 * result['bare'] / result['step']:.0f} %"
    seconds = (f"{result[key]:.3f}" for key in ("step", "bare", "data"))
    line(
        name, f"{result['pairs_per_s']:.0f}", *seconds, share, f"{result['peak_gib']:.1f}", f"{time.time() - start:.0f}"
    )
    return {**result, **settings}


def kernels() -> None:
    """The kernels that take most of a bare step's time."""
    torch.backends.cudnn.benchmark = True
    method = prepare_network(PGL(ResNetEncoder()), "cuda", channels_last=True)
    views = torch.randn(64, 2, 1, 96, 96, 16, device="cuda")
    for _ in range(2):
        bare_step(method, views, 64, torch.bfloat16)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        bare_step(method, views, 64, torch.bfloat16)
        torch.cuda.synchronize()
    averages = found.key_averages()
    (WORK / "profile.txt").write_text(averages.table(sort_by="self_cuda_time_total", row_limit=40))
    for event in sorted(averages, key=lambda event: -event.self_device_time_total)[:14]:
        line(event.key[:90], event.count, f"{event.self_device_time_total / 1e3:.2f} ms", *[""] * 5)


def main() -> None:
    deadline = time.time() + setting("BENCH_SECONDS", 85, 300)
    shape, volumes = ((256, 256, 100), 8) if CUDA else ((140, 140, 48), 2)
    folder = WORK / "benchmark_data"
    folder.mkdir(exist_ok=True)
    dataset = make_dataset(folder, volumes, shape, memory_limit_gib=64)
    wanted = [name for name in os.environ.get("VARIANTS", "").split(";") if name]
    names = [name for name in VARIANTS if not wanted or name in wanted][: 2 if TINY else None]
    line(*HEAD)
    line(*["---"] * len(HEAD))
    results = {}
    for name in names:
        if time.time() > deadline - 12 and not TINY:
            line(name, "no time left", *[""] * 6)
            continue
        result = variant(name, VARIANTS[name], dataset, setting("BENCH_STEPS", 12, 2))
        if result is not None:
            results[name] = result
            (WORK / "speed.json").write_text(json.dumps(results))
        gc.collect()
        torch._dynamo.reset()
        if CUDA:
            torch.cuda.empty_cache()
    if CUDA and time.time() < deadline + 10:
        kernels()


if __name__ == "__main__":
    main()
