"""Checks of settings as users write them: on the command line and in configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["check_fields", "check_kind", "check_positive", "flat_entries", "parse_bool"]

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


def check_kind(value: Any, default: Any, name: str) -> None:
    """Check that a setting is of its default's kind: true or false, a number, text (or several), or a list of as many
    numbers.

    None and expressions always will do, as does anything where the default is none of these. Numbers are whole, and not
    negative, where the default is. A list whose default has one number or none may have any length. A window of
    intensities may also be a list of such, one for each channel.

    Args:
        value: of the setting.
        default: of the setting.
        name: of the setting, for the message.

    Raises:
        ValueError: what was expected, and the value.
    """
    if value is None or _is_expression(value) or _is_expression(default):
        return
    several = isinstance(value, (list, tuple))
    if isinstance(default, bool):
        parse_bool(value, name)
    elif isinstance(default, Real):
        _check_number(value, default, name)
    elif isinstance(default, str) and not all(isinstance(text, str) for text in (value if several else [value])):
        raise ValueError(f"{name} must be text, such as {default!r}, got {value!r}.")
    elif isinstance(default, list) and all(map(_is_number, default)):
        per_channel = name == "hu_window" and several and all(part is None or isinstance(part, list) for part in value)
        for part in value if per_channel else [value]:
            if part is not None:
                _check_numbers(part, default, name)
    elif name == "channel_names" and not (several and value and all(isinstance(part, str) for part in value)):
        raise ValueError(f"{name} must be a list of names, such as ['T1', 'T2'], got {value!r}.")


def _check_number(value: Any, default: Real, name: str) -> None:
    kind = Integral if isinstance(default, Integral) else Real
    if not _is_number(value) or not isinstance(value, kind):
        word = "a whole number" if kind is Integral else "a number"
        raise ValueError(f"{name} must be {word}, such as {default}, got {value!r}.")
    if value < 0 <= default:
        raise ValueError(f"{name} must not be negative, got {value}.")


def _check_numbers(value: Any, default: list, name: str) -> None:
    is_list = isinstance(value, (list, tuple)) and all(_is_number(entry) or _is_expression(entry) for entry in value)
    if not is_list or (len(default) > 1 and len(value) != len(default)):
        words = f"{len(default)} numbers" if len(default) > 1 else "numbers"
        raise ValueError(f"{name} must be a list of {words}, such as {default or [1, 2]}, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_expression(value: Any) -> bool:
    """Whether MONAI evaluates it, or puts something else in its place."""
    return isinstance(value, str) and value.startswith(("$", "@", "%"))


def check_fields(cls: type, content: Mapping, source: Any) -> Mapping:
    """The content of a record's file (the source), after making sure that each entry is what its class says of it."""
    for name, kind in get_type_hints(cls).items():
        if name in content and not _is_a(content[name], kind):
            raise ValueError(
                f"{source} gives {name} as {content[name]!r}, which is not what it should be: copy it again, or "
                "install the version that wrote it."
            )
    return content


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind such as ``Sequence[float] | None``; true and false are no numbers."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer is Sequence:
        return isinstance(value, (list, tuple)) and all(_is_a(entry, inner[0]) for entry in value)
    if inner:
        return any(_is_a(value, option) for option in inner)
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def flat_entries(content: Any, name: str = "", lists: bool = False) -> dict[str, Any]:
    """All values of nested entries by id, such as ``input#spacing``.

    Args:
        content: plain values, as of JSON or of a config.
        name: id of the part that it is.
        lists: whether entries of lists have ids too, as in ``encoder#layers#0``; otherwise lists count as values.
    """
    if not content or not isinstance(content, (Mapping, list) if lists else Mapping):
        return {name: content}
    parts = content.items() if isinstance(content, Mapping) else enumerate(content)
    flat = [flat_entries(part, f"{name}#{key}" if name else str(key), lists) for key, part in parts]
    return {id_: value for entries in flat for id_, value in entries.items()}
