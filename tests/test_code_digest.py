from __future__ import annotations

from pathlib import Path

import pytest

from pgl_ext.code_digest import code_digests, defining_module, digest

MODULE = '''
"""About the module."""

def area(side):
    """Of a square."""
    return side * side
'''
PACKAGE = {
    "shapes/__init__.py": (
        '"""Shapes."""\nfrom pgl_ext.shapes.square import area as square_area\nfrom pgl_ext.shapes.circle import PI\n'
    ),
    "shapes/square.py": MODULE,
    "shapes/circle.py": "import torch.shapes\nfrom pgl_ext import numbers\n\nPI = numbers.PI\n",
    "numbers.py": "PI = 3.14\n",
    "pictures.py": "import pgl_ext.colours\n",
    "colours.py": "RED = '#f00'\n",
    "task.py": (
        "import torch.colours as pictures\nfrom pgl_ext.shapes import square_area\n\n"
        "def draw():\n    from pgl_ext.pictures import plot\n\n    plot(square_area(1))\n"
    ),
}


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    for name, content in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr("pgl_ext.code_digest._FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("side * side", "side * side  # not a cube", True),
        ('"""Of a square."""', '"""The area of a square."""', True),
        ('"""About the module."""', "", True),
        ("return side * side", "return (\n        side * side\n    )", True),
        ("side * side", "side * side * 1.0", False),
        ("def area(side)", "def area(side=1)", False),
        ("side", "edge", False),
    ],
)
def test_code_counts_and_words_do_not(package, old, new, same):
    before = code_digests(["pgl_ext.shapes.square", "pgl_ext.numbers"])
    (package / "shapes" / "square.py").write_text(MODULE.replace(old, new))
    after = code_digests(["pgl_ext.shapes.square", "pgl_ext.numbers"])
    assert (after == before) is same
    assert after["pgl_ext.numbers"] == before["pgl_ext.numbers"]


@pytest.mark.parametrize(
    ("names", "modules"),
    [
        (["pgl_ext.numbers"], ["pgl_ext.numbers"]),
        (["pgl_ext.shapes.circle"], ["pgl_ext.numbers", "pgl_ext.shapes.circle"]),
        (["pgl_ext.shapes.PI"], ["pgl_ext.numbers", "pgl_ext.shapes.circle"]),
        (["pgl_ext.shapes.square_area"], ["pgl_ext.shapes.square"]),
        # What is imported within a function does not count.
        (["pgl_ext.task.draw"], ["pgl_ext.shapes.square", "pgl_ext.task"]),
        (["pgl_ext.pictures.plot"], ["pgl_ext.colours", "pgl_ext.pictures"]),
        (["pgl_ext.shapes"], [f"pgl_ext.{name}" for name in ("numbers", "shapes", "shapes.circle", "shapes.square")]),
        (["torch.numbers", "numbers", "pgl_ext", "pgl_ext.nothing", "pgl_ext_other.task"], []),
    ],
)
def test_all_that_is_imported_counts(package, names, modules):
    assert list(code_digests(names)) == modules


def test_files_are_read_anew(package):
    assert defining_module("pgl_ext.shapes.PI") == "pgl_ext.shapes.circle"
    before = code_digests(["pgl_ext.task"])
    path = package / "shapes" / "__init__.py"
    path.write_text(path.read_text().replace("square import area", "circle import area"))
    assert set(code_digests(["pgl_ext.task"])) ^ set(before) == {
        "pgl_ext.numbers", "pgl_ext.shapes.circle", "pgl_ext.shapes.square"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("pgl_ext.transforms.LoadVolumed", "pgl_ext.transforms.load"),
        ("pgl_ext.methods.PGL.forward", "pgl_ext.methods.pgl"),
        ("pgl_ext.checkpoints.CheckpointHandler", "pgl_ext.checkpoints"),
        ("pgl_ext.methods", "pgl_ext.methods"),
        ("pgl_ext.__version__", "pgl_ext"),
    ],
)
def test_of_this_package(name, module):
    assert defining_module(name) == module


def test_of_another_package_with_a_module_of_the_same_name():
    """``checkpoints.py`` imports ``torch.distributed``, which is not ``pgl_ext.distributed``."""
    assert not any(name.startswith("torch") for name in code_digests(["pgl_ext.checkpoints"]))


def test_digest_by_hashlib():
    assert digest("abc") == digest(b"abc") == "ba7816bf8f01cfea"
