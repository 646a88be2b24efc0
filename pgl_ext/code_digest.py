"""Digests of the code that something is made by, so that results of changed code are recognised."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

__all__ = ["code_digests", "digest"]

_PACKAGE = __package__


def digest(content: str | bytes) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def code_digests(modules: Iterable[str]) -> dict[str, str]:
    """Digests of modules of this package and of all that they import, whatever their comments and docstrings.

    Imports within functions do not count: they are of optional packages, and of pictures, which change no result.

    Args:
        modules: dotted names, of modules of this package; others are passed over.

    Returns:
        by dotted name.
    """
    found: dict[str, str] = {}
    waiting = [name for name in modules if f"{name}.".startswith(f"{_PACKAGE}.")]
    while waiting:
        name = waiting.pop()
        path = _path(name)
        if name not in found and path is not None:
            source = path.read_text(encoding="utf-8")
            found[name] = _source_digest(source)
            waiting += _imports(source)
    return dict(sorted(found.items()))


def _path(module: str) -> Path | None:
    parts = module.split(".")[1:]
    base = Path(__file__).parent.joinpath(*parts)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if parts and path.is_file()), None)


@lru_cache(maxsize=1024)
def _source_digest(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return digest(ast.unparse(tree))


def _is_text(node: ast.stmt) -> bool:
    """A docstring, or another text that stands by itself."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@lru_cache(maxsize=1024)
def _imports(source: str) -> list[str]:
    """Modules of this package that a module imports when it is imported itself."""
    return [name for node in ast.parse(source).body for name in _imported(node)]


def _imported(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(f"{_PACKAGE}."):
        for alias in node.names:
            yield defining_module(f"{node.module}.{alias.name}")


def defining_module(name: str) -> str:
    """The module that a dotted name, of a module or of something in one, leads to; packages hand names on.

    Args:
        name: such as ``pgl_ext.transforms.LoadVolumed``, which is defined in ``pgl_ext.transforms.load``.
    """
    module, attributes = name, []
    while _path(module) is None and "." in module:
        module, _, attribute = module.rpartition(".")
        attributes.append(attribute)
    path = _path(module)
    if path is None or path.name != "__init__.py" or not attributes:
        return module
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == attributes[-1] for a in node.names):
            return defining_module(f"{node.module}.{attributes[-1]}")
    return module
