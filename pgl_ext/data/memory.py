"""How much memory there is to use, in containers and jobs of a cluster too."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["available_memory", "total_memory"]

_GROUP = Path("/sys/fs/cgroup")


def available_memory(group: Path = _GROUP) -> int:
    """Bytes that this process can still take without swapping.

    Args:
        group: the control group (version 2) of the process, whose limit, as of a container, may be below what the
            machine has free. Where there is none, the machine counts; ``--memory_limit_gib`` sets what is taken.
    """
    free = psutil.virtual_memory().available
    try:
        limit, usage = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return free
    # Files in memory make room where it is needed.
    return max(0, min(free, limit - usage + int(statistics.get("inactive_file", 0))))


def total_memory(group: Path = _GROUP) -> int:
    """Bytes of the machine, or those that its control group may have where these are fewer; see available_memory."""
    total = psutil.virtual_memory().total
    try:
        return min(total, int((group / "memory.max").read_text()))
    except (OSError, ValueError):
        return total
