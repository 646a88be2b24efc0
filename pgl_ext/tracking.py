"""What MONAI's ``--tracking mlflow`` leaves out: settings, files, and validation at its own epoch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler

__all__ = ["complete_mlflow", "complete_mlflow_evaluation"]


def complete_mlflow(
    trainer: Engine,
    evaluator: Engine,
    train_handlers: Iterable,
    validate_handlers: Iterable,
    output_dir: str | os.PathLike,
    files: Sequence[str | os.PathLike],
) -> None:
    """Complete the MLflow run of a training; without ``--tracking mlflow`` there is none, and nothing happens.

    MONAI puts an ``MLFlowHandler`` among the handlers of trainer and evaluator. The trainer's logs loss and learning
    rate of every step and its metrics of every epoch. Added here are the settings of the executed config as parameters,
    the metrics of each validation at the epoch that it belongs to, and files at the end.

    Args:
        trainer: its metrics ``val_*`` are those of the latest validation.
        evaluator: runs within the training.
        train_handlers: the trainer's.
        validate_handlers: the evaluator's.
        output_dir: where MONAI saves the executed config.
        files: what to log at the end beside that config, as far as it is there.
    """
    for handler in _of_mlflow(validate_handlers):
        # It reads the metrics before they are computed, and would call the validation's epochs those of the run.
        evaluator.remove_event_handler(handler.start, Events.STARTED)
        evaluator.remove_event_handler(handler.epoch_completed, Events.EPOCH_COMPLETED)
        evaluator.remove_event_handler(handler.complete, Events.COMPLETED)
    for handler in _of_mlflow(train_handlers):
        _CompletedRun(handler, _executed_config(handler, Path(output_dir)), files).attach(trainer, evaluator)


def complete_mlflow_evaluation(
    evaluator: Engine, handlers: Iterable, output_dir: str | os.PathLike, files: Sequence[str | os.PathLike]
) -> None:
    """Complete the MLflow run of an evaluation with settings and files; its metrics are there when its epoch ends.

    Args:
        evaluator: runs by itself.
        handlers: the evaluator's.
        output_dir: where MONAI saves the executed config.
        files: what to log at the end beside that config, as far as it is there.
    """
    for handler in _of_mlflow(handlers):
        run = _CompletedRun(handler, _executed_config(handler, Path(output_dir)), files)
        evaluator.add_event_handler(Events.STARTED, run.log_settings)


class _CompletedRun:
    def __init__(self, handler: MLFlowHandler, config: Path | None, files: Sequence[str | os.PathLike]) -> None:
        self.handler = handler
        self.settings = {} if config is None else _settings(json.loads(config.read_text(encoding="utf-8")))
        handler.artifacts = tuple(files) if config is None else (config, *files)
        handler.epoch_logger = self._log_training

    def attach(self, trainer: Engine, evaluator: Engine) -> None:
        trainer.add_event_handler(Events.STARTED, self.log_settings)
        trainer.add_event_handler(Events.STARTED, lambda engine: self._log_validation(None, engine))
        evaluator.add_event_handler(Events.COMPLETED, self._log_validation, trainer)

    @property
    def run_id(self) -> str:
        return self.handler.cur_run.info.run_id

    def log_settings(self) -> None:
        # A run that goes on has its parameters, which MLflow lets nobody change.
        known = self.handler.client.get_run(self.run_id).data.params
        for name in self.settings.keys() - known.keys():
            self.handler.client.log_param(self.run_id, name, self.settings[name])

    def _log_training(self, engine: Engine) -> None:
        self._log(engine, {k: v for k, v in engine.state.metrics.items() if not k.startswith("val_")})

    def _log_validation(self, _: Engine | None, engine: Engine) -> None:
        # Validation before the first step comes before the run's start, which logs it then.
        if self.handler.cur_run is not None:
            self._log(engine, {k: v for k, v in engine.state.metrics.items() if k.startswith("val_")})

    def _log(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            # Organs may have any name, metrics of MLflow may not.
            name = re.sub(r"[^\w.\- /]", "_", name)
            self.handler.client.log_metric(self.run_id, name, value, step=engine.state.epoch)


def _of_mlflow(handlers: Iterable) -> list[MLFlowHandler]:
    return [handler for handler in handlers if isinstance(handler, MLFlowHandler)]


def _executed_config(handler: MLFlowHandler, output_dir: Path) -> Path | None:
    """Where MONAI saved the config: not where it tells its handler if --output_dir was given, but the newest there."""
    told = [Path(path) for path in handler.artifacts if path]
    if not told or told[0].is_file():
        return told[0] if told else None
    return max(output_dir.glob("config_*.json"), default=None)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The top level of a config, by the names of the command line: plain values, and the classes of components."""
    values = {name: value.get("_target_") if isinstance(value, dict) else value for name, value in config.items()}
    shown = {name: value for name, value in values.items() if value is not None and not re.search("[$@%]", str(value))}
    return {name: value for name, value in shown.items() if name not in ("_meta_", "save_execute_config")}
