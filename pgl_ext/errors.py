"""One clear message where the cause of a stop lies in the input."""

from __future__ import annotations

import os
import sys
from types import TracebackType

__all__ = ["report_root_cause", "root_cause"]

_ABOUT_THE_INPUT = (OSError, ValueError, FloatingPointError, ImportError)


def root_cause(error: BaseException) -> BaseException:
    """What layers of other errors were wrapped around: an error about files, values or missing packages, else what all
    began with.

    Of several errors about these it is the outermost: it says what to do about those within.
    """
    while error.__cause__ is not None and not isinstance(error, _ABOUT_THE_INPUT):
        error = error.__cause__
    return error


def report_root_cause() -> None:
    """Have uncaught errors about files, values and missing packages end the program with their message alone.

    A bundle's config machinery wraps each error in a tower of its own, dozens of lines with the cause at the top.
    ``PGL_TRACEBACK=1`` shows it all; other errors always do.
    """
    sys.excepthook = _print_cause


def _print_cause(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    cause = root_cause(error)
    if not isinstance(cause, _ABOUT_THE_INPUT) or os.environ.get("PGL_TRACEBACK"):
        sys.__excepthook__(kind, error, traceback)
        return
    print(f"\nerror: {cause}\n(set PGL_TRACEBACK=1 to see where it was raised)", file=sys.stderr)
