"""The code, settings and data that a run is the result of, so that runs of different ones are never compared."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from monai.utils import ensure_tuple

from pgl_ext.code_digest import code_digests, digest
from pgl_ext.data.datalist import load_datalist
from pgl_ext.errors import few
from pgl_ext.settings import flat_entries
from pgl_ext.tools.study.configs import changed
from pgl_ext.tools.study.runs import Run

__all__ = ["checked_fingerprints", "differences", "fingerprint"]

_PACKAGES = ("torch", "monai", "pytorch-ignite", "pytorch-optimizer", "numpy", "scipy")
# Where things lie, and what changes speed or records alone. Data lists and encoders count by their content.
_NO_EFFECT_SETTINGS = (
    "bundle_root", "output_dir", "cache_dir", "model_path", "data_list_file_path", "dataset_dir",
    "pretrained_encoder", "pretrained_decoder", "resume", "overwrite",
    "num_workers", "memory_limit_gib", "log_interval", "checkpoint_interval", "keep_last", "picture_interval",
    "in_monai_label",
)  # fmt: skip
_CODE_NAME = re.compile(r"\bpgl_ext(?:\.\w+)+")
_LISTED = 8
_LINE = "\n  "


def fingerprint(run: Run) -> dict[str, Any]:
    """All that a run's result depends on, as JSON has it. Files are read anew each time.

    Args:
        run: finished or not.

    Returns:
        ``code`` (digests by module, of those that the configs of the run and of its pre-training name, and of what
        these import), ``versions``, ``settings`` (values by command and id), ``data`` (digests of the data lists and
        of the sizes of what they name) and ``encoder`` (digest of settings and data of the pre-training, or of the
        encoder file; None: random weights).
    """
    versions = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: version(name) for name in _PACKAGES},
        "device": "GPU" if torch.cuda.is_available() else "CPU",
    }
    *pretraining, inputs = [_inputs(part) for part in run.with_pretraining]
    settings = [value for part in (*pretraining, inputs) for value in part["settings"].values()]
    code = code_digests(name for value in settings if isinstance(value, str) for name in _CODE_NAME.findall(value))
    encoder = digest(json.dumps(pretraining, sort_keys=True)) if pretraining else _encoder_digest(run)
    return json.loads(json.dumps({"code": code, "versions": versions, **inputs, "encoder": encoder}))


def _inputs(run: Run) -> dict[str, dict[str, Any]]:
    settings, data = {}, {}
    for command in run.commands:
        config = command.config().get()
        for name, value in flat_entries(config, lists=True).items():
            if name.split("#")[0] not in _NO_EFFECT_SETTINGS and "_desc_" not in name:
                settings[f"{command.section} {name}"] = value
        settings[f"{command.section} with decoder"] = config.get("pretrained_decoder") is not None
        data[command.section] = _data_digest(config, ("image",) if run.is_pretraining else ("image", "label"))
    return {"settings": settings, "data": data}


def _data_digest(config: Mapping[str, Any], used: tuple[str, ...]) -> str | None:
    """Digest of a data list and the sizes of what is used; without one, of the names and sizes of a folder's files."""
    paths, folder = config["data_list_file_path"], config["dataset_dir"]
    if paths is not None:
        paths, keys = ensure_tuple(paths), ensure_tuple(config["data_list_key"])
        content = digest(b"".join(Path(path).read_bytes() for path in paths))
        return digest(content + _sizes_digest(paths, folder, keys, used, content))
    if folder is None:
        return None
    sizes = sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in _files(Path(folder)))
    return digest(json.dumps(sizes))


@functools.lru_cache
def _sizes_digest(
    paths: tuple[str, ...], folder: str | None, keys: tuple[str, ...], used: tuple[str, ...], content: str
) -> str:
    """Kept while the lists' ``content`` is the same: thousands of files for every run would take long."""
    items = load_datalist(paths, folder, keys, keep=["label"])
    files = [[*(item.get(name) for name in used), *item.get("further_channels", ())] for item in items]
    return digest(json.dumps([list(map(_size, listed)) for listed in files]))


def _size(path: str | None) -> int | None:
    """Bytes of a file, or of the files of a DICOM series' folder; None where there is nothing."""
    if not isinstance(path, str) or not os.path.exists(path):
        return None
    return sum(file.stat().st_size for file in _files(Path(path))) if os.path.isdir(path) else os.path.getsize(path)


def _files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, which come and go."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def _encoder_digest(run: Run) -> str | None:
    encoder = None if run.is_pretraining else run.commands[0].config()["pretrained_encoder"]
    return None if encoder is None else digest(Path(encoder).read_bytes())


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two fingerprints differ, in words."""
    # A module that is new changes nothing, unless one that was there, or a setting, has come to use it.
    modules = [name for name, code in before["code"].items() if now["code"].get(name) != code]
    texts = [f"code of {', '.join(modules)}"] if modules else []
    for group in ("versions", "settings"):
        old, new = before[group], now[group]
        texts += [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in changed(old, new)]
    texts += [f"the data for {name}" for name in changed(before["data"], now["data"])]
    if before["encoder"] != now["encoder"]:
        texts.append("the encoder that it starts from")
    return texts


def checked_fingerprints(runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """The present fingerprints of runs, after making sure that those that were started had the same.

    Args:
        runs: of a study.

    Returns:
        By name of the run.

    Raises:
        ValueError: some were started with others; the message lists them and what differs.
    """
    fingerprints = {}
    outdated: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        now = fingerprints[run.name] = fingerprint(run)
        changes = tuple(differences(run.fingerprint() or now, now))
        if changes:
            outdated.setdefault(changes, []).append(run.name)
    if outdated:
        parts = [
            f"  {few(names, _LISTED, _LINE)}\n    {few(changes, _LISTED, f'{_LINE}  ')}"
            for changes, names in outdated.items()
        ]
        raise ValueError(
            "these runs were started with other code or settings than now:\n" + "\n".join(parts) + "\n"
            "Results of different versions are not compared: give another --out, remove the folders of these runs to "
            "run them again, or go back to the code and settings that they were started with."
        )
    return fingerprints
