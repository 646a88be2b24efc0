"""Writing files so that a reader finds them complete or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["write_atomically"]


def write_atomically(save: Callable[[BinaryIO], Any], path: str | os.PathLike) -> None:
    """Have ``save(file)`` write a file that is either complete or absent, also after a power cut.

    Args:
        save: writes to the binary file object that it is given.
        path: where the file appears; its folder is made if missing. Until then the content is in ``tmp-*`` beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{uuid.uuid4().hex}{path.suffix}")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            # Otherwise a crash of the machine could leave the name with half the content.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
