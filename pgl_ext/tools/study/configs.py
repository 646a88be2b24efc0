"""Configs of the bundles as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

__all__ = ["Layer", "flat", "merged_config"]

Layer = str | Mapping[str, Any]
"""A config file, or settings by id that override those before."""


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


def flat(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a nested config by id, such as ``train#handlers#0#interval``."""
    if not isinstance(config, (dict, list)) or not config:
        yield name, config
        return
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        yield from flat(value, f"{name}#{key}" if name else str(key))
