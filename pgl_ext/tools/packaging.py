"""Bundles to share: each with a copy of this package, so that it runs where the package is not installed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import yaml

from pgl_ext import __version__
from pgl_ext.networks.build import ENCODERS, build
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.bundles import bundle_folder
from pgl_ext.tools.task_config import task_config, write_initial_model
from pgl_ext.weights import EncoderRecord, ModelRecord
from pgl_ext.weights.records import SHA256

__all__ = ["package_bundles"]

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
_PRETRAINING, _SEGMENTATION = "pgl_pretrain", "pgl_segmentation"
_SHARED = ("LICENSE", "configs", "docs")
_HASHES = "SHA256SUMS"
_METADATA = "configs/metadata.json"
_ENCODER = "models/pgl_encoder.pt"
_MODEL = "models/model.pt"  # the name that the zoo and monai.bundle.load look for
_LARGE = 25_000_000  # bytes; larger files are not taken into the Model Zoo's repository


def package_bundles(
    bundles: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    model: str | os.PathLike | None = None,
    encoder: str | os.PathLike | None = None,
    model_url: str | None = None,
    encoder_url: str | None = None,
    data_license: str | os.PathLike | None = None,
    overlays: Sequence[str] = (),
) -> list[Path]:
    """Write bundles as the MONAI Model Zoo takes them; the same input gives the same bytes.

    ``out`` then holds ``models/NAME`` and ``ci/unit_tests/test_NAME.py``, as the zoo's repository does, and
    ``NAME_vVERSION.zip``. In a bundle, ``pgl_ext`` is the package without its tools, and ``SHA256SUMS`` the hash of
    every file, for ``sha256sum --check``, with that of all these lines in its header.

    With a model, an encoder or overlays, the ``train.json`` of pgl_segmentation is that of their task and network, as
    programs need it that take a bundle as it is, such as MONAI Label. With overlays and no model, ``models/model.pt``
    is the network that training would start from: the encoder's weights, where given, and a random decoder.

    Args:
        bundles: folders of bundles; if empty, both that come with the package.
        out: folder to write; packages in it are replaced.
        model: model file of fine-tuning, its JSON beside it: ``models/model.pt`` of pgl_segmentation.
        encoder: encoder file of pre-training, its JSON beside it: ``models/pgl_encoder.pt`` of every bundle, and
            ``models/model.pt`` of pgl_pretrain.
        model_url: where the model can be downloaded: over 25 MB, the Model Zoo's limit, it is then listed in
            ``large_files.yml`` and left out of the package.
        encoder_url: the same of the encoder.
        data_license: text on what the weights were trained on and on what terms; replaces ``docs/data_license.txt``.
        overlays: of pgl_segmentation's ``train.json``, in their order: names in its ``configs``, or paths of others.

    Returns:
        the zip files.

    Raises:
        FileNotFoundError: a folder is no bundle, or a file is missing.
        FileExistsError: in the place of a package lies something else.
        ValueError: version and changelog do not agree with the package's version, or what weights need is not given.
    """
    bundles = bundles or [bundle_folder(name) for name in (_PRETRAINING, _SEGMENTATION)]
    folders = {Path(bundle).resolve().name: Path(bundle).resolve() for bundle in bundles}
    if (model or overlays) and _SEGMENTATION not in folders:
        option = f"--model {model}" if model else f"--overlays {','.join(overlays)}"
        raise ValueError(
            f"{option} belongs to {_SEGMENTATION}, which is not packaged: package it too, or leave it out."
        )
    if (model or encoder) is not None and data_license is None:
        raise ValueError(
            "weights need --data_license FILE: a text that says which data they were trained on, and its terms."
        )
    encoder_weights = _read_weights(encoder, EncoderRecord, encoder_url)
    model_weights = _read_weights(model, ModelRecord, model_url)
    contents = {name: _bundle_files(folder) for name, folder in folders.items()}
    if _SEGMENTATION in folders and (model or encoder or overlays):
        config = task_config(folders[_SEGMENTATION] / "configs", overlays, model, encoder)
        contents[_SEGMENTATION]["configs/train.json"] = _json(config)
        if overlays and model is None:
            with tempfile.TemporaryDirectory() as scratch:
                write_initial_model(config, Path(scratch) / "model.pt", encoder)
                model_weights = _read_weights(Path(scratch) / "model.pt", ModelRecord)
    models = {_PRETRAINING: encoder_weights, _SEGMENTATION: model_weights}
    for name, files in contents.items():
        for path, weights in ((_ENCODER, encoder_weights), (_MODEL, models.get(name))):
            if weights is not None:
                _add_weights(files, path, weights)
        if data_license is not None:
            files["docs/data_license.txt"] = Path(data_license).read_bytes()
    return [_write(folders[name], files, Path(out)) for name, files in contents.items()]


@dataclass(frozen=True)
class _Weights:
    """A file of weights that comes with bundles, its record, and where it can be downloaded."""

    name: str
    content: bytes
    record: EncoderRecord | ModelRecord
    url: str | None


def _read_weights(
    path: str | os.PathLike | None, kind: type[EncoderRecord] | type[ModelRecord], url: str | None = None
) -> _Weights | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file that training wrote.")
    return _Weights(Path(path).name, Path(path).read_bytes(), kind.load(path), url)


def _json(content: Mapping[str, Any]) -> bytes:
    """As the Model Zoo formats it."""
    return (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode()


def _bundle_files(folder: Path) -> dict[str, bytes]:
    """All files of a packaged bundle but its weights, by path.

    The configs find the package beside them by ``$sys.path.insert(1, @bundle_root)``: in ``initialize``, which MONAI
    evaluates first in every workflow (of ``imports`` it evaluates import statements alone), and for ``network_def`` of
    ``inference.json``, which its checks and exports build without a workflow.
    """
    metadata = folder / _METADATA
    if not metadata.is_file():
        raise FileNotFoundError(f"{folder} is not a bundle, it has no configs/metadata.json: give the folder of one.")
    _check_version(metadata)
    package = [path for path in _files_in(_PACKAGE) if not path.startswith("tools/")]
    files = {f"pgl_ext/{path}": (_PACKAGE / path).read_bytes() for path in package}
    for path in _files_in(folder):
        if path.split("/")[0] in _SHARED:
            content = (folder / path).read_bytes()
            files[path] = _json(json.loads(content)) if path.endswith(".json") else content
    return files


def _files_in(folder: Path) -> list[str]:
    """Paths relative to the folder, without what Python and editors leave behind."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in paths if not any(part.startswith((".", "__pycache__")) for part in path.parts)]


