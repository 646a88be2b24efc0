"""The same weights and batch on the CPU in float64, and on the device in float32 and as trained: relative errors."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from pgl_ext.methods import PGL
from pgl_ext.networks import ResNetEncoder, SegmentationNet
from pgl_ext.networks.build import prepare_network
from pgl_ext.retrieval import correspondence_retrieval
from pgl_ext.segmentation.losses import SegmentationLoss
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms import RandBatchBlur, RandBatchBrightness, RandBatchGamma, RandOverlappingViewsd

ENCODER = {"layers": (1, 1, 1, 1), "widen_factor": 0.25} if os.environ.get("TINY") == "1" else {}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VIEW = (48, 48, 16)
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference as a share of the reference's."""
    value, reference = value.double().cpu(), reference.double().cpu()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


def row(name: str, compute: Callable[[], dict[str, float]]) -> None:
    """Print what a comparison gives, or that it failed."""
    try:
        print(name.ljust(40), "  ".join(f"{key} {value:.2e}" for key, value in compute().items()), flush=True)
    except Exception as error:
        print("FAILED", name, type(error).__name__, error, flush=True)


def smooth(*shape: int) -> torch.Tensor:
    coarse = torch.randn(*shape[:2], *(max(2, n // 8) for n in shape[2:]))
    return torch.nn.functional.interpolate(coarse, size=shape[2:], mode="trilinear")


def pretraining_step(
    batch: dict, device: str, dtype: torch.dtype, channels_last: bool = False, amp: bool = False
) -> tuple[torch.Tensor, ...]:
    """Loss, gradients of an early and a late layer, and batch-norm statistics of one step of PGL."""
    torch.manual_seed(1)
    method = prepare_network(PGL(ResNetEncoder(**ENCODER), 256, 64), device, channels_last)
    views = batch["views"].to(device)
    if dtype == torch.float64:
        method, views = method.double(), views.double()
    with torch.autocast(device, dtype=dtype if amp else torch.bfloat16, enabled=amp):
        output = method({"views": views, "affines": batch["affines"]})
    output["loss"].backward()
    encoder = method.encoder
    gradients = encoder.layer1[0].conv1.weight.grad, encoder.layer4[-1].conv2.weight.grad
    return output["loss"].detach(), *gradients, encoder.bn1.running_var


def compare_pretraining(batch: dict) -> None:
    reference = pretraining_step(batch, "cpu", torch.float64)
    names = ("loss", "gradient of stage 1", "gradient of stage 4", "batch norm")
    settings = [("float32", torch.float32, False), ("float32, channels last", torch.float32, True)]
    settings += [(f"{name}, channels last", dtype, True) for name, dtype in HALF.items()]
    for name, dtype, channels_last in settings:

        def compute(dtype: torch.dtype = dtype, channels_last: bool = channels_last) -> dict[str, float]:
            values = pretraining_step(batch, DEVICE, dtype, channels_last, amp=dtype != torch.float32)
            return {key: relative(*pair) for key, *pair in zip(names, values, reference, strict=True)}

        row(f"PGL, {name}", compute)


def segmentation_step(
    image: torch.Tensor, label: torch.Tensor, device: str, dtype: torch.dtype, channels_last: bool, amp: bool
) -> tuple[torch.Tensor, ...]:
    """Logits, loss, and gradients of head and stem."""
    torch.manual_seed(2)
    network = prepare_network(SegmentationNet(1, 3, encoder=ENCODER or None), device, channels_last)
    image = image.to(device)
    if dtype == torch.float64:
        network, image = network.double(), image.double()
    with torch.autocast(device, dtype=dtype if amp else torch.bfloat16, enabled=amp):
        logits = network(image)
    criterion = SegmentationLoss(SegmentationTask({"a": [1], "b": [2]}))
    loss = criterion(logits if dtype == torch.float64 else logits.float(), {"label": label.to(device)})
    loss.backward()
    return logits.detach(), loss.detach(), network.decoder.head.weight.grad, network.encoder.conv1.weight.grad


def compare_segmentation() -> None:
    base = smooth(2, 1, 48, 48, 24)
    image, label = base + 0.3 * torch.randn(base.shape), (base > 0.3).float() + (base > 0.8).float()
    reference = segmentation_step(image, label, "cpu", torch.float64, False, False)
    names = ("logits", "loss", "gradient of head", "gradient of stem")
    for name, dtype, channels_last in (
        ("float32", torch.float32, False),
        ("float32, channels last", torch.float32, True),
        ("bfloat16, channels last", torch.bfloat16, True),
    ):

        def compute(dtype: torch.dtype = dtype, channels_last: bool = channels_last) -> dict[str, float]:
            values = segmentation_step(image, label, DEVICE, dtype, channels_last, dtype != torch.float32)
            return {key: relative(*pair) for key, *pair in zip(names, values, reference, strict=True)}

        row(f"segmentation, {name}", compute)


def main() -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    torch.manual_seed(0)
    transform = RandOverlappingViewsd("image", VIEW).set_random_state(0)
    samples = [transform({"image": smooth(1, 1, 90, 90, 40)[0]}) for _ in range(4)]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in ("views", "affines")}
    compare_pretraining(batch)
    compare_segmentation()
    flat = batch["views"].flatten(0, 1)
    for transform in (RandBatchBlur(1.0), RandBatchBrightness(1.0), RandBatchGamma(1.0)):
        on_device, on_cpu = (transform.set_random_state(5)(flat.to(device)) for device in (DEVICE, "cpu"))
        print(type(transform).__name__.ljust(40), f"difference {relative(on_device, on_cpu):.2e}", flush=True)
    features = torch.randn(4, 2, 32, 3, 3, 2)
    on_device, on_cpu = (
        correspondence_retrieval(features.to(device), batch["affines"], VIEW).cpu() for device in (DEVICE, "cpu")
    )
    print("retrieval".ljust(40), f"difference {float((on_device - on_cpu).abs().max()):.2e}", flush=True)


if __name__ == "__main__":
    main()
