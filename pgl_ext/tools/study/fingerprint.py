"""The code, settings and data that a cell is the result of, so that cells of different ones are never compared."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import pgl_ext
from pgl_ext.data.datalist import load_datalist
from pgl_ext.tools.study.cells import Cell
from pgl_ext.tools.study.configs import flat, merged_config

__all__ = ["check_cells", "code_digests", "differences", "fingerprint"]

_PACKAGES = ("torch", "monai", "pytorch-ignite", "pytorch-optimizer", "numpy", "scipy")
# What only draws, reports, or runs other programs.
_NO_EFFECT_CODE = (
    *("figures/", "probes/", "study/", "__main__.py", "compare.py", "dicom_seg.py", "errors.py", "feature_maps.py"),
    *("packaging.py", "point_similarity.py", "report.py", "segment.py", "summary.py", "task_config.py", "tracking.py"),
)
# Where things lie, and what changes speed or records alone. Data lists and encoders count by their content.
_NO_EFFECT_SETTINGS = {
    *("bundle_root", "output_dir", "cache_dir", "model_path", "data_list_file_path", "dataset_dir"),
    *("pretrained_encoder", "pretrained_decoder", "resume", "overwrite"),
    *("num_workers", "memory_limit_gib", "log_interval", "checkpoint_interval", "keep_last", "picture_interval"),
    *("in_monai_label", "mlflow", "experiment_name", "run_name"),
}
_LISTED = 8


def fingerprint(cell: Cell, code: Mapping[str, str]) -> dict[str, Any]:
    """All that a cell's result depends on, as JSON has it.

    Args:
        cell: finished or not.
        code: from :func:`code_digests`.

    Returns:
        ``code`` (digest by file), ``versions``, ``settings`` (values by command and id), ``data`` (digests of the data
        lists and of the sizes of what they name) and ``encoder`` (digest of the settings of the pre-training, or of the
        encoder file; None: random weights).
    """
    versions = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: version(name) for name in _PACKAGES},
        "device": "GPU" if torch.cuda.is_available() else "CPU",
    }
    found = {"code": dict(code), "versions": versions, **_input(cell), "encoder": _encoder_digest(cell)}
    return json.loads(json.dumps(found))


def _input(cell: Cell) -> dict[str, dict[str, Any]]:
    settings, data = {}, {}
    for stage in cell.stages:
        config = merged_config(stage.layers).config
        kept = {name: value for name, value in config.items() if name not in _NO_EFFECT_SETTINGS}
        settings |= {f"{stage.section} {name}": value for name, value in flat(kept)}
        settings[f"{stage.section} with decoder"] = config.get("pretrained_decoder") is not None
        data[stage.section] = _data_digest(
            *(config[name] for name in ("data_list_file_path", "dataset_dir", "data_list_key")),
            ("image",) if cell.is_pretraining else ("image", "label"),
        )
    return {"settings": settings, "data": data}


def _data_digest(
    data_list: str | Sequence[str] | None, folder: str | None, key: str, used: tuple[str, ...]
) -> str | None:
    """Digest of a data list and the sizes of what is used; without one, of the names and sizes of a folder's files."""
    if data_list is not None:
        paths = (data_list,) if isinstance(data_list, str) else tuple(data_list)
        content = _digest(b"".join(Path(path).read_bytes() for path in paths))
        return _digest(content + _sizes_digest(paths, folder, key, used, content))
    if folder is None:
        return None
    files = _files(Path(folder))
    return _digest(json.dumps(sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files)))


@functools.lru_cache
def _sizes_digest(paths: tuple[str, ...], folder: str | None, key: str, used: tuple[str, ...], content: str) -> str:
    """Kept while the lists' ``content`` is the same: thousands of files for every cell would take long."""
    items = load_datalist(paths, folder, key, keep=["label"])
    return _digest(json.dumps([[_size(item.get(name)) for name in used] for item in items]))


def _size(path: str | None) -> int | None:
    """Bytes of a file, or of the files of a DICOM series' folder; None where there is nothing."""
    if not isinstance(path, str) or not os.path.exists(path):
        return None
    return sum(file.stat().st_size for file in _files(Path(path))) if os.path.isdir(path) else os.path.getsize(path)


def _files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, which come and go."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def _encoder_digest(cell: Cell) -> str | None:
    if cell.is_pretraining:
        return None
    if cell.pretraining is not None:
        return _digest(json.dumps(_input(cell.pretraining), sort_keys=True))
    encoder = merged_config(cell.stages[0].layers)["pretrained_encoder"]
    return None if encoder is None else _digest(Path(encoder).read_bytes())


def code_digests(folder: Path | None = None) -> dict[str, str]:
    """Digest of the code of every module that can change a result, whatever its comments and docstrings.

    Args:
        folder: of the package; by default that of this one.

    Returns:
        by path within the package.
    """
    folder = Path(pgl_ext.__file__).parent if folder is None else folder
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    return {name: _code_digest(folder / name) for name in names if not name.startswith(_NO_EFFECT_CODE)}


def _code_digest(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [part for part in node.body if not _is_text(part)]
    return _digest(ast.dump(tree))


def _is_text(node: ast.stmt) -> bool:
    """A docstring, or another text that stands by itself."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two fingerprints differ, in words."""
    # A module that is new changes nothing, unless one that was there, or a setting, has come to use it.
    changed = [name for name, digest in before["code"].items() if now["code"].get(name) != digest]
    found = [f"code of {', '.join(changed)}"] if changed else []
    for group in ("versions", "settings"):
        first, second = before[group], now[group]
        found += [f"{name}: {first.get(name)!r} -> {second.get(name)!r}" for name in _changed(first, second)]
    found += [f"the data for {name}" for name in _changed(before["data"], now["data"])]
    if before["encoder"] != now["encoder"]:
        found.append("the encoder that it starts from")
    return found


def _changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]


def check_cells(cells: Iterable[Cell], fingerprints: Mapping[str, Mapping[str, Any]]) -> None:
    """Make sure that all cells that were started are of the present code and settings.

    Args:
        cells: of the study.
        fingerprints: as they are now, by the cell's name.

    Raises:
        ValueError: some are not; the message lists them and what differs.
    """
    outdated: dict[tuple[str, ...], list[str]] = {}
    for cell in cells:
        started = cell.fingerprint()
        found = () if started is None else tuple(differences(started, fingerprints[cell.name]))
        if found:
            outdated.setdefault(found, []).append(cell.name)
    if outdated:
        parts = [f"{_listed(names)}\n" + _listed(found, "    ") for found, names in outdated.items()]
        raise ValueError(
            "these cells were started with other code or settings than now:\n" + "\n".join(parts) + "\n"
            "Results of different versions are not compared: give another --out, remove the folders of these cells to "
            "run them again, or go back to the code and settings that they were started with."
        )


def _listed(texts: Iterable[str], indent: str = "  ") -> str:
    texts = list(texts)
    more = [f"and {len(texts) - _LISTED} more"] if len(texts) > _LISTED else []
    return "\n".join(indent + text for text in [*texts[:_LISTED], *more])
