"""One clear message where the cause of a stop lies in the input."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from types import TracebackType

__all__ = ["few", "report_root_cause", "root_cause", "transform_error"]

_ABOUT_THE_INPUT = (OSError, ValueError, FloatingPointError, ImportError, MemoryError)


def few(texts: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Up to ``most`` texts, and how many more there are, for a message."""
    more = f"{separator.lstrip(',')}and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def root_cause(error: BaseException) -> BaseException:
    """The error to show to the user: the outermost one about files, values or missing packages, else the original one.

    MONAI wraps errors in others (``raise ... from``). The outermost one about files and such has the remedy.
    """
    chain = _chain(error)
    return next((cause for cause in chain if isinstance(cause, _ABOUT_THE_INPUT)), chain[-1])


def transform_error(error: BaseException) -> BaseException:
    """The error of a transform itself, without the layers that MONAI's ``Compose`` wraps around it."""
    chain = _chain(error)
    return next((cause for cause in chain if not str(cause).startswith("applying transform")), chain[-1])


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised from, each once: a chain may come back to where it began."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def report_root_cause() -> None:
    """Let uncaught errors about files, values and missing packages end the program with only their message.

    A bundle's config machinery wraps each error in others, dozens of lines with the cause at the top.
    ``PGL_TRACEBACK=1`` shows it all; other errors always do.
    """
    sys.excepthook = _print_cause


def _with_remedy(error: BaseException) -> BaseException:
    """The root cause, with what to do where the system does not say it."""
    cause = root_cause(error)
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC and cause.filename is None:
        return OSError(
            f"{cause}. Make room where this writes, and run the command again, with --resume true where it has that."
        )
    return cause


def _print_cause(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    cause = _with_remedy(error)
    if isinstance(error, KeyboardInterrupt) and not os.environ.get("PGL_TRACEBACK"):
        print("\nstopped by Ctrl-C", file=sys.stderr)
        return
    if not isinstance(cause, _ABOUT_THE_INPUT) or os.environ.get("PGL_TRACEBACK"):
        sys.__excepthook__(kind, error, traceback)
        return
    print(f"\nerror: {str(cause) or repr(cause)}\n(set PGL_TRACEBACK=1 to see where it was raised)", file=sys.stderr)
