"""Digests of the code that something is made by, so that results of changed code are recognised."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

__all__ = ["code_digests", "defining_module", "digest"]

_PACKAGE = __package__
_FOLDER = Path(__file__).parent


def digest(content: str | bytes) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def code_digests(names: Iterable[str]) -> dict[str, str]:
    """Digests of modules of this package and of all that they import, whatever their comments and docstrings.

    Only imports at the top level of a module count: those within functions are of optional packages, and of pictures,
    which change no result. Files are read anew each time.

    Args:
        names: dotted names, of modules or of something in them; those of other packages are passed over.

    Returns:
        by dotted name of the module.
    """
    digests: dict[str, str] = {}
    followed: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        followed.add(name)
        module = defining_module(name)
        path = _path(module)
        if module not in digests and path is not None:
            source = path.read_text(encoding="utf-8")
            digests[module] = _source_digest(source)
            waiting |= {*_imports(source).values()} - followed
    return dict(sorted(digests.items()))


def defining_module(name: str) -> str:
    """The module that a dotted name, of a module or of something in one, leads to; packages hand names on.

    Args:
        name: such as ``pgl_ext.transforms.LoadVolumed``, which is defined in ``pgl_ext.transforms.load``.
    """
    module, attribute = name, ""
    while _path(module) is None and "." in module:
        module, _, attribute = module.rpartition(".")
    path = _path(module)
    if path is None or path.name != "__init__.py" or not attribute:
        return module
    origin = _imports(path.read_text(encoding="utf-8")).get(attribute)
    return module if origin is None else defining_module(origin)


def _path(module: str) -> Path | None:
    """File of a module of this package; None of any other, and of the package itself, which has no code."""
    top, *parts = module.split(".")
    if top != _PACKAGE or not parts:
        return None
    base = _FOLDER.joinpath(*parts)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@lru_cache(maxsize=1024)
def _source_digest(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [statement for statement in node.body if not _is_text(statement)] or [ast.Pass()]
    return digest(ast.unparse(tree))


def _is_text(node: ast.stmt) -> bool:
    """A docstring, or another text that stands by itself."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@lru_cache(maxsize=1024)
def _imports(source: str) -> dict[str, str]:
    """Names of this package that a module imports when it is imported itself, by those that they have in it."""
    names = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: origin for name, origin in names.items() if origin.startswith(f"{_PACKAGE}.")}
