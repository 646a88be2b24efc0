"""Looking after a cache of preprocessed volumes: ``pgl cache``."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from pgl_ext.data.cache_file import CachedVolume, CacheReadError

__all__ = ["cache_report"]


def cache_report(folder: str | os.PathLike, verify: bool = False) -> str:
    """What is in a cache: files and size by preprocessing, and whether all are as they were written.

    Args:
        folder: the cache.
        verify: read every file and compare its checksums; damaged ones are removed, to be made anew when needed.

    Raises:
        ValueError: the folder holds no cache.
    """
    files = sorted(Path(folder).glob("*-*-*.b2nd"))
    if not files:
        raise ValueError(f"{folder} holds no cached volumes: give the folder 'cache' in what a training wrote.")
    sizes: dict[str, list[int]] = defaultdict(list)
    for file in files:
        sizes[file.name.split("-")[1]].append(file.stat().st_size)
    lines = [f"{len(each)} volumes, {sum(each) / 2**30:.2f} GiB, preprocessing {name}" for name, each in sizes.items()]
    if verify:
        damaged = [file for file in tqdm(files, desc="Reading", unit="volume", disable=None) if not _is_whole(file)]
        for file in damaged:
            file.unlink()
        lines += [f"removed, since damaged: {file}" for file in damaged]
        lines.append(f"{len(files) - len(damaged)} of {len(files)} volumes are as they were written.")
    return "\n".join(lines)


def _is_whole(file: Path) -> bool:
    def refuse() -> None:
        raise CacheReadError("not to be made anew here")

    try:
        CachedVolume(file, refuse, set())[:]
    except CacheReadError:
        return False
    return True
