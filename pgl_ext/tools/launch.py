"""Starting a bundle's workflow as ``python -m monai.bundle run`` does, in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from fire.parser import DefaultParseValue
from monai.bundle import run_workflow

from pgl_ext.config_check import FILE_SETTINGS, StrictWorkflow, is_list

__all__ = ["BundleRun", "option_settings", "option_value"]


@dataclass(frozen=True)
class BundleRun:
    """A workflow of a bundle, and how its command line reads.

    Args:
        section: of the config that is run, such as ``training``; ``""``: the config's ``run``.
        configs: files, in their order.
        settings: by id, what overrides the files.
        processes: of torchrun on this machine; 1: none.
    """

    section: str
    configs: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1

    @property
    def line(self) -> list[str]:
        """The command and its arguments, as a user would type it."""
        start = (
            ["python"] if self.processes == 1 else ["torchrun", "--standalone", f"--nproc_per_node={self.processes}"]
        )
        return [*start, "-m", "monai.bundle", "run", *([self.section] * bool(self.section)), *self._options]

    @property
    def _strict(self) -> list[str]:
        """The same through the workflow that knows every name, also of parts that are not there.

        As JSON, since fire would read names of folders such as ``run#2`` and ``2024`` as something else.
        """
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        start = start if self.processes > 1 else []
        return [sys.executable, *start, "-m", "pgl_ext.tools.launch", json.dumps(self._arguments, default=os.fspath)]

    @property
    def _arguments(self) -> dict[str, Any]:
        values = {n: option_value(n, v) if isinstance(v, str) else v for n, v in self.settings.items()}
        arguments = {name: "$None" if value is None else value for name, value in values.items()}
        return arguments | {"config_file": list(self.configs)} | ({"run_id": self.section} if self.section else {})

    def parts(self, *names: str) -> list[Any]:
        """Some things that the workflow is made of, such as its ``cache``, made here without running anything."""
        parser = StrictWorkflow(**self._arguments, workflow_type="train", logging_file=False).parser
        return [parser.get_parsed_content(name) for name in names]

    @property
    def _options(self) -> list[str]:
        files = self.configs[0] if len(self.configs) == 1 else str(list(self.configs)).replace("', '", "','")
        settings = [text for name, value in self.settings.items() for text in (f"--{name}", _option_text(value))]
        return ["--config_file", files, *settings]

    def run(self) -> None:
        """Print the command, carry it out, and wait for it.

        Raises:
            SystemExit: with its status, where it fails; what went wrong it has said itself.
        """
        print(f"$ {' '.join(map(_quoted, self.line))}", flush=True)
        process = subprocess.Popen(self._strict)
        # Ctrl-C reaches both; the workflow saves a checkpoint, and is waited for.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGINT, before)
        if status:
            sys.exit(status if status > 0 else 128 - status)


def _quoted(text: str) -> str:
    """A word for a shell; lists of files stay readable."""
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)


def option_value(name: str, text: str) -> Any:
    """A setting's value from an option's text: as YAML or Python has it, but names of files and folders verbatim."""
    if name.endswith(FILE_SETTINGS) and not is_list(text):
        return text
    value = None if text == "$None" else yaml.safe_load(text)
    # YAML takes 1e-3 for text.
    return DefaultParseValue(value) if isinstance(value, str) else value


def _option_text(value: Any) -> str:
    """A value as the command line of MONAI's bundles reads it."""
    if value is None:
        return "$None"
    return (
        str(value).lower() if isinstance(value, bool) else os.fspath(value) if isinstance(value, Path) else str(value)
    )


def option_settings(arguments: Sequence[str]) -> dict[str, str]:
    """Settings of a config given as ``--name value`` or ``--name=value``, verbatim.

    Raises:
        ValueError: something else is among them, or a value is missing.
    """
    settings: dict[str, str] = {}
    left = list(arguments)
    while left:
        option = left.pop(0)
        name, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not name:
            raise ValueError(f"{option!r} is no option: settings have the form --name value, as in --max_epochs 20.")
        if not equals and not left:
            raise ValueError(f"--{name} has no value: settings have the form --name value, as in --max_epochs 20.")
        settings[name] = value if equals else left.pop(0)
    return settings


if __name__ == "__main__":
    run_workflow(StrictWorkflow, **json.loads(sys.argv[1]))
