"""Stops a run, before any work, where its config has a setting, an argument or a step that nothing knows.

MONAI takes every option and every key, and a misspelt one has no effect: ``--max_epoch 3`` trains for 500 epochs.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pydoc import locate
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.config_item import ConfigComponent, ConfigExpression
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import DEFAULT_HANDLERS_ID, DEFAULT_MLFLOW_SETTINGS, ID_SEP_KEY, MACRO_KEY, MERGE_KEY, merge_kv
from monai.config import PathLike
from monai.utils import ensure_tuple

from pgl_ext.errors import report_root_cause
from pgl_ext.settings import check_kind

__all__ = ["FILE_SETTINGS", "StrictWorkflow", "check_config", "is_list"]

# Steps of a workflow, by the argument of MONAI that names another one.
_STEPS = {"init_id": "initialize", "run_id": "run", "final_id": "finalize"}
# What MONAI and MONAI Label read by these names, without a reference; of tracking, all that is not a handler.
_READ_BY_MONAI = {"imports", "displayable_configs", *_STEPS.values()}
_READ_BY_MONAI |= DEFAULT_MLFLOW_SETTINGS["configs"].keys() - DEFAULT_HANDLERS_ID.keys()
# One plan (``pgl plan``) is for both bundles, and of these settings each reads but some.
_OF_PLANS = {"organs", "background_values", "multi_label", "ignore_label", "annotated_key", "patch_size", "view_size"}
_OF_PLANS |= {"encoder"}
_PLAN = "_desc_architecture"
# What names of settings end in whose values are names of files or folders.
FILE_SETTINGS = ("_dir", "_path", "pretrained", "pretrained_encoder", "pretrained_decoder")
# Of settings that are numbers, the words that stand for one.
_WORDS = {"micro_batch_size": ("auto",)}
# A name this much like an argument is a slip, also where a target takes any other.
_SLIP = 0.8


def check_config(base: str = "train.json") -> None:
    """Stop the run of a config that has something unknown: a step of the config itself, the first that does work.

    Known are the keys of the base config, what a reference reads (``@key``, ``%key``), what MONAI reads, lists of
    expressions, which can be run, and the arguments of a target. Plain settings have to be of their default's kind.
    Does nothing where no workflow runs the config, as where MONAI's exports read it.

    Args:
        base: name of the bundle's own config, in the folder of the first config of the run.

    Raises:
        ValueError: names the first thing that is not known, and the nearest ones that are.
    """
    workflow = _running_workflow()
    if workflow is None or isinstance(workflow, StrictWorkflow):
        return
    path = workflow.config_root_path / base
    known = ConfigParser.load_config_file(path) if path.is_file() else workflow.parser.get()
    _check(workflow.parser, known, {argument: getattr(workflow, argument) for argument in _STEPS})


class StrictWorkflow(ConfigWorkflow):
    """MONAI's workflow of a config, which stops where overlays or options have what the first config does not know.

    It sees what :func:`check_config` comes too late for: ``%key`` of plain values, and parts of what is not there.

    Args:
        config_file: the base config, and overlays after it.
        arguments: see ``monai.bundle.ConfigWorkflow``; all others are options, as in ``max_epochs=3``.

    Raises:
        ValueError: see :func:`check_config`.
    """

    def __init__(self, config_file: PathLike | Sequence[PathLike], **arguments: Any) -> None:
        files = ensure_tuple(config_file)
        options = arguments.keys() - inspect.signature(ConfigWorkflow).parameters
        parser = ConfigParser({})
        for content in (*map(ConfigParser.load_config_file, files), {name: arguments[name] for name in options}):
            for name, value in content.items():
                _merge(parser, name, value)
        steps = {argument: arguments.get(argument) or step for argument, step in _STEPS.items()}
        _check(parser, ConfigParser.load_config_file(files[0]), steps)
        with _quiet("monai.bundle.workflows"):  # a warning for each overlay in another folder
            super().__init__(config_file, **arguments)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    before = logging.getLogger(name).level
    logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(name).setLevel(before)


def _merge(parser: ConfigParser, name: str, value: Any) -> None:
    """Merge as MONAI does, but where a name is part of what is not there, make that too: nothing knows it."""
    if name.startswith(MERGE_KEY) and name[1:] in parser:
        merge_kv(parser, name, value)
    else:
        parser.set(value, name.removeprefix(MERGE_KEY))


def _running_workflow() -> ConfigWorkflow | None:
    """The workflow that evaluates the config, which MONAI does not hand on: the nearest one up the stack."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ConfigWorkflow):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def _check(parser: ConfigParser, base: Mapping, steps: Mapping[str, str]) -> None:
    try:
        for argument, step in steps.items():
            if step != _STEPS[argument]:
                _check_step(str(step), parser, base)
        _Names(parser, base, steps.values()).check(parser.get(), base)
        _check_file_names(parser, base)
        for name, default in base.items():
            if parser.get(name) not in _WORDS.get(name, ()):
                check_kind(parser.get(name), default, name)
    except ValueError:
        report_root_cause()
        raise


