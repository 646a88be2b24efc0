"""Ignite handlers of fine-tuning: validation Dice, log, best model with early stopping, pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.handlers import IgniteMetricHandler
from monai.metrics import DiceMetric
from monai.utils import convert_to_numpy
from torch.utils.tensorboard import SummaryWriter

from pgl_ext.distributed import launched_rank_and_world_size
from pgl_ext.handlers import MetricsLog
from pgl_ext.segmentation.cases import segmented_items
from pgl_ext.settings import check_positive
from pgl_ext.task import SegmentationTask
from pgl_ext.weights.files import save_weights
from pgl_ext.weights.records import ModelRecord

__all__ = ["BestModel", "OverlayPictures", "SegmentationMetricsLog", "ValidationDice"]

logger = logging.getLogger(__name__)

_SCORE = "val_mean_dice"


class ValidationDice(IgniteMetricHandler):
    """Dice of the validation cases as evaluation defines it: the mean over organs, and of these over cases.

    An organ that is in the prediction alone has Dice 0; one that is in neither, or is not annotated, takes no part.
    MONAI's ``MeanDice`` would leave out the former, and count the last.
    The evaluator's outputs are masks ``pred`` and ``label`` (organs, X, Y, Z), see ``OrganMasksd``. Its batch may
    have ``annotated`` (organs,). Details: (cases, organs), NaN for what takes no part.
    """

    def __init__(self) -> None:
        # It collects the cases of all processes, and averages them.
        super().__init__(DiceMetric())

    def iteration_completed(self, engine: Engine) -> None:
        for data in segmented_items(engine):
            prediction, reference = data["pred"], data["label"]
            common, predicted, expected = (m.sum((1, 2, 3)) for m in (prediction & reference, prediction, reference))
            dice = 2 * common / (predicted + expected)
            if "annotated" in data:
                dice = dice.masked_fill(~data["annotated"].to(dice.device), math.nan)
            # Masks of a large volume are on the CPU, those of others are not.
            self.metric_fn.append(dice.to(engine.state.device))


class SegmentationMetricsLog(MetricsLog):
    """The log of a fine-tuning run: loss and learning rate, and of each validation the Dice of every organ.

    Args:
        output_dir: folder of ``metrics.csv``, ``tensorboard/`` and ``metrics.png``.
        evaluator: has the metric ``val_mean_dice`` with its details (cases, organs).
        patches_per_epoch: over all processes.
        task: the organs.
        interval: optimiser steps between rows.
    """

    def __init__(
        self,
        output_dir: PathLike,
        evaluator: Engine,
        patches_per_epoch: int,
        task: SegmentationTask,
        interval: int = 10,
    ) -> None:
        self.names = tuple(f"val_dice_{name}" for name in task.names)
        columns = ("loss", "lr", "patches_per_s", "read_errors", _SCORE, *self.names)
        super().__init__(output_dir, evaluator, patches_per_epoch, columns, "patches_per_s", interval)

    def validation_metrics(self, evaluator: Engine, engine: Engine) -> dict[str, float]:
        # There is no score of an organ that no validation case has, or that was annotated in none.
        per_organ = torch.nanmean(evaluator.state.metric_details[_SCORE].float(), dim=0).tolist()
        scores = {name: score for name, score in zip(self.names, per_organ, strict=True) if not math.isnan(score)}
        return {_SCORE: float(evaluator.state.metrics[_SCORE]), **scores}


@dataclass(eq=False, repr=False)
class BestModel:
    """Writes the model that is best on validation, and stops training where it has not become better for long.

    Of a run that was never validated it writes the model as it is in the end.

    Args:
        evaluator: validates at the end of epochs; has the metric ``val_mean_dice``.
        network: the segmentation network itself, not its distributed wrapper.
        path: model file (``.pt``), a plain state dict; a JSON beside it says how to build the network and use it.
        description: for the record beside it: ``task``, ``network``, ``input`` and others, see :class:`ModelRecord`.
        patience: epochs without a better score after which training stops; None: never.
        rank: this process; only rank 0 writes. Default: as torchrun started it.
        kept_steps: optimiser steps after which the model is kept beside it too, as ``model_step_400.pt``.

    Raises:
        ValueError: ``patience`` is less than 1.
    """

    evaluator: Engine
    network: torch.nn.Module
    path: PathLike
    description: Mapping[str, Any]
    patience: int | None = None
    rank: int | None = None
    kept_steps: Sequence[int] = ()

    best_score, best_epoch, last_epoch = -math.inf, 0, 0

    def __post_init__(self) -> None:
        self.rank = launched_rank_and_world_size()[0] if self.rank is None else self.rank
        if self.patience is not None and self.patience < 1:
            raise ValueError(
                f'patience must be at least 1 epoch, got {self.patience}: set --patience "\\$None" never to stop early.'
            )

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._stop_if_patience_is_over)
        self.evaluator.add_event_handler(Events.COMPLETED, self._validated, engine)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        for step in self.kept_steps:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=step), self._keep)

    def _keep(self, engine: Engine) -> None:
        path = Path(self.path)
        self._save(engine, path.with_name(f"{path.stem}_step_{engine.state.iteration}{path.suffix}"))

    def _validated(self, evaluator: Engine, engine: Engine) -> None:
        score = float(evaluator.state.metrics[_SCORE])
        self.last_epoch = engine.state.epoch
        if score > self.best_score:
            self.best_score, self.best_epoch = score, engine.state.epoch
            self._save(engine)
        self._stop_if_patience_is_over(engine)

    def _save(self, engine: Engine, path: PathLike | None = None) -> None:
        if self.rank > 0:
            return
        score = {_SCORE: self.best_score} if self.best_epoch else {}
        content = {**self.description, "steps": engine.state.iteration, "epoch": engine.state.epoch, **score}
        save_weights(
            self.network.state_dict(), path or self.path, ModelRecord.from_json(content, "the config's description")
        )

    def _stop_if_patience_is_over(self, engine: Engine) -> None:
        if self.patience is not None and self.last_epoch - self.best_epoch >= self.patience:
            best = f"the best {_SCORE}, {self.best_score:.4f}, was that of epoch {self.best_epoch}"
            logger.info("early stopping at epoch %d: %s", self.last_epoch, best)
            engine.terminate()

    def _finish(self, engine: Engine) -> None:
        if self.rank > 0:
            return
        if self.best_epoch:
            logger.info("best model, %s %.4f of epoch %d: %s", _SCORE, self.best_score, self.best_epoch, self.path)
        elif engine.state.iteration >= engine.state.max_epochs * engine.state.epoch_length:
            logger.info("there was no validation to find the best model by: %s is the last one", self.path)
            self._save(engine)

    def state_dict(self) -> dict[str, float | int]:
        return {name: getattr(self, name) for name in ("best_score", "best_epoch", "last_epoch")}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


@dataclass(eq=False, repr=False)
class OverlayPictures:
    """Draws reference and prediction of the last validation case, to TensorBoard and ``overlay.png``; in one process.

    Args:
        evaluator: its batch has ``image``, its output masks ``pred`` and ``label`` (organs, X, Y, Z).
        output_dir: folder of ``overlay.png`` and ``tensorboard/``.
        task: the organs.
        spacing: of the volumes, in mm; None: taken as equal on all axes.
        interval: validations between pictures.

    Raises:
        ValueError: where ``interval`` is less than 1.
    """

    evaluator: Engine
    output_dir: PathLike
    task: SegmentationTask
    spacing: Sequence[float] | None = None
    interval: int = 5

    _validations = 0

    def __post_init__(self) -> None:
        remedy = "to draw only the first and the last validation, set it above their number"
        check_positive(self.interval, "picture_interval", remedy)

    def attach(self, engine: Engine) -> None:
        if launched_rank_and_world_size()[0] > 0:
            return
        self.evaluator.add_event_handler(Events.COMPLETED, self._validated, engine)
        engine.add_event_handler(Events.COMPLETED, self._draw)

    def _validated(self, evaluator: Engine, engine: Engine) -> None:
        if self._validations % self.interval == 0:
            self._draw(engine)
        self._validations += 1

    def _draw(self, engine: Engine) -> None:
        from pgl_ext.figures.base import figure_to_array
        from pgl_ext.figures.overlays import plot_overlay

        state = self.evaluator.state
        if not state.output:
            return

        image, output = convert_to_numpy(state.batch[-1]["image"]), state.output[-1]
        masks = {"reference": convert_to_numpy(output["label"]), "prediction": convert_to_numpy(output["pred"])}
        folder, spacing, step = Path(self.output_dir), self.spacing or (1.0, 1.0, 1.0), engine.state.iteration
        figure = plot_overlay(image[0], masks, self.task.names, spacing, folder / "overlay.png", f"step {step}")
        with SummaryWriter(str(folder / "tensorboard")) as writer:
            writer.add_image("overlay", figure_to_array(figure), step, dataformats="HWC")
