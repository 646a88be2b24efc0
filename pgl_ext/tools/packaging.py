"""Bundles to share: each with a copy of this package, so that it runs where the package is not installed."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pgl_ext import __version__
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.task_config import task_config, write_start_model
from pgl_ext.weights import read_description

__all__ = ["package_bundles", "rewrite_config", "rewrite_module", "rewrite_text"]

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
_BUNDLES = [_PACKAGE.parent / "bundles" / name for name in ("pgl_pretrain", "pgl_segmentation")]
_SHARED = ("LICENSE", "configs", "docs")
_HASHES = "SHA256SUMS"
_TEXT_SUFFIXES = {".py", ".html", ".json", ".yaml", ".md", ".txt", ".conf"}
_LARGE = 25_000_000  # bytes; larger files are not taken into the Model Zoo's repository
_SEGMENTATION = "pgl_segmentation"

# A dotted name such as pgl_ext.losses, or the command; not what is in scripts already, and no path.
_NAME = re.compile(r"(?<![\w./])pgl_ext(?=\.[a-z])|(?<=python -m )pgl_ext\b")

# MONAI puts a bundle's folder on the path no sooner than it runs it, but components are wanted without a run too; and
# where another bundle's `scripts` has been imported, the code is found in that one only if told where else to look.
_FIND_SCRIPTS = [
    "$sys.path.insert(1, @bundle_root)",
    "$getattr(sys.modules.get('scripts'), '__path__', []).append(@bundle_root + '/scripts')",
]


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
    ``NAME_vVERSION.zip``. In a bundle, ``scripts/pgl_ext`` is the package, and ``SHA256SUMS`` the hash of every file,
    for ``sha256sum --check``, with that of all these lines in its header.

    With a model, an encoder or overlays, the ``train.json`` of pgl_segmentation is that of their task and network, as
    programs need it that take a bundle as it is, such as MONAI Label. With overlays and no model, ``models/model.pt``
    is the network that training would start from: the encoder's weights, where given, and a random decoder.

    Args:
        bundles: folders of bundles; if empty, both of the repository.
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
    folders = [Path(bundle).resolve() for bundle in bundles or _BUNDLES]
    if (model or overlays) and all(folder.name != _SEGMENTATION for folder in folders):
        option = f"--model {model}" if model else f"--overlays {','.join(overlays)}"
        raise ValueError(
            f"{option} belongs to {_SEGMENTATION}, which is not packaged: package it too, or leave it out."
        )
    if (model or encoder) is not None and data_license is None:
        raise ValueError(
            "weights need --data_license FILE: a text that says which data they were trained on, and its terms."
        )
    for weights in (model, encoder):
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"{weights} does not exist: give a file that training wrote.")
    contents = {}
    with tempfile.TemporaryDirectory() as scratch:
        for folder in folders:
            files = _bundle_files(folder)
            if folder.name == _SEGMENTATION and (overlays or model or encoder):
                config = task_config(folder / "configs", overlays, model, encoder)
                files["configs/train.json"] = rewrite_config(json.dumps(config)).encode()
                if model is None and overlays:
                    model = Path(scratch) / "model.pt"
                    write_start_model(config, model, encoder)
            for path, source, url in _weights(folder.name, model, encoder, model_url, encoder_url):
                _add_weights(files, path, Path(source), url)
            if data_license is not None:
                files["docs/data_license.txt"] = Path(data_license).read_bytes()
            contents[folder] = {**dict(sorted(files.items())), _HASHES: _hashes(folder.name, files)}
    return [_write(folder, files, Path(out)) for folder, files in contents.items()]


def rewrite_module(source: str, path: str | os.PathLike) -> str:
    """A module of this package, with imports that find the others wherever the package lies.

    Args:
        source: its text.
        path: where it lies in the package, such as ``data/cache.py``.

    Raises:
        ValueError: an import of the package is written in a way that has no relative form.
    """
    dots = "." * len(PurePosixPath(path).parts)
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            old, new = re.compile(r"from pgl_ext\b\.?"), f"from {dots}"
            modules = [node.module]
        elif isinstance(node, ast.Import):
            old, new = re.compile(r"import pgl_ext$"), f"from {dots}. import pgl_ext"
            modules = [alias.name for alias in node.names]
        else:
            continue
        if not any(f"{module}.".startswith("pgl_ext.") for module in modules):
            continue
        line, start = lines[node.lineno - 1], node.col_offset
        rewritten, count = old.subn(new, line[start:], count=1)
        if not count:
            raise ValueError(f"{path}, line {node.lineno}: {line.strip()!r} has no relative form: import with 'from'.")
        lines[node.lineno - 1] = line[:start] + rewritten
    return rewrite_text("".join(lines))


def rewrite_text(text: str) -> str:
    """Names and commands in a text, as they are in a packaged bundle: ``scripts.pgl_ext.NAME``."""
    return _NAME.sub("scripts.pgl_ext", text)


def rewrite_config(text: str) -> str:
    """A JSON config, with the targets in ``scripts`` and, where it initialises something, ``scripts`` found first."""
    config = json.loads(rewrite_text(text))
    if "initialize" in config and config["initialize"][:2] != _FIND_SCRIPTS:
        config["initialize"] = [*_FIND_SCRIPTS, *config["initialize"]]
        if "$import sys" not in config["imports"]:
            config["imports"].append("$import sys")
    return _json(config)


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=4, ensure_ascii=False) + "\n"


def _bundle_files(folder: Path) -> dict[str, bytes]:
    """All files of a packaged bundle but its weights, by path."""
    metadata = folder / "configs" / "metadata.json"
    if not metadata.is_file():
        raise FileNotFoundError(f"{folder} is not a bundle, it has no configs/metadata.json: give the folder of one.")
    _check_version(metadata)
    files = {"scripts/__init__.py": b""}
    for path in _files_in(_PACKAGE):
        files[f"scripts/pgl_ext/{path}"] = _rewritten(_PACKAGE / path, path)
    shared = (path for path in _files_in(folder) if path.split("/")[0] in _SHARED)
    return files | {path: _rewritten(folder / path, path) for path in shared}


def _files_in(folder: Path) -> list[str]:
    """Paths relative to the folder, without what Python and editors leave behind."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in paths if not any(part.startswith((".", "__pycache__")) for part in path.parts)]


