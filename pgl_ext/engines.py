"""Trainers of self-supervised methods and of segmentation, and the evaluator of pre-training."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import EventEnum
from ignite.metrics import Average
from monai.engines import SupervisedEvaluator, SupervisedTrainer, Trainer
from torch.optim.lr_scheduler import LRScheduler

from pgl_ext.aligner import PriorGuidedAligner
from pgl_ext.distributed import rank_and_world_size
from pgl_ext.retrieval import correspondence_retrieval
from pgl_ext.settings import check_positive, parse_bool

__all__ = ["PretrainEvaluator", "PretrainTrainer", "SegmentationTrainer", "StepTrainer", "TrainerEvents"]

# Affines are tiny and stay on the CPU: the aligner checks them there without waiting for the accelerator.
_HOST_KEYS = ("affines", "read_errors")


class TrainerEvents(EventEnum):
    """``OPTIMIZER_STEP_COMPLETED``: the weights have changed (not fired where a step was skipped)."""

    OPTIMIZER_STEP_COMPLETED = "optimizer_step_completed"


class StepTrainer(SupervisedTrainer):
    """One Ignite iteration is one optimiser step, over one batch in one or more micro-batches.

    Subclasses say how the loss of a micro-batch is computed. ``state.output`` is ``[{"loss": ..., ...}]`` with what
    they log, averaged over all processes, and ``state.metrics`` holds the same beside the learning rate that the step
    used (the last parameter group's) and the number of read errors so far.

    Args:
        device: where to train.
        max_epochs: epochs to run.
        train_data_loader: yields batches for one optimiser step of this process.
        network: what is trained, or ``DistributedDataParallel`` around it.
        optimizer: of the network's parameters that need gradients.
        lr_scheduler: stepped once per optimiser step.
        batch_transform: runs on each batch on the device, such as the intensity augmentations; its random state is set
            from seed, process and iteration before each, so that a resumed run draws the same.
        micro_batch_size: samples per forward and backward pass; gradients are accumulated over the batch. Batch norm
            sees one micro-batch. Default: the whole batch; ``"auto"``: the whole batch, or of its halves, quarters and
            so on the first that the device's memory holds; with one process alone.
        amp: mixed precision.
        amp_dtype: ``"bfloat16"``, or ``"float16"`` with loss scaling.
        seed: of ``batch_transform``.
        max_grad_norm: gradients of a larger norm, over all parameters, are scaled down to it; None: never.
        max_non_finite: stop after this many consecutive steps with a loss or gradients that are not finite. Each is
            skipped, and leaves weights and buffers, such as batch-norm statistics, as they were before it.
        kwargs: further arguments of ``monai.engines.SupervisedTrainer``, such as ``inferer`` and ``train_handlers``.

    Raises:
        FloatingPointError: loss or gradients stay non-finite.
        MemoryError: the device's memory does not hold a micro-batch.
        ValueError: ``micro_batch_size`` is less than 1, or ``"auto"`` in several processes.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LRScheduler | None = None,
        batch_transform: Callable[[dict], dict] | None = None,
        micro_batch_size: int | str | None = None,
        amp: bool = False,
        amp_dtype: str = "bfloat16",
        seed: int = 0,
        max_grad_norm: float | None = None,
        max_non_finite: int = 10,
        **kwargs: Any,
    ) -> None:
        self.lr_scheduler = lr_scheduler
        self.batch_transform = batch_transform
        self._is_auto = micro_batch_size == "auto"
        if self._is_auto and rank_and_world_size()[1] > 1:
            raise ValueError("micro_batch_size is 'auto', which one process alone can try: give --micro_batch_size N.")
        if not self._is_auto and micro_batch_size is not None:
            check_positive(micro_batch_size, "micro_batch_size", "set it to batch_size for one pass per step")
        self.micro_batch_size = None if self._is_auto else micro_batch_size
        self.amp_dtype = _amp_dtype(amp, amp_dtype)
        self.seed = seed
        self.max_grad_norm = max_grad_norm
        self.max_non_finite = max_non_finite
        self.read_errors = 0
        self.stop_requested = False  # by a signal to this process
        self.stop_status = 128 + signal.SIGTERM  # with which it then ends, as shells count it
        self.stop_agreed = False  # by any process, known to all
        self._non_finite = 0
        super().__init__(
            device,
            max_epochs,
            train_data_loader,
            network,
            optimizer,
            amp=self.amp_dtype is not None,
            decollate=False,
            event_names=[TrainerEvents],
            **{"loss_function": None, "non_blocking": True, **kwargs},
        )
        self.scaler = torch.amp.GradScaler(self.state.device.type, enabled=self.amp_dtype == torch.float16)

    def run(self) -> None:
        """Train until the end, or until a stop is requested.

        Raises:
            SystemExit: where a signal stopped the run before its end; with status 143 for SIGTERM, 130 for Ctrl-C.
        """
        # Not Trainer.run: it makes a new loss scaler, which would forget a resumed one's state.
        super(Trainer, self).run()
        if self.stop_agreed and self.state.iteration < self.state.max_epochs * self.state.epoch_length:
            raise SystemExit(self.stop_status)

    def compute_loss(self, batch: dict) -> dict[str, torch.Tensor]:
        """``"loss"``, a scalar to minimise, and further scalars to log."""
        raise NotImplementedError

    def _iteration(self, engine: StepTrainer, batchdata: dict) -> list[dict[str, float]]:
        batch = _to_device(batchdata, self.state.device, self.non_blocking)
        if self.batch_transform is not None:
            entropy = [self.seed, self.state.rank, self.state.iteration]
            self.batch_transform.set_random_state(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
            batch = self.batch_transform(batch)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        while (logged := self._gradients_that_fit(batch)) is None:
            self._restore(buffers)
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        # Not finite where one of them is not.
        logged["largest gradient"] = torch.nn.utils.get_total_norm(gradients, math.inf)
        logged = self._over_processes(logged, batchdata)
        if self._check_finite(logged["loss"], logged.pop("largest gradient")) and self._step():
            self.fire_event(TrainerEvents.OPTIMIZER_STEP_COMPLETED)
        else:
            self._restore(buffers)
        # Before the schedule goes on: the rate of this step.
        self.state.metrics.update(logged, lr=self.optimizer.param_groups[-1]["lr"], read_errors=self.read_errors)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return [logged]

    def _restore(self, buffers: list[torch.Tensor]) -> None:
        """Undo what forward passes have done to batch-norm statistics, where one NaN would stay for good."""
        for buffer, before in zip(self.network.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _gradients_that_fit(self, batch: dict) -> dict[str, torch.Tensor] | None:
        """See :meth:`_accumulate_gradients`; None where memory did not suffice, and smaller micro-batches are next."""
        total = len(next(iter(batch.values())))
        try:
            return self._accumulate_gradients(batch)
        except torch.OutOfMemoryError as error:
            size = min(self.micro_batch_size or total, total)
            if not self._is_auto or size == 1:
                remedy = f"--micro_batch_size {size // 2}, or auto" if size > 1 else "smaller views or patches"
                raise MemoryError(
                    f"{self.state.device} has no memory for {size} samples in a pass: try {remedy}."
                ) from error
            self.micro_batch_size = size // 2
        # Here, where nothing holds on to the tensors of the pass any more.
        self.logger.info("out of memory: going on with %d samples in a pass", self.micro_batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return None

    def _accumulate_gradients(self, batch: dict) -> dict[str, torch.Tensor]:
        """Backward passes of all micro-batches; returns the averages of what is logged."""
        total = len(next(iter(batch.values())))
        parts = self._number_of_parts(total)
        edges = [round(total * i / parts) for i in range(parts + 1)]
        logged: dict[str, torch.Tensor] = {}
        for start, stop in itertools.pairwise(edges):
            share = (stop - start) / total
            # Gradients travel between processes once per step, with the last micro-batch.
            waits = stop < total and hasattr(self.network, "no_sync")
            with self.network.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(self.state.device.type, self.amp_dtype, self.amp):
                    output = self.compute_loss({key: value[start:stop] for key, value in batch.items()})
                self.scaler.scale(output["loss"] * share).backward()
            for key, value in output.items():
                logged[key] = logged.get(key, 0) + value.detach() * share
        return logged

    def _number_of_parts(self, size: int) -> int:
        """Micro-batches of a step, as many in all processes, since synchronised batch norm waits for the others."""
        if self.micro_batch_size is None:
            return 1
        largest = smallest = size
        if rank_and_world_size()[1] > 1:
            # Shares of a batch can differ by one.
            sizes = torch.tensor([size, -size], device=self.state.device)
            dist.all_reduce(sizes, dist.ReduceOp.MAX)
            largest, smallest = sizes.abs().tolist()
        return min(math.ceil(largest / self.micro_batch_size), smallest)

    def _over_processes(self, logged: dict[str, torch.Tensor], batchdata: dict) -> dict[str, float]:
        """Average over processes, count read errors, and agree on stopping, in one exchange."""
        values = torch.stack([value.float() for value in logged.values()])
        read_errors = float(torch.as_tensor(batchdata.get("read_errors", 0)).sum())
        values = torch.cat([values, values.new_tensor([read_errors, float(self.stop_requested)])])
        processes = rank_and_world_size()[1]
        if processes > 1:
            dist.all_reduce(values)
            values[:-2] /= processes
        *averages, read_errors, stop = values.tolist()
        self.read_errors += int(read_errors)
        self.stop_agreed = stop > 0
        return dict(zip(logged, averages, strict=True))

    def _check_finite(self, loss: float, gradient: float) -> bool:
        # Loss scaling finds its scale by gradients that overflow, and skips their steps itself.
        if math.isfinite(loss) and (math.isfinite(gradient) or self.scaler.is_enabled()):
            self._non_finite = 0
            return True
        self._non_finite += 1
        name, value = ("largest gradient", gradient) if math.isfinite(loss) else ("loss", loss)
        self.logger.warning("step %d skipped: the %s is %s", self.state.iteration, name, value)
        if self._non_finite >= self.max_non_finite:
            raise FloatingPointError(
                f"the {name} has been {value} for {self._non_finite} steps in a row, up to step "
                f"{self.state.iteration}: begin anew with a lower learning rate (--lr), or, where --amp_dtype is "
                "float16, resume from the last checkpoint with bfloat16."
            )
        return False

    def _step(self) -> bool:
        """Change the weights, unless loss scaling finds that gradients overflowed; whether they have changed."""
        scale = self.scaler.get_scale()
        if self.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # The scale falls exactly where the step was skipped.
        return self.scaler.get_scale() >= scale


class PretrainTrainer(StepTrainer):
    """Trains a self-supervised method, whose ``forward(batch)`` returns the loss and what it logs.

    Args:
        args, kwargs: see :class:`StepTrainer`.
    """

    def compute_loss(self, batch: dict) -> dict[str, torch.Tensor]:
        return self.inferer(batch, self.network)


class SegmentationTrainer(StepTrainer):
    """Trains a segmentation network on batches with ``image`` (B, C, X, Y, Z) and whatever the loss compares with.

    Args:
        loss_function: maps logits (B, out_channels, X, Y, Z), in float32, and the batch to a scalar.
        args, kwargs: see :class:`StepTrainer`.
    """

    def __init__(self, *args: Any, loss_function: Callable[[torch.Tensor, dict], torch.Tensor], **kwargs: Any) -> None:
        super().__init__(*args, loss_function=loss_function, **kwargs)

    def compute_loss(self, batch: dict) -> dict[str, torch.Tensor]:
        logits = self.inferer(batch["image"], self.network)
        # Sums over a million voxels, which half precision could not hold.
        with torch.autocast(self.state.device.type, enabled=False):
            return {"loss": self.loss_function(logits.float(), batch)}


class PretrainEvaluator(SupervisedEvaluator):
    """Label-free validation: loss, feature standard deviation and correspondence retrieval on held-out volumes.

    ``state.metrics`` after a run, means over all pairs of views: ``val_loss``, ``val_feature_std``, what the method
    names in ``logged``, with ``val_`` before it, ``val_retrieval_top1`` and ``val_retrieval_chance`` (see
    ``retrieval.correspondence_retrieval``).

    Args:
        device, amp, amp_dtype: see :class:`StepTrainer`.
        val_data_loader: batches of the same form as in training, the same ones each time.
        network: the method itself, with ``encoder`` and ``logged``.
        kwargs: further arguments of ``monai.engines.SupervisedEvaluator``, such as ``inferer``.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: Iterable,
        network: torch.nn.Module,
        amp: bool = False,
        amp_dtype: str = "bfloat16",
        **kwargs: Any,
    ) -> None:
        self.amp_dtype = _amp_dtype(amp, amp_dtype)
        super().__init__(device, val_data_loader, network, amp=self.amp_dtype is not None, decollate=False, **kwargs)
        for name in ("loss", "feature_std", *network.logged, "retrieval_top1", "retrieval_chance"):
            # A row for each pair: the last batch may be smaller than the others.
            average = Average(lambda output, name=name: torch.full((output[0]["pairs"], 1), output[0][name]))
            average[0].attach(self, f"val_{name}")

    def _iteration(self, engine: PretrainEvaluator, batchdata: dict) -> list[dict[str, float | int]]:
        batch = _to_device(batchdata, self.state.device, self.non_blocking)
        views = batch["views"]
        self.network.eval()
        with torch.no_grad(), torch.autocast(self.state.device.type, self.amp_dtype, self.amp):
            logged = {key: float(value) for key, value in self.inferer(batch, self.network).items()}
            features = self.network.encoder.features(views.flatten(0, 1))[-1].unflatten(0, views.shape[:2])
        aligner = PriorGuidedAligner(centre=self.network.encoder.centres[-1])
        top1 = correspondence_retrieval(features, batch["affines"], tuple(views.shape[3:]), aligner)
        retrieval = {"retrieval_top1": float(top1.mean()), "retrieval_chance": 1 / math.prod(features.shape[3:])}
        return [{**logged, **retrieval, "pairs": len(views)}]


def _to_device(batch: dict, device: torch.device, non_blocking: bool) -> dict:
    return {
        key: value if key in _HOST_KEYS or not torch.is_tensor(value) else value.to(device, non_blocking=non_blocking)
        for key, value in batch.items()
    }


def _amp_dtype(amp: bool | str, name: str) -> torch.dtype | None:
    """The type of mixed precision; None without."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    if not parse_bool(amp, "amp"):
        return None
    if name not in dtypes:
        raise ValueError(f"amp_dtype must be one of {sorted(dtypes)}, got {name!r}.")
    return dtypes[name]
