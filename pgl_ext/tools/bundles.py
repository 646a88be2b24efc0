"""Where the bundles and their configs lie."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundle_folder"]


def bundle_folder(name: str) -> Path:
    return Path(__file__).parents[2] / "bundles" / name
