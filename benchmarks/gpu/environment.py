"""The machine: versions, memory, and the speed of matrix products, copies, launches and the disk."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PACKAGES = (
    "numpy scipy matplotlib tensorboard psutil yaml jinja2 tqdm monai ignite nibabel blosc2 fire pytorch_optimizer "
    "pgl_ext pgl_ext.engines pgl_ext.tools.study.run triton"
)
SYSTEM = (
    "free -g | sed -n 2p; df -h /dev/shm | tail -1; ulimit -n; lscpu | grep 'Model name'; "
    "nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv,noheader"
)


def timed(call: Callable[[], object], repetitions: int = 10) -> float:
    """Mean seconds of a call, after two that warm up."""
    call(), call()
    _wait()
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    _wait()
    return (time.perf_counter() - start) / repetitions


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def versions() -> None:
    print(sys.version.split()[0], os.uname().release, os.cpu_count(), "cores")
    print(subprocess.run(SYSTEM, shell=True, capture_output=True, text=True).stdout)
    nccl = torch.cuda.nccl.version() if CUDA else None
    print(f"torch {torch.__version__} CUDA {torch.version.cuda} cuDNN {torch.backends.cudnn.version()} NCCL {nccl}")
    for name in PACKAGES.split():
        try:
            print(name, getattr(importlib.import_module(name), "__version__", ""), end="; ")
        except Exception as error:
            print(f"\nMISSING {name}: {type(error).__name__}: {error}")
    print()


def speeds() -> None:
    size = 8192 if CUDA else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    print(f"bf16 matrix product {2 * size**3 / timed(lambda: a @ b) / 1e12:.1f} TFLOP/s")
    source = torch.empty(2**31 if CUDA else 2**24, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    print(f"copy on the device {2 * source.numel() / timed(lambda: target.copy_(source)) / 1e12:.2f} TB/s")
    host = torch.empty(2**27 if CUDA else 2**20, dtype=torch.uint8, pin_memory=CUDA)
    part = source[: host.numel()]
    print(f"host to device {host.numel() / timed(lambda: part.copy_(host, non_blocking=True)) / 1e9:.1f} GB/s")
    one = torch.ones(1, device=DEVICE)
    print(f"launch of a small kernel {1e6 * timed(lambda: one.add_(1), 2000):.1f} us")


def disk() -> None:
    path, count = os.path.join(os.environ["WORK"], "disk"), 200 if CUDA else 20
    start = time.time()
    with open(path, "wb") as file:
        file.write(os.urandom(2**20) * count)
        file.flush()
        os.fsync(file.fileno())
    print(f"{count} MiB to disk {time.time() - start:.1f} s")
    os.remove(path)


if __name__ == "__main__":
    versions()
    speeds()
    disk()