def _check_version(path: Path) -> None:
    metadata = json.loads(path.read_text(encoding="utf-8"))
    version, changelog = metadata.get("version"), metadata.get("changelog", {})
    if version != __version__ or __version__ not in changelog:
        raise ValueError(
            f"{path} has version {version} and changes of {', '.join(changelog) or 'no version'}, the package is "
            f"version {__version__}: set version to {__version__} and say in changelog what it brings."
        )


def _add_weights(files: dict[str, bytes], path: str, weights: _Weights) -> None:
    """Put weights and their record into a bundle, and what the model takes and gives into its metadata."""
    sums = {PurePosixPath(path).suffix: hashlib.sha256(weights.content).hexdigest()}
    record = {**_without_folders(weights.record.to_json()), SHA256: sums}
    files[str(PurePosixPath(path).with_suffix(".json"))] = _json(record)
    if path == _MODEL:
        files[_METADATA] = _json(_described(json.loads(files[_METADATA]), weights.record))
    large = len(weights.content) > _LARGE
    if large and weights.url is None:
        logger.warning(
            "%s has %.0f MB, and the Model Zoo takes files over 25 MB by download only: to send the package there, "
            "upload the file and give its address with --model_url or --encoder_url.",
            weights.name,
            len(weights.content) / 1e6,
        )
    if not large or weights.url is None:
        files[path] = weights.content
        return
    digest = hashlib.sha256(weights.content).hexdigest()
    listed = yaml.safe_load(files.get("large_files.yml", b"large_files: []"))
    listed["large_files"].append({"path": path, "url": weights.url, "hash_val": digest, "hash_type": "sha256"})
    files["large_files.yml"] = yaml.safe_dump(listed, sort_keys=False).encode()