def _rewritten(file: Path, path: str) -> bytes:
    if file.suffix not in _TEXT_SUFFIXES:
        return file.read_bytes()
    # Bytes, so that line ends stay those of the file, on every system.
    text = file.read_bytes().decode()
    if file.suffix == ".py":
        return rewrite_module(text, path).encode()
    return (rewrite_config(text) if file.suffix == ".json" else rewrite_text(text)).encode()


def _check_version(path: Path) -> None:
    metadata = json.loads(path.read_text(encoding="utf-8"))
    version, changelog = metadata.get("version"), metadata.get("changelog", {})
    if version != __version__ or __version__ not in changelog:
        raise ValueError(
            f"{path} has version {version} and changes of {', '.join(changelog) or 'no version'}, the package is "
            f"version {__version__}: set version to {__version__} and say in changelog what it brings."
        )


def _weights(
    name: str,
    model: str | os.PathLike | None,
    encoder: str | os.PathLike | None,
    model_url: str | None,
    encoder_url: str | None,
) -> list[tuple[str, str | os.PathLike, str | None]]:
    """(path in the bundle, file, URL) of each file of weights."""
    weights = [("models/pgl_encoder.pt", encoder, encoder_url)]
    if name == _SEGMENTATION:
        weights.append(("models/model.pt", model, model_url))
    if name == "pgl_pretrain":
        # The zoo and monai.bundle.load look for this name.
        weights.append(("models/model.pt", encoder, encoder_url))
    return [entry for entry in weights if entry[1] is not None]


def _add_weights(files: dict[str, bytes], path: str, source: Path, url: str | None) -> None:
    """Put weights and their JSON into a bundle, and what they are into its metadata."""
    # Folders of the machine that trained are nobody else's business.
    description = {
        key: Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
        for key, value in read_description(source).items()
    }
    files[str(PurePosixPath(path).with_suffix(".json"))] = _json(description).encode()
    if path == "models/model.pt":
        metadata = json.loads(files["configs/metadata.json"])
        _describe(metadata, description)
        files["configs/metadata.json"] = _json(metadata).encode()
    large = source.stat().st_size > _LARGE
    if large and url is None:
        logger.warning(
            "%s has %.0f MB, and the Model Zoo takes files over 25 MB by download only: to send the package there, "
            "upload the file and give its address with --model_url or --encoder_url.",
            source.name,
            source.stat().st_size / 1e6,
        )
    if not large or url is None:
        files[path] = source.read_bytes()
        return
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    listed = yaml.safe_load(files.get("large_files.yml", b"large_files: []"))
    listed["large_files"].append({"path": path, "url": url, "hash_val": digest, "hash_type": "sha256"})
    files["large_files.yml"] = yaml.safe_dump(listed, sort_keys=False).encode()


def _describe(metadata: dict[str, Any], description: Mapping[str, Any]) -> None:
    """Say in the metadata what the weights in ``models/model.pt`` take and give."""
    image = metadata["network_data_format"]["inputs"]["image"]
    pred = metadata["network_data_format"]["outputs"]["pred"]
    if "task" in description:
        task = SegmentationTask(**description["task"])
        names = task.names if task.multi_label else ["background", *task.names]
        image["spatial_shape"] = pred["spatial_shape"] = list(description["patch_size"])
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
        stride = description["stride"]
        image["spatial_shape"] = [f"{step}*n" for step in stride]
        pred["num_channels"] = description["channels"][-1]
        metadata["pred_classes"] = (
            f"{pred['num_channels']} features per position, one every {' x '.join(map(str, stride))} voxels"
        )


def _hashes(name: str, files: Mapping[str, bytes]) -> bytes:
    lines = "".join(f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in sorted(files.items()))
    whole = hashlib.sha256(lines.encode()).hexdigest()
    return f"# {name} {__version__}\n# {whole}: all of the lines below\n{lines}".encode()


def _write(bundle: Path, files: Mapping[str, bytes], out: Path) -> Path:
    """Write folder, zip and unit test of one bundle."""
    folder = out / "models" / bundle.name
    if folder.exists():
        if not (folder / _HASHES).is_file():
            raise FileExistsError(f"{folder} exists and is not a package that could be replaced: choose another --out.")
        shutil.rmtree(folder)
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
