"""The operators that decide the speed, at the paper's sizes: batch norm, convolutions, pooling, upsampling."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

CUDA = torch.cuda.is_available()
TINY = os.environ.get("TINY") == "1"  # a batch norm alone
DEVICE = "cuda" if CUDA else "cpu"
BATCH = 64 if CUDA else 2
LAST = torch.channels_last_3d
BATCH_NORMS = ((64, (48, 48, 16)), (256, (24, 24, 8)), (1024, (6, 6, 2)))
# In and out channels, kernel, size, stride, dilation, groups.
CONVOLUTIONS = (
    (1, 64, 7, (96, 96, 16), (2, 2, 1), 1, 1),
    (64, 64, 3, (24, 24, 8), 1, 1, 1),
    (64, 256, 1, (24, 24, 8), 1, 1, 1),
    (256, 256, 3, (6, 6, 2), 1, 1, 1),
    (512, 512, 3, (6, 6, 2), 1, 2, 1),
    (512, 2048, 1, (6, 6, 2), 1, 1, 1),
    (128, 128, 3, (24, 24, 16), 1, 1, 128),
    (32, 32, 3, (48, 48, 48), 1, 1, 32),
)


class FlatBatchNorm(nn.BatchNorm3d):
    """Batch norm on (B, C, X, Y * Z)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        return F.batch_norm(x.flatten(3), *parts).unflatten(3, x.shape[3:])


def milliseconds(call: Callable[[], object], repetitions: int = 10) -> float:
    """Median time of a call, after two that warm up."""
    call(), call()
    if not CUDA:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repetitions // 2]


def show(name: str, module: nn.Module, x: torch.Tensor, flop: float = 0, bytes_: float = 0) -> None:
    """Print times, and operations or bytes per second, of a forward pass and of both passes; or that it failed."""
    try:
        gradient = torch.randn_like(module(x))
        with torch.no_grad():
            forward = milliseconds(lambda: module(x))
        both = milliseconds(lambda: module(x).backward(gradient))
    except Exception as error:
        print("FAILED", name, type(error).__name__, str(error)[:200], flush=True)
        return
    for title, ms, factor in (("forward", forward, 1), ("forward and backward", both, 3)):
        rate = f" {factor * flop / ms / 1e9:7.1f} TFLOP/s" if flop else ""
        rate += f" {factor * bytes_ / ms / 1e6:7.0f} GB/s" if bytes_ else ""
        print(f"{name} {title}".ljust(72) + f" {ms:8.3f} ms{rate}", flush=True)


def random(batch: int, channels: int, size: tuple[int, ...], layout: torch.memory_format = LAST) -> torch.Tensor:
    x = torch.randn(batch, channels, *size, device=DEVICE, dtype=torch.bfloat16)
    return x.to(memory_format=layout).requires_grad_()


def batch_norms() -> None:
    for channels, size in BATCH_NORMS[: 1 if TINY else None]:
        x = random(BATCH, channels, size)
        bytes_ = 3 * 2 * x.numel()
        name = f"batch norm {channels} {size}"
        stock = nn.BatchNorm3d(channels).to(DEVICE)
        show(f"{name} bf16 channels_last_3d", stock, x, bytes_=bytes_)
        show(f"{name} bf16 in 4-D", FlatBatchNorm(channels).to(DEVICE), x, bytes_=bytes_)
        show(f"{name} bf16 contiguous", stock, x.detach().contiguous().requires_grad_(), bytes_=bytes_)
        show(f"{name} float16 channels_last_3d", stock, x.detach().half().requires_grad_(), bytes_=bytes_)


def convolutions() -> None:
    for inside, outside, kernel, size, stride, dilation, groups in CONVOLUTIONS:
        for title, layout in (("channels_last_3d", LAST), ("contiguous", torch.contiguous_format)):
            padding = dilation * (kernel // 2)
            layer = nn.Conv3d(inside, outside, kernel, stride, padding, dilation, groups, bias=False)
            layer = layer.to(DEVICE, torch.bfloat16, memory_format=layout)
            x = random(BATCH if groups == 1 else max(2, BATCH // 8), inside, size, layout)
            flop = 2 * layer(x).numel() * inside // groups * kernel**3
            show(
                f"conv {inside}->{outside} k{kernel} {size} dilation {dilation} groups {groups} {title}", layer, x, flop
            )


def main() -> None:
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True
    batch_norms()
    if TINY:
        return
    convolutions()
    x = random(BATCH, 64, (48, 48, 16))
    show("max pool 3 stride 2 channels_last_3d", nn.MaxPool3d(3, 2, 1), x, bytes_=2.25 * x.numel())
    x = random(max(1, BATCH // 8), 6, (64, 48, 48))
    show(
        "upsample trilinear (2, 2, 1)", nn.Upsample(scale_factor=(2, 2, 1), mode="trilinear"), x, bytes_=10 * x.numel()
    )


if __name__ == "__main__":
    main()
