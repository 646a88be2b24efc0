"""A session with MONAI Label over REST, as 3D Slicer would have it: segment, label, train, segment again.

    make label-environment
    python benchmarks/monai_label.py DATA_LIST --out FOLDER --encoder PRETRAINED/models/pgl_encoder.pt \
        --overlays tasks/openkbp.yaml,small.yaml

Packages ``pgl_segmentation``, starts a server of ``--label_python`` on a free port of this machine, prints requests and
status codes, trains twice, and says what Dice the model has before and after each training, on cases that it was not
trained on and on the grid of their images. The server ends with this program, and a training with it. Everything is in
``--out``.

Organs are numbered 1, 2, 3, ... in label maps and in the task: 3D Slicer does so, whatever numbers they had.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import yaml

from pgl_ext.data.datalist import labelled_items
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.packaging import package_bundles
from pgl_ext.tools.task_config import task_config

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "pgl_segmentation"
LABEL_PYTHON = ROOT / ".venv-label" / "bin" / "python"
MODEL = BUNDLE.name

# PyPI's torchvision is built for CUDA: beside a torch without CUDA it fails for want of two operators nobody calls.
TORCHVISION = """
try:
    import torchvision
except RuntimeError:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except ImportError:
    pass
"""


class Server:
    """A MONAI Label server at work; prints each request.

    Args:
        url: where it listens.
        device: to infer and train on.
    """

    def __init__(self, url: str, device: str) -> None:
        self.url = url
        self.device = device

    def request(
        self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json"
    ) -> bytes:
        """Send a request; its answer. A status other than 200 is an error."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": content_type}, method=method)
        start = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=1200) as response:
                status, content = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        print(f"{method:4} {path:62} {status} {time.monotonic() - start:6.1f} s", flush=True)
        if status != 200:
            raise RuntimeError(f"{method} {path} answered {status}: {content[:500].decode(errors='replace')}")
        return content

    def form(self, method: str, path: str, params: dict[str, Any], **files: Path) -> bytes:
        """Send a form of parameters and files."""
        boundary = uuid.uuid4().hex
        parts = [('name="params"', json.dumps(params).encode())]
        parts += [(f'name="{name}"; filename="{file.name}"', file.read_bytes()) for name, file in files.items()]
        body = b"".join(
            f"--{boundary}\r\nContent-Disposition: form-data; {header}\r\n\r\n".encode() + content + b"\r\n"
            for header, content in parts
        )
        content_type = f"multipart/form-data; boundary={boundary}"
        return self.request(method, path, body + f"--{boundary}--\r\n".encode(), content_type)

    def info(self) -> dict[str, Any]:
        return json.loads(self.request("GET", "/info/"))

    def segment(self, image: str, out: Path) -> Path:
        """Have an image of the server segmented; the result as a file."""
        answer = self.form("POST", f"/infer/{MODEL}?image={image}&output=image", {"device": self.device})
        out.write_bytes(answer)
        return out

    def upload_label(self, image: str, label: Path) -> None:
        self.form("PUT", f"/datastore/label?image={image}&tag=final", {}, label=label)

    def next_sample(self, strategy: str = "random") -> str:
        """The image that active learning wants labelled next."""
        return json.loads(self.request("POST", f"/activelearning/{strategy}", b"{}"))["id"]

    def train(self, **params: Any) -> None:
        """Train and wait for the end, as Slicer does: in a process of its own, asking now and then."""
        params = {"model": MODEL, "device": self.device, "multi_gpu": False, "tracking": "None", **params}
        self.request("POST", f"/train/{MODEL}", json.dumps(params).encode())
        while True:
            with urllib.request.urlopen(f"{self.url}/train/", timeout=60) as response:
                task = json.loads(response.read())
            if task["status"] not in ("SUBMITTED", "RUNNING"):
                break
            time.sleep(1)
        print(f"     training {task['status']}, {task['start_ts']} to {task['end_ts']}", flush=True)
        if task["status"] != "DONE":
            raise RuntimeError("training failed:\n" + "\n".join(task["details"]))


