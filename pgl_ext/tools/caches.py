"""Filling a cache of preprocessed volumes before a training does, and looking after it: ``pgl cache``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from pgl_ext.data.cache_file import CachedVolume, CacheReadError
from pgl_ext.data.prepare import resolve_bad
from pgl_ext.tools.cluster import Cluster, run_jobs
from pgl_ext.tools.launch import BundleRun

__all__ = ["cache_report", "fill_cache", "fill_in_shards"]


def fill_cache(workflow: BundleRun, items: Sequence[Mapping], shard: tuple[int, int] = (0, 1)) -> str:
    """Preprocess the scans of a pre-training, without training; those that are cached already are left alone.

    Args:
        workflow: the pre-training.
        items: all its scans.
        shard: number, from 0, and count: of so many parts of the scans, which may be filled at the same time.

    Returns:
        In words, what was done.

    Raises:
        BadVolumesError: scans cannot be used, and ``skip_bad_files`` is not set. The others are cached.
    """
    number, count = shard
    items, (cache, skip_bad_files) = items[number::count], workflow.parts("cache", "skip_bad_files")
    good = resolve_bad(cache.prepare(items), items, skip_bad_files)
    return f"{len(good)} of {len(items)} volumes are cached in {cache.cache_dir}."


def fill_in_shards(command: Sequence[str], shards: int, cluster: Cluster) -> None:
    """Have a cache filled by jobs, each of which does one of so many parts.

    Jobs that are lost leave whole files; the same again does what is missing.
    """
    run_jobs(cluster, [[*command, "--shard", f"{number}/{shards}"] for number in range(shards)], "pgl-cache")


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
