"""Checkpoints from which a run goes on as if it had never stopped."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from ignite.engine import Engine, Events
from monai.config import PathLike

from pgl_ext.data.seen import NO_FILES
from pgl_ext.distributed import gather, launched_rank_and_world_size, rank_and_world_size
from pgl_ext.files import claim_folder, release_folder, write_atomically
from pgl_ext.networks.base import encoder_of
from pgl_ext.settings import check_positive, flat_entries, parse_bool
from pgl_ext.weights.files import load_state, save_decoder, save_encoder
from pgl_ext.weights.records import EncoderRecord, InputRecord

__all__ = ["CheckpointFolder", "CheckpointHandler"]

logger = logging.getLogger(__name__)

_SCANS = "data#scans"
# Entries that say what a run started from, which no longer matters when it is resumed.
_START = ("pretrained", "pretrained_encoder", "pretrained_decoder")


class CheckpointFolder:
    """The checkpoints of one run, named by optimiser step.

    Args:
        folder: where they lie; made when the first is written.
        keep_last: how many are kept.

    Raises:
        ValueError: ``keep_last`` is less than 1.
    """

    def __init__(self, folder: PathLike, keep_last: int = 3) -> None:
        self.folder = Path(folder)
        self.keep_last = check_positive(keep_last, "keep_last", "a run is resumed from the last one")

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        steps = {path: path.stem.removeprefix("checkpoint_") for path in self.folder.glob("checkpoint_*.pt")}
        return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))

    def write(self, content: Mapping, step: int) -> Path:
        """Write the checkpoint of a step, complete or not at all, and remove the oldest ones."""
        path = self.folder / f"checkpoint_{step:08d}.pt"
        write_atomically(lambda file: torch.save(dict(content), file), path)
        for old in self.paths()[: -self.keep_last]:
            old.unlink()
        return path

    def newest_intact(self) -> tuple[Path, dict]:
        """The newest checkpoint that can be read, and its content; damaged ones are passed over with a warning.

        Raises:
            FileNotFoundError: where there is none.
        """
        for path in reversed(self.paths()):
            try:
                return path, load_state(path)
            except ValueError as error:
                logger.warning("passed over a damaged checkpoint: %s", error)
        raise FileNotFoundError(
            f"nothing to resume from: {self.folder} holds no intact checkpoint. Start anew without --resume."
        )


@dataclass(eq=False, repr=False)
class CheckpointHandler:
    """Saves, resumes, and stops on SIGTERM and Ctrl-C; the first process alone writes.

    A checkpoint holds the network (online and target), optimiser, schedule, loss scaler, the state of every object
    given, step and epoch, the sampler's position and the random states of every process. Files hold tensors and plain
    values only.

    Args:
        folder: folder of the checkpoints.
        network: the method or segmentation network itself, not its distributed wrapper.
        objects: further objects with ``state_dict`` and ``load_state_dict``, by name.
        sampler: the training data's ``EpochBatchSampler``.
        encoder_path: encoder file written with every checkpoint; None: none.
        description: what the record of encoder and decoder file says beside architecture, method and steps; ``input``
            among it, see :class:`~pgl_ext.weights.EncoderRecord`.
        interval: epochs between checkpoints; the end of the run is always saved.
        keep_last: how many are kept.
        resume: go on from the newest intact checkpoint. Where torchrun starts a failed run again, so does that.
        decoder_path: decoder file of a method that pre-trains a decoder, like ``encoder_path``.
        overwrite: remove another run's checkpoints.

    Raises:
        FileExistsError: as training starts, the folder holds another run's checkpoints and neither ``resume`` nor
            ``overwrite`` is true; or another run that goes on at this moment has the folder above it.
        ValueError: ``interval`` or ``keep_last`` is less than 1, or ``input`` is not as a record has it.
    """

    folder: InitVar[PathLike]
    network: torch.nn.Module
    objects: Mapping
    sampler: Any
    encoder_path: PathLike | None = None
    description: Mapping = field(default_factory=dict)
    interval: int = 5
    keep_last: InitVar[int] = 3
    resume: bool = False
    decoder_path: PathLike | None = None
    overwrite: bool = False

    _saved_step = -1

    def __post_init__(self, folder: PathLike, keep_last: int) -> None:
        self.folder = CheckpointFolder(folder, keep_last)
        # Now, and not as the first checkpoint is written.
        InputRecord.from_json(self.description.get("input", {}), "the config's description")
        check_positive(self.interval, "checkpoint_interval", "to save only at the end, set it above max_epochs")
        self.resume = parse_bool(self.resume, "resume")
        self.overwrite = parse_bool(self.overwrite, "overwrite")
        self.rank = launched_rank_and_world_size()[0]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop_within_epoch)
        engine.add_event_handler(Events.COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, lambda: release_folder(self.folder.folder.parent))

    def _start(self, engine: Engine) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, partial(_request_stop, engine))
            # Otherwise it is ignored, as a script's background jobs do.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, partial(_request_stop, engine))
                engine.add_event_handler(Events.COMPLETED, signal.signal, signal.SIGINT, signal.default_int_handler)
        if engine.state.iteration > 0:
            # A further run in the same process, such as a round of federated learning: the next batches, not the first.
            self.sampler.start_step = engine.state.iteration
            return
        # Added only now, so that it comes after every other handler's: what validation at the end of the epoch finds,
        # such as the best score so far, belongs into the checkpoint.
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        # As the first process finds it: the others may run on other machines.
        resumes = self.resume or gather(self.rank == 0 and self._is_restart())[0]
        if not resumes and not self.overwrite and self.folder.paths():
            raise FileExistsError(
                f"{self.folder.folder} already holds checkpoints: continue with --resume true, begin anew with "
                "--overwrite true, which removes them, or choose another --output_dir."
            )
        if self.rank == 0:
            claim_folder(self.folder.folder.parent)
        if resumes:
            self._load(engine)
        elif self.overwrite and self.rank == 0:
            # Not left to the first that is written: the oldest go then, and those are not of the other run.
            for path in self.folder.paths():
                path.unlink()
        if self.rank == 0:
            self.folder.folder.mkdir(parents=True, exist_ok=True)
            (self.folder.folder / "job").write_text(_job(), encoding="utf-8")

    def _is_restart(self) -> bool:
        """Whether torchrun has started this run again, and not one that another run's folder has stopped."""
        job = self.folder.folder / "job"
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        return restarted and job.is_file() and job.read_text() == _job() and bool(self.folder.paths())

    def _stop_within_epoch(self, engine: Engine) -> None:
        if engine.state.iteration % engine.state.epoch_length:
            self._stop_if_agreed(engine)

    def _epoch_completed(self, engine: Engine) -> None:
        if engine.state.epoch % self.interval == 0:
            self.save(engine)
        self._stop_if_agreed(engine)

    def _stop_if_agreed(self, engine: Engine) -> None:
        if engine.stop_agreed:
            self.save(engine)
            logger.warning("stopped on request at step %d; continue with --resume true", engine.state.iteration)
            engine.terminate()

    def save(self, engine: Engine) -> None:
        """Write a checkpoint, the encoder file and the decoder file, once per step; all processes have to call it."""
        step = engine.state.iteration
        if step == self._saved_step:
            return
        self._saved_step = step
        random_states = gather(_random_state())
        if self.rank > 0:
            return
        record = self._record(engine)
        content = {
            "network": self.network.state_dict(),
            "optimizer": engine.optimizer.state_dict(),
            "lr_scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else {},
            "scaler": engine.scaler.state_dict(),
            "objects": {name: item.state_dict() for name, item in self.objects.items()},
            "step": step,
            "epoch_length": engine.state.epoch_length,
            "max_epochs": engine.state.max_epochs,
            "read_errors": engine.read_errors,
            "sampler": self.sampler.state_dict(),
            "random": random_states,
            "description": record.to_json(),
        }
        path = self.folder.write(content, step)
        if self.encoder_path is not None:
            save_encoder(encoder_of(self.network), self.encoder_path, record)
        if self.decoder_path is not None and self.network.decoder_state():
            save_decoder(self.network, self.decoder_path, record)
        logger.info("saved %s", path)

    def _record(self, engine: Engine) -> EncoderRecord:
        encoder = encoder_of(self.network)
        content = {
            "architecture": encoder.architecture,
            "stride": list(encoder.level_strides[-1]),
            "channels": list(encoder.level_channels),
            "method": type(self.network).__name__,
            "steps": engine.state.iteration,
            "input": {},
            "pairs": self.sampler.draws * engine.state.iteration // engine.state.epoch_length,
            **self.description,
        }
        return EncoderRecord.from_json(content, "the config's description")

    def _check_settings(self, path: Path, recorded: Mapping) -> None:
        """Turn settings away that the optimiser's state would undo, or that the first half was not trained with."""
        before = flat_entries(EncoderRecord.from_json(recorded, path).to_json())
        changed = [
            f"{name} was {before[name]} and is {value}"
            for name, value in flat_entries(self.description).items()
            if name in before
            and name not in _START
            and _as_text(before[name]) != _as_text(value)
            # Of scans that are lost meanwhile, the volumes are cached.
            and not (name == _SCANS and set(value) <= {*before[name], NO_FILES})
        ]
        if changed:
            raise ValueError(
                f"{path} belongs to a run with other settings: {'; '.join(changed)}. Resume with the same ones, or "
                "begin anew in another --output_dir."
            )
        if _SCANS in before:  # lost ones were seen all the same
            data = {**self.description.get("data", {}), "scans": before[_SCANS]}
            self.description = {**self.description, "data": data}

    def _load(self, engine: Engine) -> None:
        path, content = self.folder.newest_intact()
        if (content["epoch_length"], content["max_epochs"]) != (engine.state.epoch_length, engine.state.max_epochs):
            raise ValueError(
                f"{path} belongs to a run of {content['max_epochs']} epochs of {content['epoch_length']} steps, this "
                f"one has {engine.state.max_epochs} of {engine.state.epoch_length}: resume with the same data and "
                "settings."
            )
        self._check_settings(path, content["description"])
        self.sampler.resume(content["step"], content["sampler"])
        self.network.load_state_dict(content["network"])
        engine.optimizer.load_state_dict(content["optimizer"])
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(content["lr_scheduler"])
        engine.scaler.load_state_dict(content["scaler"])
        for name, state in content["objects"].items():
            self.objects[name].load_state_dict(state)
        engine.read_errors = content["read_errors"]
        engine.load_state_dict({**content, "iteration": content["step"]})
        random_states, processes = content["random"], rank_and_world_size()[1]
        if len(random_states) != processes:
            logger.warning(
                f"{path} holds the random states of {len(random_states)} processes, this run has {processes}: it will "
                "draw other random numbers than one that never stopped."
            )
        if self.rank < len(random_states):
            # Not now: making the loaders' iterators, for training and for validation before it, draws random numbers.
            first_step = Events.ITERATION_STARTED(once=content["step"] + 1)
            engine.add_event_handler(first_step, lambda: _set_random_state(random_states[self.rank]))
        logger.info("resumed from %s at step %d", path, content["step"])


def _job() -> str:
    """What tells a job from all others: the process that has started this one, torchrun's agent, and when it began."""
    parent = os.getppid()
    return f"{parent} {psutil.Process(parent).create_time()} {socket.gethostname()}"


def _request_stop(engine: Engine, number: int, frame: object) -> None:
    """Handle a signal: the trainer ends its step, saves, and ends. A second Ctrl-C is not waited for."""
    engine.stop_requested, engine.stop_status = True, 128 + number
    # Torchrun sends a second one by itself.
    if number == signal.SIGINT and launched_rank_and_world_size()[1] == 1:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _random_state() -> dict:
    """Python's, NumPy's and PyTorch's random states, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _set_random_state(state: Mapping) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
