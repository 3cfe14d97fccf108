"""This rank's share of every batch: for training, for curvature and for validation."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.token_files import TokenData, chunks, pairs
from run.machine import Machine
from run.randomness import LABELS, torch_seed
from run.settings import Settings, require_multiple


@dataclass
class Batches:
    """Batches are pairs (x, y) of int64 tensors (sequences, block_size) on the device; y is x one token later."""

    data: TokenData
    settings: Settings
    machine: Machine

    def __post_init__(self) -> None:
        self._ahead = Ahead(self._load, self.machine.device)
        self.seconds_waited = 0.0  # for batches of training and of curvature, so far

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one optimizer step on this rank."""
        return self.settings.batch_size // (self.settings.micro_batch_size * self.machine.ranks.world_size)

    def train(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's micro-batches of update `step`. Each is read while the device works on the one before."""
        start, stop = self.machine.ranks.slice(self.settings.batch_size)
        parts = list(chunks(start, stop, self.settings.micro_batch_size))
        upcoming = [*((step, *part) for part in parts[1:]), (step + 1, *parts[0])]
        for part, following in zip(parts, upcoming, strict=True):
            yield self._waited_for(self._ahead.take, (step, *part), following)

    def curvature(
        self, step: int, most: int, group: int = 1
    ) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[int, int]]]:
        """This rank's part of the first hessian_batch_size sequences of update `step`, as ((x, y), (first, last)) with
        the numbers of the sequences: in equal parts, so that one shape is compiled, of at most `most` sequences.
        Groups of `group` sequences stay on one rank.
        """
        start, stop = self.machine.ranks.slice(self.settings.hessian_batch_size // group)
        size = max((part for part in divisors((stop - start) * group) if part <= most), default=most)
        for first, last in chunks(start * group, stop * group, size):
            yield self._waited_for(self._load, (step, first, last)), (first, last)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the validation blocks, in batches of one shape: targets of -1 fill up the last one."""
        size = self.settings.micro_batch_size
        starts = self.data.val_blocks(self.settings.eval_sequences)
        start, stop = self.machine.ranks.slice(len(starts))
        for first, last in chunks(start, stop, size):
            x, y = self._on_device(self._pinned(self.data.val_rows(starts[first:last])))
            filler = size - (last - first)
            if filler:
                x = torch.cat((x, x[:1].expand(filler, -1)))
                y = torch.cat((y, torch.full_like(y[:1], -1).expand(filler, -1)))
            yield x, y

    def label_uniforms(self, step: int) -> Tensor:
        """The random numbers, (2, hessian_batch_size, block_size), that draw the labels of update `step`."""
        generator = torch.Generator().manual_seed(torch_seed(self.settings.seed, LABELS, step))
        shape = (2, self.settings.hessian_batch_size, self.settings.block_size)
        return self._pinned(torch.rand(shape, generator=generator)).to(self.machine.device, non_blocking=True)

    def _waited_for(self, load: Callable, *arguments: Any) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        rows = load(*arguments)
        self.seconds_waited += time.perf_counter() - started
        return self._on_device(rows)

    def _load(self, key: tuple[int, int, int]) -> Tensor:
        step, first, last = key
        return self._pinned(self.data.train_rows(self.settings.seed, step, self.settings.batch_size, first, last))

    def _pinned(self, tensor: Tensor) -> Tensor:
        """In memory that CUDA copies from while the host goes on."""
        return tensor.pin_memory() if self.machine.device.type == "cuda" else tensor

    def _on_device(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        # two bytes a token cross to the device, which widens them
        return pairs(rows.to(self.machine.device, non_blocking=True))


class Ahead:
    """Calls `load` for the next key in a thread of its own while the present one is worked on."""

    def __init__(self, load: Callable[[Any], Tensor], device: torch.device):
        # a new thread uses device 0, and pinned memory belongs to a device
        set_up = (torch.cuda.set_device, (device,)) if device.type == "cuda" else ()
        self._load, self._pool = load, ThreadPoolExecutor(1, "reader", *set_up)
        self._begun: dict[Any, Future] = {}

    def take(self, key: Any, following: Any) -> Tensor:
        """The tensor of `key`, and a start with `following`'s."""
        value = (self._begun.get(key) or self._pool.submit(self._load, key)).result()
        self._begun = {following: self._pool.submit(self._load, following)}
        return value


def check_batch(settings: Settings, ranks: int) -> None:
    """Refuse batches that cannot be divided as the settings ask; the message names values that fit."""
    s = settings
    unit = s.micro_batch_size * ranks
    if s.batch_size % unit:
        fitting = [] if s.batch_size % ranks else divisors(s.batch_size // ranks)
        near = sorted(fitting, key=lambda size: abs(size - s.micro_batch_size))[:3]
        instead = f"; or micro_batch_size = {' or '.join(map(str, sorted(near)))}" if near else ""
        why = f"micro_batch_size {s.micro_batch_size}" + (f" x {ranks} ranks" if ranks > 1 else "")
        require_multiple("batch_size", s.batch_size, unit, why, instead)
    if s.optimizer == "sophiag" and s.hessian_estimator == "averaged":
        require_multiple("hessian_batch_size", s.hessian_batch_size, s.hessian_group_size, "hessian_group_size")


def divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
