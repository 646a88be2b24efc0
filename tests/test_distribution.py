"""The package as others install it, and one version everywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from programs import ROOT

from pgl_ext import __version__
from pgl_ext.tools.packaging import package_bundles
from pgl_ext.tools.phantom import write_dataset

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "output")


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
    """Built from a copy, since building leaves files behind; in it lies what a training left in a bundle."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("pgl_ext", "bundles", "studies", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=_LEFT_BEHIND)
    for name in (".gitignore", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "bundles" / "pgl_pretrain" / "output").mkdir()
    (source / "bundles" / "pgl_pretrain" / "output" / "model.pt").touch()
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel is installed in."""
    target = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


@pytest.fixture
def python(site, tmp_path) -> Callable[..., str]:
    """Runs ``python ARGUMENTS`` with the installed package, in an empty folder, and returns what it prints."""

    def call(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "PAGER": "cat"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    return call


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def files_in(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_wheel_holds_package_bundles_and_studies_that_anybody_can_run(wheel):
    assert wheel.name == f"pgl_ext-{__version__}-py3-none-any.whl"
    files = {f"pgl_ext/{name}" for name in files_in(ROOT / "pgl_ext")}
    assert {"pgl_ext/py.typed", "pgl_ext/tools/templates/report.html"} <= files
    shipped = "pgl_ext/tools/shipped"
    files |= {f"{shipped}/bundles/{name}" for name in files_in(ROOT / "bundles") if "/output/" not in name}
    studies = ("methods.yaml", "phantom.yaml", *(path.name for path in ROOT.glob("studies/paper*.yaml")))
    files |= {f"{shipped}/studies/{name}" for name in studies}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == files


@pytest.mark.slow
def test_wheel_runs_where_it_is_installed(python, site):
    where = python("-c", "import pgl_ext.methods, pgl_ext.tools.report; print(pgl_ext.tools.report.__file__)").strip()
    assert Path(where).is_relative_to(site)
    assert "pretrain" in python("-m", "pgl_ext", "--help")


@pytest.mark.slow
def test_wheel_packages_what_the_repository_does(python, tmp_path):
    python("-m", "pgl_ext", "package", "--out", "dist")
    package_bundles([], tmp_path / "expected")
    assert files_in(tmp_path / "dist") == files_in(tmp_path / "expected")


@pytest.mark.slow
def test_wheel_plans_a_study_with_its_bundles(python, site, tmp_path):
    file = python("-m", "pgl_ext", "config", "studies", "phantom.yaml").strip()
    assert Path(file).is_relative_to(site)
    write_dataset(tmp_path / "phantoms", 12, shape=(32, 32, 16), test_cases=1)
    assert "0 of " in python("-m", "pgl_ext", "study", file, "--out", "study", "--dry_run")