def _check_file_names(parser: ConfigParser, names: Iterable[str]) -> None:
    """Names of files and folders are what was typed: fire reads ``run#2`` as ``run``, and ``2024`` as a number, and
    MONAI's parser puts ``::`` for ``#``."""
    for name in names:
        value = parser.get(name)
        if not name.endswith(FILE_SETTINGS) or value is None or _has_expressions(value):
            continue
        values, typed = (value if isinstance(value, (list, tuple)) else [value]), _typed(name)
        if typed is not None and is_list(typed):
            typed = None
        if not all(isinstance(entry, str) for entry in values) or (typed is not None and typed != value):
            problem = f"{typed!r} is read as {value!r}" if typed is not None else f"{value!r} is no name"
            raise ValueError(
                f"--{name}: {problem}. Put ./ before names that look like a number or a list, and rename what has # or "
                ":: in its name, or make a link to it."
            )
        if any(mark in entry for entry in values for mark in ("#", ID_SEP_KEY)):
            raise ValueError(
                f"--{name} is {value!r}: # and :: have a meaning in MONAI's configs. Rename it, or make a link to it."
            )


def _typed(option: str) -> str | None:
    """An option's value as it stands on the command line, if it does."""
    found = None
    for argument, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        if argument == f"--{option}":
            found = following
        elif argument.startswith(f"--{option}="):
            found = argument.partition("=")[2]
    return found


def is_list(text: str) -> bool:
    """Whether an option's value is written as a list, or as none."""
    try:
        return text == "$None" or (isinstance(ast.literal_eval(text), (list, tuple)) and text[0] in "[(")
    except (SyntaxError, ValueError):
        return False


def _check_step(step: str, parser: ConfigParser, base: Mapping) -> None:
    """A word after ``run`` names what to run, to initialize or to finalize with, also where an option was meant."""
    value = parser.get(step)
    is_macro = isinstance(value, str) and value.startswith(MACRO_KEY)
    if _has_expressions(value) or ConfigComponent.is_instantiable(value) or is_macro:
        return
    # Of the strings that MONAI can evaluate, those of the base config are settings.
    if step in base or "=" in step:
        name, _, setting = step.partition("=")
        raise ValueError(f"'{step}' is nothing to run: an option is written --{name} {setting or 'VALUE'}")
    if value is None:
        names = [name for name, part in parser.get().items() if _has_expressions(part) and name != "imports"]
        raise ValueError(f"the config has nothing to run named '{step}'{_nearest(step, names)}")


