"""Ignite handlers around a method: momentum, logs, pictures, warnings."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.config import PathLike
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pgl_ext.distributed import launched_rank_and_world_size
from pgl_ext.engines import TrainerEvents
from pgl_ext.files import read_csv, writing
from pgl_ext.settings import check_positive

__all__ = [
    "CollapseWarning",
    "MetricsLog",
    "PretrainMetricsLog",
    "ProgressBar",
    "TargetEMA",
    "TrainingProgress",
    "ViewPictures",
]

logger = logging.getLogger(__name__)

_IN_BAR = ("loss", "lr", "tau", "val_mean_dice", "pairs_per_s", "patches_per_s")
_COLLAPSED = 0.2  # share of the healthy standard deviation


@dataclass(eq=False, repr=False)
class TargetEMA:
    """Moves a method's target modules after every optimiser step: xi <- tau xi + (1 - tau) theta (equation 10).

    tau_k = 1 - (1 - base_momentum) (cos(pi k / K) + 1) / 2 rises from ``base_momentum`` to 1 over K optimiser steps.
    Only parameters move: the target's batch-norm statistics come from its own forward passes.

    Args:
        method: has ``momentum_pairs()``.
        total_steps: K.
        base_momentum: tau at the start.
    """

    method: Any
    total_steps: int
    base_momentum: float = 0.996

    step = 0

    def __post_init__(self) -> None:
        check_positive(self.total_steps, "total_steps", "train for an epoch or more")
        if not 0 <= self.base_momentum <= 1:
            raise ValueError(f"base_momentum must lie in [0, 1], got {self.base_momentum}.")

    @property
    def momentum(self) -> float:
        """tau for the next update."""
        progress = min(self.step / self.total_steps, 1.0)
        return 1 - (1 - self.base_momentum) * (math.cos(math.pi * progress) + 1) / 2

    def attach(self, engine: Engine) -> None:
        # A trainer without loss scaling never skips a step, so that its iterations are its optimiser steps.
        event = TrainerEvents.OPTIMIZER_STEP_COMPLETED
        engine.add_event_handler(event if engine.has_registered_events(event) else Events.ITERATION_COMPLETED, self)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        tau = self.momentum
        pairs = list(self.method.momentum_pairs())
        online, target = ([p for pair in pairs for p in pair[side].parameters()] for side in (0, 1))
        # A method without a target has no tau to show.
        if target:
            torch._foreach_lerp_(target, online, 1 - tau)
            engine.state.metrics["tau"] = tau
        self.step += 1

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


@dataclass(eq=False, repr=False)
class TrainingProgress:
    """Sets a method's ``progress`` at the start of each epoch: completed epochs / epochs, in [0, 1).

    Args:
        method: has a scalar buffer ``progress``.
    """

    method: torch.nn.Module

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        self.method.progress.fill_((engine.state.epoch - 1) / engine.state.max_epochs)


@dataclass(eq=False, repr=False)
class ProgressBar:
    """A bar over all optimiser steps, titled, with some metrics and the time left; in the first process only."""

    title: str = "pre-training"

    _bar = None

    def attach(self, engine: Engine) -> None:
        if launched_rank_and_world_size()[0] > 0:
            return
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self._close)

    def _start(self, engine: Engine) -> None:
        total = engine.state.max_epochs * engine.state.epoch_length
        self._bar = tqdm(total=total, initial=engine.state.iteration, desc=self.title, unit="step", smoothing=0.05)

    def _update(self, engine: Engine) -> None:
        metrics = engine.state.metrics
        shown = {name: f"{metrics[name]:.4g}" for name in _IN_BAR if name in metrics}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def _close(self, engine: Engine, error: BaseException | None = None) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is not None:
            raise error


@dataclass(eq=False, repr=False)
class MetricsLog:
    """Writes metrics.csv and TensorBoard scalars, measures samples per second, and draws the curves at the end.

    It does so in the first process only.

    Args:
        output_dir: folder of ``metrics.csv``, ``tensorboard/`` and ``metrics.png``.
        evaluator: its metrics are written after each of its runs.
        samples_per_epoch: over all processes.
        columns: of ``metrics.csv``, after step and epoch.
        speed: name of the samples per second among the metrics.
        interval: optimiser steps between rows.
        healthy_std: standard deviation of features that have not collapsed, drawn as a line; None: no line.

    Raises:
        ValueError: ``interval`` is less than 1.
    """

    output_dir: PathLike
    evaluator: Engine
    samples_per_epoch: int
    columns: Sequence[str]
    speed: str
    interval: int = 10
    healthy_std: float | None = None

    def __post_init__(self) -> None:
        self.columns = ("step", "epoch", *self.columns)
        self.path = Path(self.output_dir, "metrics.csv")
        check_positive(self.interval, "log_interval", "to log validations only, set it above the number of steps")

    def validation_metrics(self, evaluator: Engine, engine: Engine) -> dict[str, float]:
        """What is written of a validation, names beginning with ``val_``."""
        raise NotImplementedError

    def attach(self, engine: Engine) -> None:
        if launched_rank_and_world_size()[0] > 0:
            return
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure_speed)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self._log_training)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        self.evaluator.add_event_handler(Events.COMPLETED, self._log_validation, engine)

    def _start(self, engine: Engine) -> None:
        step = engine.state.iteration
        # Steps that are done again would stand there twice.
        rows = read_csv(self.path) if step > 0 and self.path.is_file() else []
        rows = [row for row in rows if row["step"].isdecimal() and self._is_kept(row, step)]
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        self._rows = len(rows)
        self._writer = SummaryWriter(str(self.path.with_name("tensorboard")), purge_step=step + 1 if step else None)
        self._clock, self._clock_step = time.perf_counter(), step

    def _is_kept(self, row: dict[str, str], step: int) -> bool:
        """Whether a run that goes on from a step keeps an earlier row."""
        return int(row["step"]) <= step

    def _measure_speed(self, engine: Engine) -> None:
        elapsed = time.perf_counter() - self._clock
        # A second smooths enough, and leaves validation and checkpoints in: it is the speed that the user gets.
        if elapsed > 1:
            samples = (engine.state.iteration - self._clock_step) * self.samples_per_epoch / engine.state.epoch_length
            engine.state.metrics[self.speed] = samples / elapsed
            self._clock, self._clock_step = time.perf_counter(), engine.state.iteration

    def _log_training(self, engine: Engine) -> None:
        self._write(engine, {key: value for key, value in engine.state.metrics.items() if not key.startswith("val_")})

    def _log_validation(self, evaluator: Engine, engine: Engine) -> None:
        metrics = self.validation_metrics(evaluator, engine)
        engine.state.metrics.update(metrics)
        self._write(engine, metrics)
        shown = ", ".join(f"{name.removeprefix('val_')} {value:.4f}" for name, value in metrics.items())
        logger.info("step %d, validation: %s", engine.state.iteration, shown.replace("_", " "))

    def _write(self, engine: Engine, values: dict[str, float]) -> None:
        step = engine.state.iteration
        self._rows += 1
        with writing(self.path), open(self.path, "a", newline="", encoding="utf-8") as file:
            row = {"step": step, "epoch": engine.state.epoch, **{k: f"{v:.6g}" for k, v in values.items()}}
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(row)
        for name, value in values.items():
            group = "validation/" + name.removeprefix("val_") if name.startswith("val_") else "training/" + name
            self._writer.add_scalar(group, value, step)

    def _finish(self, engine: Engine) -> None:
        self._writer.close()
        # A run of fewer steps than lie between rows, without a validation, has nothing to show.
        if self._rows:
            from pgl_ext.figures.curves import plot_metrics

            plot_metrics(self.path, self.path.with_suffix(".png"), self.healthy_std)


class PretrainMetricsLog(MetricsLog):
    """The log of a pre-training run.

    Args:
        output_dir: folder of ``metrics.csv``, ``tensorboard/`` and ``metrics.png``.
        evaluator: its first run, before the first step, is the untrained encoder, whose retrieval is repeated beside
            the later ones.
        pairs_per_epoch: over all processes.
        logged: further columns, for what the method logs beside loss and feature spread.
        kwargs: further arguments of :class:`MetricsLog`.
    """

    untrained: float | None = None

    def __init__(
        self, output_dir: PathLike, evaluator: Engine, pairs_per_epoch: int, logged: Sequence[str] = (), **kwargs: Any
    ) -> None:
        training = ("loss", "feature_std", "lr", "tau", "pairs_per_s", "read_errors", *logged)
        validation = ("loss", "feature_std", "retrieval_top1", "retrieval_untrained", "retrieval_chance")
        columns = (*training, *(f"val_{name}" for name in validation))
        super().__init__(output_dir, evaluator, pairs_per_epoch, columns, "pairs_per_s", **kwargs)

    def validation_metrics(self, evaluator: Engine, engine: Engine) -> dict[str, float]:
        metrics = evaluator.state.metrics
        if engine.state.iteration == 0:
            self.untrained = metrics["val_retrieval_top1"]
        return metrics if self.untrained is None else {**metrics, "val_retrieval_untrained": self.untrained}

    def _is_kept(self, row: dict[str, str], step: int) -> bool:
        # Validation runs at the start too, and so again at the step that a run goes on from.
        return super()._is_kept(row, step - 1 if row["val_loss"] else step)

    def state_dict(self) -> dict[str, float | None]:
        return {"untrained": self.untrained}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.untrained = state["untrained"]


@dataclass(eq=False, repr=False)
class ViewPictures:
    """Draws aligned views with their overlap, to TensorBoard and to ``views.png``; in the first process only.

    Args:
        output_dir: folder of ``views.png`` and ``tensorboard/``.
        interval: epochs between pictures; one is always drawn at the first step.

    Raises:
        ValueError: ``interval`` is less than 1.
    """

    output_dir: PathLike
    interval: int = 50

    def __post_init__(self) -> None:
        check_positive(self.interval, "picture_interval", "to draw only once, set it above max_epochs")

    def attach(self, engine: Engine) -> None:
        if launched_rank_and_world_size()[0] > 0:
            return
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self._draw)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self._draw)

    def _draw(self, engine: Engine) -> None:
        from pgl_ext.figures.base import figure_to_array
        from pgl_ext.figures.views import plot_views

        batch = engine.state.batch
        figure = plot_views(batch["views"], batch["affines"], Path(self.output_dir, "views.png"))
        with SummaryWriter(str(Path(self.output_dir, "tensorboard"))) as writer:
            writer.add_image("views", figure_to_array(figure), engine.state.iteration, dataformats="HWC")


@dataclass(eq=False, repr=False)
class CollapseWarning:
    """Warns where the features' standard deviation stays far below its healthy value; in the first process only.

    Args:
        healthy_std: 1 / sqrt(channels of the compared features).
        patience: consecutive steps below a fifth of that before a warning; it is repeated every ten times as many.
    """

    healthy_std: float
    patience: int = 20

    _below = 0

    def attach(self, engine: Engine) -> None:
        if launched_rank_and_world_size()[0] > 0:
            return
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        value = engine.state.metrics["feature_std"]
        self._below = self._below + 1 if value < _COLLAPSED * self.healthy_std else 0
        if self._below == self.patience or (self._below and self._below % (10 * self.patience) == 0):
            logger.warning(
                f"THE FEATURES ARE COLLAPSING: their standard deviation is {value:.5f} at step "
                f"{engine.state.iteration}, healthy is about {self.healthy_std:.5f}. The encoder is learning to answer "
                "the same everywhere. Use a larger micro_batch_size (batch norm needs several samples), a lower --lr, "
                "or start from another seed."
            )