def _without_folders(value: Any) -> Any:
    """A record without the folders of the machine that trained, which are nobody else's business."""
    if isinstance(value, Mapping):
        return {name: _without_folders(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    is_path = isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute())
    return PureWindowsPath(value).name if is_path else value


def _described(metadata: dict[str, Any], record: EncoderRecord | ModelRecord) -> dict[str, Any]:
    """The metadata, saying what the weights in ``models/model.pt`` take and give."""
    image = metadata["network_data_format"]["inputs"]["image"]
    pred = metadata["network_data_format"]["outputs"]["pred"]
    channels = record.input.channel_names
    image["num_channels"] = len(channels)
    image["channel_def"] = {str(number): name for number, name in enumerate(channels)}
    if len(channels) > 1:
        image["modality"], image["format"] = ", ".join(channels), "magnitude"
        metadata["image_classes"] = (
            f"volume of {len(channels)} channels, {image['modality']}, each of zero mean and unit standard deviation"
        )
    if isinstance(record, ModelRecord):
        task = SegmentationTask(**record.task)
        names = task.names if task.multi_label else ["background", *task.names]
        image["spatial_shape"] = pred["spatial_shape"] = list(record.input.patch_size)
        pred["num_channels"] = task.out_channels
        pred["channel_def"] = {str(channel): name for channel, name in enumerate(names)}
        if task.label_values != tuple(range(1, len(task.names) + 1)):
            logger.warning(
                "The organs have the label values %s, but MONAI Label, 3D Slicer and OHIF number them 1, 2, 3, ... in "
                "the order of the task: for use there, number them so, in the label maps as well.",
                task.label_values,
            )
        metadata["pred_classes"] = f"one channel each: {', '.join(names)}"
    else:
        with torch.device("meta"):
            encoder = build(ENCODERS, record.architecture, _ENCODER)
        stride, features = encoder.level_strides[-1], encoder.level_channels[-1]
        image["spatial_shape"] = [f"{step}*n" for step in stride]
        pred["num_channels"] = features
        voxels = " x ".join(map(str, stride))
        metadata["pred_classes"] = f"{features} features per position, one every {voxels} voxels"
    return metadata


def _hashes(name: str, files: Mapping[str, bytes]) -> bytes:
    lines = "".join(f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in files.items())
    whole = hashlib.sha256(lines.encode()).hexdigest()
    return f"# {name} {__version__}\n# {whole}: all of the lines below\n{lines}".encode()


def _write(bundle: Path, files: Mapping[str, bytes], out: Path) -> Path:
    """Write folder, zip and unit test of one bundle."""
    folder = out / "models" / bundle.name
    if folder.exists():
        if not (folder / _HASHES).is_file():
            raise FileExistsError(f"{folder} exists and is not a package that could be replaced: choose another --out.")
        shutil.rmtree(folder)
    files = dict(sorted(files.items()))
    files[_HASHES] = _hashes(bundle.name, files)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    test = bundle.parent / "unit_tests" / f"test_{bundle.name}.py"
    if test.is_file():
        (out / "ci" / "unit_tests").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(test, out / "ci" / "unit_tests" / test.name)
    archive = out / f"{bundle.name}_v{__version__}.zip"
    # Not compressed: what compression makes of the same bytes depends on its version.
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for path, content in files.items():
            entry = zipfile.ZipInfo(f"{bundle.name}/{path}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # Unix, rw-r--r--
            file.writestr(entry, content)
    return archive
