"""Merging a bundle's config files and settings, as its commands do, without evaluating them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from pgl_ext.files import write_json

__all__ = ["Command", "changed", "merged_config"]

Layer = str | Mapping[str, Any]
"""A config file, or settings by id that override those before."""


@dataclass(frozen=True)
class Command:
    """One command of a bundle.

    Args:
        section: of the config that is run, such as ``training``.
        layers: config files and settings that override those before, in their order; the last are settings.
    """

    section: str
    layers: tuple[Layer, ...]

    def with_settings(self, **settings: Any) -> Command:
        """The same command with further settings."""
        *before, last = self.layers
        return Command(self.section, (*before, {**last, **settings}))

    def config(self) -> ConfigParser:
        """The layers merged; see :func:`merged_config`."""
        return merged_config(self.layers)

    def write(self, folder: Path) -> list[str]:
        """Write the settings to files in a folder.

        Returns:
            The files of all layers, in their order.
        """
        files = []
        for number, layer in enumerate(self.layers):
            if isinstance(layer, str):
                files.append(layer)
            else:
                files.append(str(folder / f"{self.section}_{number}.json"))
                write_json(Path(files[-1]), layer)
        return files


def merged_config(layers: Sequence[Layer]) -> ConfigParser:
    """What a bundle's command makes of its config files and settings, before it evaluates anything.

    Args:
        layers: in their order.

    Returns:
        The config, whose entries are found by id.

    Raises:
        FileNotFoundError: a config file does not exist.
        ValueError: a setting is not in the configs before it, as when its name is misspelt.
    """
    parser = ConfigParser({})
    for layer in layers:
        is_file = isinstance(layer, str)
        unknown = [] if is_file else [name for name in layer if name not in parser]
        if unknown:
            files = ", ".join(name for name in layers if isinstance(name, str))
            raise ValueError(f"the settings {unknown} are not in {files}: correct their names.")
        for name, value in (ConfigParser.load_config_file(layer) if is_file else layer).items():
            merge_kv(parser, name, value)
    return parser


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The ids whose values differ, None where there is none."""
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]
