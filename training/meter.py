"""Losses, speed and progress since the last logged row."""

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from run.errors import Diverged
from run.machine import Machine
from run.settings import Settings
from training.batches import Batches
from training.checkpoints import Progress
from training.optimizers import learning_rate


class StepResult(NamedTuple):
    """What an update tells: float32 scalars, still on the device."""

    loss: Tensor  # mean over this rank's part of the batch
    gradient_norm: Tensor  # before clipping


class Meter:
    """Collects the results of updates, and makes a row of metrics.jsonl of them."""

    def __init__(
        self, settings: Settings, machine: Machine, batches: Batches, progress: Progress, flops_per_token: float
    ):
        self.settings, self.machine, self.batches, self.progress = settings, machine, batches, progress
        self.flops_per_token = flops_per_token

    def restart(self) -> None:
        """Begin a new row, and with it the measurement of time."""
        self.results: list[StepResult] = []
        self.started, self.waited = time.perf_counter(), self.batches.seconds_waited

    def record_validation(self, loss: float) -> float:
        """Keep a validation loss in the progress, and return it; Diverged where it is not finite."""
        progress = self.progress
        check_finite(loss, f"the validation loss is {loss}", progress.step)
        progress.val_loss = loss
        if progress.best_val_loss is None or loss < progress.best_val_loss:
            progress.best_val_loss, progress.best_step = loss, progress.step
        return loss

    def finish_row(self, step: int) -> dict[str, Any]:
        """The row of update `step`, for which the host waits; updates the progress. Diverged without finite numbers."""
        settings, progress, machine = self.settings, self.progress, self.machine
        losses = torch.stack([result.loss for result in self.results])
        machine.ranks.all_reduce([losses])
        losses = (losses / machine.ranks.world_size).tolist()
        norms = torch.stack([result.gradient_norm for result in self.results]).tolist()
        for number, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=step - len(losses) + 1):
            check_finite(loss + norm, f"the training loss is {loss}, its gradient's norm {norm}", number)
        seconds = time.perf_counter() - self.started
        tokens = settings.batch_size * settings.block_size  # a step
        speed, peak = len(losses) * tokens / seconds, machine.peak_flops()
        progress.step = step
        progress.seconds += seconds
        progress.clipped_steps += sum(norm > settings.grad_clip > 0 for norm in norms)
        return {
            "step": step,
            "tokens": step * tokens,
            "seconds": progress.seconds,
            "flops": flops_until(step, settings, self.flops_per_token),
            "lr": learning_rate(settings, step),
            "train/loss": losses[-1],
            "grad_norm": norms[-1],
            "clip_rate": progress.clipped_steps / step,
            "tokens_per_second": speed,
            "data_wait": (self.batches.seconds_waited - self.waited) / seconds,
            "mfu": speed * self.flops_per_token / (peak * machine.ranks.world_size) if peak else None,
        }


def flops_until(step: int, settings: Settings, flops_per_token: float) -> float:
    """Floating-point operations of the updates up to `step`, with Sophia's estimates: a Gauss-Newton-Bartlett one costs
    what training on its sequences does, Hutchinson's 8/3 of that, for 8 matrix products where training has 3.
    """
    sequences = step * settings.batch_size
    if settings.uses_curvature:
        passes = math.ceil(step / settings.hessian_interval) * (8 / 3 if settings.optimizer == "sophiah" else 1)
        sequences += passes * settings.hessian_batch_size
    return sequences * settings.block_size * flops_per_token


def check_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise Diverged(f"{what} at step {step}: stopped")