@contextlib.contextmanager
def running_server(folder: Path, label_python: Path, device: str) -> Iterator[Server]:
    """Start a server of the app and the images in a folder; when done, end it and all that it has started."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(TORCHVISION)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["start_server", "--app", folder / "monaibundle", "--studies", folder / "images"]
    arguments += ["--host", "127.0.0.1", "--port", port]
    arguments += ["--conf", "models", MODEL, "--conf", "zoo_source", "local", "--conf", "sam2", "false"]
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [str(label_python), "-m", "monailabel.main", *map(str, arguments)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(folder / "site")},
            start_new_session=True,  # a group of processes, by whose number all of them can be ended
        )
    print(f"server {process.pid} at http://127.0.0.1:{port}", flush=True)
    try:
        _wait_until_it_listens(process, port, folder / "server.log")
        yield Server(f"http://127.0.0.1:{port}", device)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        print(f"server {process.pid} ended", flush=True)


def _wait_until_it_listens(process: subprocess.Popen, port: int, log: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the server does not listen, see {log}:\n{log.read_text(errors='replace')[-3000:]}")


def install(
    folder: Path, label_python: Path, overlays: Sequence[str], encoder: Path, data_license: str
) -> tuple[SegmentationTask, SegmentationTask]:
    """Package the bundle into MONAI Label's app; the task as it is in the data, and as it is there."""
    folder.mkdir(parents=True)
    config = task_config(BUNDLE / "configs", overlays)
    original = SegmentationTask(config["organs"], config["background_values"], config["multi_label"])
    numbered = {name: number for number, name in enumerate(original.names, 1)}
    (folder / "numbered.yaml").write_text(
        yaml.safe_dump({"organs": numbered, "background_values": [0]}, sort_keys=False)
    )
    (folder / "license.txt").write_text(f"{data_license}\n")
    package_bundles(
        [BUNDLE],
        folder / "dist",
        encoder=encoder,
        data_license=folder / "license.txt",
        overlays=[*overlays, str(folder / "numbered.yaml")],
    )
    command = [label_python, "-m", "monailabel.main", "apps", "--download", "--name", "monaibundle", "--output", folder]
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(TORCHVISION)
    subprocess.run(
        list(map(str, command)),
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(folder / "site")},
    )
    shutil.copytree(folder / "dist" / "models" / MODEL, folder / "monaibundle" / "model" / MODEL)
    return original, SegmentationTask(numbered, [0])


def add_cases(folder: Path, cases: Sequence[dict], task: SegmentationTask) -> dict[str, Path]:
    """Put images where the server finds them, and beside that label maps with numbered organs, by name of the image."""
    labels = {}
    for name in ("images", "labels"):
        (folder / name).mkdir(exist_ok=True)
    for case in cases:
        name = Path(case["image"]).name.removesuffix(".gz").removesuffix(".nii")
        shutil.copyfile(case["image"], folder / "images" / f"{name}.nii.gz")
        label = nib.load(case["label"])
        voxels = np.asarray(label.dataobj)
        numbered = np.zeros(voxels.shape, np.uint8)
        for number, values in enumerate(task.organs.values(), 1):
            numbered[np.isin(voxels, values)] = number
        labels[name] = folder / "labels" / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(numbered, label.affine), labels[name])
    return labels


def mean_dice(predictions: dict[str, Path], labels: dict[str, Path], organs: int) -> list[float]:
    """Of each organ, over the cases; predictions must lie on the grids of the label maps."""
    scores = []
    for name, path in predictions.items():
        prediction, label = nib.load(path), nib.load(labels[name])
        if prediction.shape != label.shape or not np.allclose(prediction.affine, label.affine, atol=1e-3):
            raise RuntimeError(
                f"{path} has shape {prediction.shape} and affine {prediction.affine.tolist()}, its image has "
                f"{label.shape} and {label.affine.tolist()}."
            )
        found, expected = np.asarray(prediction.dataobj), np.asarray(label.dataobj)
        both = [(found == number, expected == number) for number in range(1, organs + 1)]
        scores.append([2 * (a & b).sum() / total if (total := a.sum() + b.sum()) else np.nan for a, b in both])
    return np.nanmean(scores, axis=0).tolist()


