"""Numbers as users set them."""

from __future__ import annotations

__all__ = ["at_least_one"]


def at_least_one(value: int, name: str, remedy: str) -> int:
    """A setting that counts something, such as the epochs between checkpoints.

    Args:
        value: the setting.
        name: of the setting, for the message.
        remedy: what to set instead, for the message.

    Returns:
        the setting.

    Raises:
        ValueError: where it is less than 1.

    Example:
        >>> at_least_one(10, "log_interval", "leave it out for every tenth")
        10
    """
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: {remedy}.")
    return value
