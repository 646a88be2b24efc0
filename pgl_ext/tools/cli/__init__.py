"""The command line: ``pgl COMMAND``, or ``python -m pgl_ext COMMAND``.

Typer, of the libraries for command lines, gives help pages with groups, types, errors and shell completion from plain
functions; fire, which MONAI brings, guesses types from values and gives neither groups nor completion.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pgl_ext import __version__
from pgl_ext.tools.cli import tools, way

app = typer.Typer(
    name="pgl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Self-supervised pre-training for 3D medical segmentation: pretrain, gain, segment.",
)
app.add_typer(way.app)
app.add_typer(tools.app)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"pgl {__version__}")
        raise typer.Exit


def main() -> None:
    try:
        app()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
