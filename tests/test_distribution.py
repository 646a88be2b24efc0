"""The package as others install it, and one version everywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from programs import ROOT

from pgl_ext import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_and_its_changes_are_told():
    releases = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert releases[0] == __version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    for path in ROOT.glob("bundles/*/configs/metadata.json"):
        metadata = json.loads(path.read_text())
        assert metadata["version"] == __version__, path
        assert set(metadata["changelog"]) == set(releases), path


def test_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation.keys() >= {"message", "title", "authors", "license"}
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper.keys() >= {"type", "title", "authors"}
    assert paper["url"] in (ROOT / "README.md").read_text()


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def test_tested_versions_lie_in_the_ranges_that_are_allowed():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = requirements([line for line in lines if line and not line.startswith("#")])
    extras = PROJECT["optional-dependencies"]
    allowed = requirements(
        [*PROJECT["dependencies"], *(line for name in extras if name != "docs" for line in extras[name])]
    )
    assert pinned.keys() == allowed.keys()
    for name, pin in pinned.items():
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert allowed[name].specifier.contains(exact.version), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "pgl_ext", source / "pgl_ext", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    (path,) = folder.glob("*.whl")
    return path


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(wheel):
    assert wheel.name == f"pgl_ext-{__version__}-py3-none-any.whl"
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pgl_ext").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {"pgl_ext/py.typed", "pgl_ext/tools/templates/report.html"} <= files
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == files


@pytest.mark.slow
def test_wheel_runs_where_it_is_installed(wheel, tmp_path):
    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)

    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(target), "PAGER": "cat"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    where = python("-c", "import pgl_ext.methods, pgl_ext.tools.report; print(pgl_ext.tools.report.__file__)").strip()
    assert Path(where).is_relative_to(target)
    assert "export_encoder" in python("-m", "pgl_ext", "--help")