class _Names:
    """What names of a config are known."""

    def __init__(self, parser: ConfigParser, base: Mapping, steps: Collection[str]) -> None:
        self.locator = parser.locator
        self.parts = [part for _, part in _walk(parser.get())]
        self.read = {*_READ_BY_MONAI, *steps, *_references(parser.get())}
        self.read |= _OF_PLANS if _PLAN in parser.get() else set()
        # By their last part; of names with the same one, the outermost. Entries of lists are not set by name.
        names = [name for name, _ in _walk(base) if not re.search(rf"{ID_SEP_KEY}\d+", name)]
        names.sort(key=lambda name: -name.count(ID_SEP_KEY))
        self.ids = {name.split(ID_SEP_KEY)[-1]: _written(name) for name in names}

    def check(self, value: Any, base: Any, path: str = "", is_free: bool = False) -> None:
        """Check the names in a part of the config; ``base`` is the base config's, ``is_free`` where any key will do."""
        if ConfigComponent.is_instantiable(value):
            self._check_arguments(value, path)
        is_free = is_free or isinstance(value, list) or ConfigComponent.is_instantiable(value)
        base = base if isinstance(base, Mapping) else {}
        for key, name, part in _entries(value, path):
            if str(key).startswith("_"):
                continue  # a remark, or MONAI's own
            if not (is_free or key in base or self._is_read(name, part)):
                remedy = _nearest(key, self.ids) or "; the README of the bundle lists them"
                raise ValueError(f"the config has no setting '{_written(name)}'{remedy}")
            self.check(part, base.get(key), name, is_free)

    def _is_read(self, name: str, part: Any) -> bool:
        """Whether a reference reads it, a part of it or what it is part of; or it can be run, or was copied."""
        inside = name + ID_SEP_KEY
        if any(f"{read}{ID_SEP_KEY}".startswith(inside) or inside.startswith(read + ID_SEP_KEY) for read in self.read):
            return True
        # By now MONAI has put a copy of ``key`` in the place of ``%key``.
        return _has_expressions(part) or (isinstance(part, dict) and self.parts.count(part) > 1)

    def _check_arguments(self, component: Mapping, path: str) -> None:
        target = ConfigComponent(component, locator=self.locator).resolve_module_name()
        names, takes_others = _parameters(target)
        for name in [key for key in component if key not in ConfigComponent.non_arg_keys | names]:
            if not takes_others or get_close_matches(name, names, cutoff=_SLIP):
                raise ValueError(f"{target} ({_written(path)}) takes no argument '{name}'{_nearest(name, names)}")


def _parameters(target: Any) -> tuple[set[str], bool]:
    """Names of the arguments of a target, and whether it takes others too, of which nothing is known."""
    names: set[str] = set()
    try:
        function = locate(target)
        owners = [function]
        if isinstance(function, type) and function.__module__.split(".")[0] == __name__.split(".")[0]:
            # Classes of this package hand further keywords to the class that they extend.
            owners = [kind.__init__ for kind in function.__mro__ if "__init__" in vars(kind)]
        for owner in owners:
            kinds = {name: parameter.kind for name, parameter in inspect.signature(owner).parameters.items()}
            names |= kinds.keys()
            if inspect.Parameter.VAR_KEYWORD not in kinds.values():
                return names, False
    except Exception:
        # An expression, what has no signature, or what cannot be imported, which MONAI reports.
        return set(), True
    return names, True


def _entries(value: Any, path: str) -> Iterable[tuple[str | int, str, Any]]:
    """Key, name and content of what a part of a config holds."""
    return ReferenceResolver.iter_subconfigs(path, value) if isinstance(value, (dict, list)) else ()


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All parts of a config, with their names."""
    yield path, value
    for _, name, part in _entries(value, path):
        yield from _walk(part, name)


def _references(config: Any) -> Iterator[str]:
    """Names that the strings of a config refer to."""
    for path, part in _walk(config):
        if isinstance(part, str):
            text = ConfigParser.resolve_relative_ids(path, part)
            yield from ReferenceResolver.match_refs_pattern(text)
            if text.startswith(MACRO_KEY):
                file, name = ConfigParser.split_path_id(text[1:])
                yield from [] if file else [name]


def _has_expressions(value: Any) -> bool:
    """Whether it is a list such as MONAI runs."""
    return isinstance(value, list) and any(map(ConfigExpression.is_expression, value))


def _written(name: str) -> str:
    """A name as users write it: MONAI takes both."""
    return name.replace(ID_SEP_KEY, "#")


def _nearest(name: str, known: Collection[str] | Mapping[str, str]) -> str:
    """The end of a message: up to three of the known names that are like this one, or what they stand for."""
    initials = "".join(word[:1] for word in name.split("_"))  # lr, for learning_rate
    matches = [initials] if initials in known else get_close_matches(name, known)
    names = [known[match] if isinstance(known, Mapping) else match for match in matches]
    return f": did you mean {' or '.join(names)}?" if names else ""
