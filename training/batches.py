"""This rank's share of every batch: for training, for curvature and for validation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from training import randomness
from training.data import TokenData, chunks, share
from training.machine import Machine
from training.settings import Settings, require_multiple


@dataclass(frozen=True)
class Batches:
    """Batches are pairs (x, y) of int64 tensors (sequences, block_size) on the device; y is x one token later."""

    data: TokenData
    settings: Settings
    machine: Machine

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one optimizer step on this rank."""
        return self.settings.batch_size // (self.settings.micro_batch_size * self.machine.world_size)

    def train(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's micro-batches of update `step`."""
        start, stop = share(self.settings.batch_size, self.machine.rank, self.machine.world_size)
        for first, last in chunks(start, stop, self.settings.micro_batch_size):
            yield self._train_rows(step, first, last)

    def curvature(
        self, step: int, size: int, group: int = 1
    ) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[int, int]]]:
        """This rank's part of the first hessian_batch_size sequences of update `step`, `size` at a time, as
        ((x, y), (first, last)) with the numbers of the sequences. Groups of `group` sequences stay on one rank.
        """
        start, stop = share(self.settings.hessian_batch_size // group, self.machine.rank, self.machine.world_size)
        for first, last in chunks(start * group, stop * group, size):
            yield self._train_rows(step, first, last), (first, last)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the fixed validation blocks. The last batch is filled up with targets of -1, so that
        all have one shape.
        """
        size = self.settings.micro_batch_size
        starts = self.data.val_blocks(self.settings.eval_sequences)
        start, stop = share(len(starts), self.machine.rank, self.machine.world_size)
        for first, last in chunks(start, stop, size):
            x, y = self.data.val_rows(starts[first:last])
            filler = size - (last - first)
            if filler:
                x = torch.cat((x, x[:1].expand(filler, -1)))
                y = torch.cat((y, torch.full_like(y[:1], -1).expand(filler, -1)))
            yield self._to_device(x, y)

    def label_uniforms(self, step: int) -> Tensor:
        """The random numbers, (2, hessian_batch_size, block_size), that draw the labels of update `step`."""
        generator = torch.Generator().manual_seed(randomness.torch_seed(self.settings.seed, randomness.LABELS, step))
        shape = (2, self.settings.hessian_batch_size, self.settings.block_size)
        return torch.rand(shape, generator=generator).to(self.machine.device)

    def _train_rows(self, step: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        s = self.settings
        return self._to_device(*self.data.train_rows(s.seed, step, s.batch_size, first, last))

    def _to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.machine.device.type == "cuda":
            return tuple(t.pin_memory().to(self.machine.device, non_blocking=True) for t in tensors)
        return tuple(t.to(self.machine.device) for t in tensors)


def check_batch(settings: Settings, world_size: int) -> None:
    """Refuse batches that cannot be divided as the settings ask; the message names values that would do."""
    s = settings
    ranks = f" x {world_size} ranks" if world_size > 1 else ""
    unit = s.micro_batch_size * world_size
    if s.batch_size % unit:
        fitting = [] if s.batch_size % world_size else divisors(s.batch_size // world_size)
        near = sorted(fitting, key=lambda size: abs(size - s.micro_batch_size))[:3]
        instead = f"; or micro_batch_size = {' or '.join(map(str, sorted(near)))}" if near else ""
        require_multiple("batch_size", s.batch_size, unit, f"micro_batch_size {s.micro_batch_size}{ranks}", instead)
    if s.optimizer == "sophiag" and s.hessian_estimator == "averaged":
        require_multiple("hessian_batch_size", s.hessian_batch_size, s.hessian_group_size, "hessian_group_size")


def divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})