def loaded(folder: Path) -> list[str]:
    """What the server's log says of the weights that trainings began with."""
    lines = (folder / "server.log").read_text(errors="replace").splitlines()
    return [line[line.index("loading weights") :].split("; missing")[0] for line in lines if "loading weights" in line]


def session(
    data_list: str,
    out: str,
    encoder: str,
    overlays: str,
    cases: int = 8,
    test_cases: int = 3,
    key: str = "training",
    test_key: str = "validation",
    max_epochs: int = 20,
    device: str = "cpu",
    label_python: str = str(LABEL_PYTHON),
    data_license: str = "see the README of the data",
) -> dict[str, Any]:
    """Run the session.

    Args:
        data_list: Decathlon-style JSON with labelled cases.
        out: folder to make.
        encoder: encoder file of pre-training.
        overlays: of train.json, with commas between them.
        cases: to label, half of them before the first training and half before the second; the first of the list.
        test_cases: to compute Dice of, never labelled; the first of their list.
        key: list of the cases to label.
        test_key: list of the others.
        max_epochs: of each training.
        device: to infer and train on.
        label_python: Python in whose environment MONAI Label is installed.
        data_license: what the weights were trained on.

    Returns:
        ``dice``: mean Dice over cases and organs, before training and after each, ``organs``: the same by organ,
        ``loaded``: what the log says of the weights that trainings began with, ``info``: the server's answer.
    """
    names = overlays.split(",") if isinstance(overlays, str) else overlays
    folder = Path(out).resolve()
    task, numbered = install(folder, Path(label_python).absolute(), names, Path(encoder).resolve(), data_license)
    labels = add_cases(folder, labelled_items(data_list, key=key)[:cases], task)
    references = add_cases(folder, labelled_items(data_list, key=test_key)[:test_cases], task)
    results: dict[str, Any] = {"dice": [], "organs": []}
    with running_server(folder, Path(label_python).absolute(), device) as server:

        def evaluate(title: str) -> None:
            (folder / title).mkdir()
            found = {name: server.segment(name, folder / title / f"{name}.nii.gz") for name in references}
            organs = mean_dice(found, references, len(task.names))
            results["organs"].append(dict(zip(task.names, organs, strict=True)))
            results["dice"].append(float(np.mean(organs)))
            details = ", ".join(f"{name} {score:.3f}" for name, score in results["organs"][-1].items())
            print(f"     Dice {title}: {results['dice'][-1]:.3f} ({details})", flush=True)

        results["info"] = server.info()
        shown = {name: results["info"]["models"][MODEL][name] for name in ("type", "labels")}
        print(f"     {json.dumps(shown)}")
        evaluate("before")
        half = list(labels)[: (len(labels) + 1) // 2]
        for name in half:
            server.upload_label(name, labels[name])
        results["next_sample"] = server.next_sample()
        print(f"     next: {results['next_sample']}")
        server.train(model_filename="pgl_encoder.pt", pretrained=True, max_epochs=max_epochs, val_split=0.2)
        evaluate("after")
        for name in list(labels)[len(half) :]:
            server.upload_label(name, labels[name])
        server.train(model_filename="model.pt", pretrained=True, max_epochs=max_epochs, val_split=0.2)
        evaluate("after_the_second_training")
    results["loaded"] = loaded(folder)
    print("\n".join(results["loaded"]))
    results["labelled"] = half
    results["numbered"] = dict(zip(numbered.names, numbered.label_values, strict=True))
    return results


if __name__ == "__main__":
    # As an interruption from the keyboard does: with the server's end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    fire.Fire(lambda *arguments, **settings: session(*arguments, **settings) and None)
