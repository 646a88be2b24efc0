"""The bundles that come with the package, and the study files: where they are, and which configs there are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["bundle_folder", "bundles_folder", "config_names", "config_path", "config_paths"]

_TOOLS = Path(__file__).parent
# Within an installed package, as pyproject.toml has it; or the repository that the package lies in.
_PLACES = (_TOOLS / "shipped", _TOOLS.parents[1])
_STUDIES = "studies"
_ENDINGS = (".json", ".yaml")


def bundles_folder() -> Path:
    """The folder of ``pgl_pretrain`` and ``pgl_segmentation``.

    Raises:
        FileNotFoundError: they are neither in the package nor beside it.
    """
    for place in _PLACES:
        if (place / "bundles" / "pgl_pretrain").is_dir():
            return place / "bundles"
    raise FileNotFoundError(
        f"the bundles are in none of {', '.join(str(place / 'bundles') for place in _PLACES)}: install the package "
        "again, from a wheel or from the whole repository."
    )


def bundle_folder(name: str) -> Path:
    """The folder of a bundle.

    Raises:
        FileNotFoundError: there is no such bundle.
    """
    folder = bundles_folder() / name
    if not (folder / "configs" / "metadata.json").is_file():
        raise FileNotFoundError(f"there is no bundle {name!r}, only {', '.join(_bundles())}: name one of these.")
    return folder


def config_names(bundle: str | None = None) -> list[str]:
    """The configs that there are, each as ``BUNDLE NAME``; study files as ``studies NAME``.

    Args:
        bundle: of this one only, which may be ``studies``.

    Raises:
        FileNotFoundError: there is no such bundle.
    """
    names = [*_bundles(), _STUDIES] if bundle is None else [bundle]
    return [
        f"{name} {path.relative_to(_configs(name)).as_posix()}"
        for name in names
        for path in sorted(_configs(name).rglob("*"))
        if path.suffix in _ENDINGS
    ]


def config_paths(bundle: str, names: Sequence[str]) -> list[str]:
    """The paths of configs of a bundle, or of files of the working directory, such as a task of one's own.

    Raises:
        FileNotFoundError: there is no such bundle, or a name is neither of a config nor of a file.
    """
    return [config_path(name, _configs(bundle)) for name in names]


def config_path(name: str, folder: str | os.PathLike) -> str:
    """A config file of a bundle's folder, or else one that the working directory has.

    Raises:
        FileNotFoundError: there is neither.
    """
    for path in (Path(folder) / name, Path(os.path.abspath(name))):
        if path.is_file():
            return str(path)
    raise FileNotFoundError(f"the config {name} is neither in {folder} nor in the working directory: correct its name.")


def _bundles() -> list[str]:
    return sorted(path.parents[1].name for path in bundles_folder().glob("*/configs/metadata.json"))


def _configs(bundle: str) -> Path:
    return bundles_folder().parent / _STUDIES if bundle == _STUDIES else bundle_folder(bundle) / "configs"
