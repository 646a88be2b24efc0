"""How much memory there is to use, in containers and jobs of a cluster too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

__all__ = ["available_memory"]


class _Files(NamedTuple):
    """Where a version of Linux control groups says how much memory a group may take, and has taken."""

    folder: str
    limit: str
    usage: str
    inactive: str  # in memory.stat: files in memory, which make room where it is needed


_VERSIONS = {
    "": _Files(".", "memory.max", "memory.current", "inactive_file"),
    "memory": _Files("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process can still take without swapping.

    What the machine has free is too much where a container or a job of a cluster is allowed less: those are control
    groups, each of which, up to the root, has a limit of its own.

    Args:
        groups: where control groups are mounted.
        own: the file that names those of this process.
    """
    return max(0, min([psutil.virtual_memory().available, *_rooms(groups, own)]))


def _rooms(groups: Path, own: Path) -> Iterator[int]:
    """What is left in each control group that has a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            if name in _VERSIONS:
                files = _VERSIONS[name]
                root = groups / files.folder
                folder = root / path.lstrip("/")
                # In a container the path may be the host's, of which only the end, or nothing, is there.
                for group in (folder, *folder.parents):
                    yield from _room(group, files)
                    if group == root:
                        break


def _room(group: Path, files: _Files) -> list[int]:
    try:
        limit, usage = int((group / files.limit).read_text()), int((group / files.usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not there, or "max"
        return []
    return [limit - usage + int(statistics.get(files.inactive, 0))]
