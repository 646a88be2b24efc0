"""An encoder file in 8 bit per output channel: python encoder8.py pack ENCODER.pt FOLDER, or unpack FOLDER OUT.pt.

Parts of at most 15 MiB, and ``encoder.json``, the record: what fits through narrow ways back.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import torch

PART = 15 * 2**20  # bytes


def pack(path: str, folder: str) -> None:
    """Quantise every convolution to whole numbers from -127 to 127 times a scale per output channel."""
    arrays, worst = {}, 0.0
    for key, value in torch.load(path, map_location="cpu", weights_only=True).items():
        if value.ndim <= 1:
            arrays[f"whole:{key}"] = value.numpy()
            continue
        flat = value.float().flatten(1)
        scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        quantised = (flat / scale).round().clamp(-127, 127).to(torch.int8)
        worst = max(worst, float((quantised * scale - flat).norm() / flat.norm().clamp_min(1e-12)))
        arrays |= {f"quantised:{key}": quantised.numpy(), f"scale:{key}": scale.numpy(), f"shape:{key}": value.shape}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    content = buffer.getvalue()
    for number, start in enumerate(range(0, len(content), PART)):
        (Path(folder) / f"encoder_int8.part{number:02}").write_bytes(content[start : start + PART])
    record = Path(path).with_suffix(".json")
    if record.is_file():
        (Path(folder) / "encoder.json").write_text(record.read_text())
    print(f"{len(content) / 2**20:.1f} MiB, largest relative error of a tensor {worst:.4f}")


def unpack(folder: str, out: str) -> None:
    """Write the encoder file again."""
    content = b"".join(path.read_bytes() for path in sorted(Path(folder).glob("encoder_int8.part*")))
    arrays = np.load(io.BytesIO(content))
    state = {}
    for name in arrays.files:
        kind, key = name.split(":", 1)
        if kind == "whole":
            state[key] = torch.from_numpy(arrays[name])
        elif kind == "quantised":
            flat = torch.from_numpy(arrays[name]).float() * torch.from_numpy(arrays[f"scale:{key}"])
            state[key] = flat.view(*arrays[f"shape:{key}"].tolist())
    torch.save(state, out)
    print(len(state), "tensors")


if __name__ == "__main__":
    {"pack": pack, "unpack": unpack}[sys.argv[1]](*sys.argv[2:])
