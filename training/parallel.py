"""Data parallelism by torch's DistributedDataParallel (DDP), with buckets that a resumed run forms alike."""

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from run.machine import Machine


class DataParallel:
    """The model as a training step calls it: in DDP, with rank 0's weights on every rank; alone on one rank."""

    def __init__(self, model: nn.Module, machine: Machine):
        self.model, self.machine = model, machine
        self._ddp: DistributedDataParallel | None = None
        self._bucket_norms: list[Tensor] = []
        if machine.ranks.count > 1:
            self._ddp = DistributedDataParallel(model, process_group=machine.ranks.group, gradient_as_bucket_view=True)
            self._ddp.register_comm_hook((machine.ranks.group, self._bucket_norms), note_norm_and_reduce)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (self._ddp or self.model)(x, y)

    def exchanging(self, exchange: bool) -> contextlib.AbstractContextManager:
        """Around a forward and a backward pass: whether the latter leaves the mean of all ranks' gradients, bucket by
        bucket while it goes on, or adds to this rank's own.
        """
        return contextlib.nullcontext() if exchange or not self._ddp else self._ddp.no_sync()

    def form_buckets(self, micro_batch_size: int) -> None:
        """DDP forms its buckets anew after the first backward pass, and with them changes in which order numbers are
        added: a resumed run would part from one that was not. So a first pass is thrown away.
        """
        if self._ddp:
            shape = micro_batch_size, self.model.config.block_size
            tokens = torch.zeros(shape, dtype=torch.int64, device=self.machine.device)
            with self.machine.forward_context():
                loss = self(tokens, tokens)
            loss.backward()
            self._ddp.zero_grad()
            self._bucket_norms.clear()

    def own_gradient_norm(self) -> Tensor:
        """The norm of this rank's part of the gradient that was exchanged last; 0 with one rank."""
        norm = torch.stack(self._bucket_norms or [torch.zeros((), device=self.machine.device)]).norm()
        self._bucket_norms.clear()
        return norm


def note_norm_and_reduce(state: tuple, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A hook of DDP's. When the gradient is not finite, its norm before the exchange tells on which rank."""
    group, norms = state  # and not the model, which DDP would then keep alive, and the process group with it
    norms.append(bucket.buffer().norm())
    return allreduce_hook(group, bucket)
