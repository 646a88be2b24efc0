"""Yes or no as users write it on the command line."""

from __future__ import annotations

__all__ = ["as_bool"]

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def as_bool(value: bool | int | str, name: str) -> bool:
    """A setting that is on or off.

    ``--overwrite false`` reaches a config as the text "false", which Python takes for true.

    Args:
        value: true or false as such, as 0 or 1, or in words.
        name: of the setting, for the message.

    Raises:
        ValueError: anything else.

    Example:
        >>> as_bool("False", "overwrite")
        False
    """
    word = str(value).strip().lower()
    if word not in _WORDS:
        raise ValueError(f"{name} must be true or false, got {value!r}.")
    return _WORDS[word]
