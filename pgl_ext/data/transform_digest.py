"""A digest of what a transform is set to do."""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import os
import re
import threading
import types
from collections.abc import Callable, Mapping

import numpy as np
import torch

__all__ = ["transform_digest"]


def transform_digest(transform: object) -> str:
    """A digest of what a transform is set to do, the same in every process and run.

    It is made of class names and attributes, recursively: of transforms, containers, arrays, tensors, functions
    (their code) and other objects. Random states, locks, thread-local values, loggers, attributes called ``*cache*``
    and memory addresses don't count.

    Args:
        transform: any transform, usually a ``Compose``.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(_canonical(transform, ()).encode()).hexdigest()


_IGNORED_TYPES = (
    np.random.RandomState,
    np.random.Generator,
    torch.Generator,
    logging.Logger,
    threading.local,
    type(threading.Lock()),
    type(threading.RLock()),
)
# Of MONAI's Compose and random transforms; they change nothing in the result or change with every call.
_IGNORED_ATTRIBUTES = ("log_stats", "_do_transform")


def _canonical(value: object, parents: tuple[int, ...]) -> str:
    if id(value) in parents:
        return f"<parent {parents.index(id(value))}>"
    inner = functools.partial(_canonical, parents=(*parents, id(value)))
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, os.PathLike):
        return f"path:{os.fspath(value)}"
    if isinstance(value, (torch.dtype, torch.device, np.dtype, slice, range)):
        return f"{type(value).__name__}:{value}"
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return _canonical_array(value)
    if isinstance(value, Mapping):
        return f"{_name(type(value))}{{{','.join(sorted(f'{inner(k)}={inner(v)}' for k, v in value.items()))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}{{{','.join(sorted(map(inner, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"{_name(type(value))}[{','.join(map(inner, value))}]"
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)},{inner(value.args)},{inner(value.keywords)})"
    if isinstance(value, types.MethodType):
        return f"method({inner(value.__func__)},{inner(value.__self__)})"
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{_name(value)}({inner(value.__code__)},{inner(value.__defaults__)},{inner(cells)})"
    if isinstance(value, types.CodeType):
        return f"code({value.co_code.hex()},{inner(value.co_consts)},{inner(value.co_names)})"
    if isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType, np.ufunc)):
        return _name(value)
    return _canonical_object(value, inner)


def _canonical_array(value: np.ndarray | torch.Tensor) -> str:
    array = np.ascontiguousarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
    return f"{type(value).__name__}:{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"


def _canonical_object(value: object, inner: Callable[[object], str]) -> str:
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return f"{_name(type(value))}:{re.sub(r' at 0x[0-9a-fA-F]+', '', repr(value))}"
    settings = {
        name: setting
        for name, setting in attributes.items()
        if name not in _IGNORED_ATTRIBUTES and "cache" not in name.lower() and not isinstance(setting, _IGNORED_TYPES)
    }
    return f"{_name(type(value))}({inner(settings)})"


def _name(value: object) -> str:
    module = getattr(value, "__module__", None)
    return f"{module}.{getattr(value, '__qualname__', getattr(value, '__name__', repr(value)))}"
