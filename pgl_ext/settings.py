"""Checks of settings as users write them: on the command line and in configs."""

from __future__ import annotations

from numbers import Integral

__all__ = ["check_positive", "parse_bool"]

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse_bool(value: bool | int | str, name: str) -> bool:
    """A setting that is on or off: ``--overwrite false`` reaches a config as text, which Python takes for true.

    Args:
        value: true or false as such, as 0 or 1, or in words.
        name: of the setting, for the message.

    Raises:
        ValueError: anything else.
    """
    word = str(value).strip().lower()
    if word not in _WORDS:
        raise ValueError(f"{name} must be true or false, got {value!r}.")
    return _WORDS[word]


def check_positive(value: int, name: str, remedy: str) -> int:
    """Return a setting that counts something, such as epochs; a ValueError with the remedy where it is less than 1."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: {remedy}.")
    return value
