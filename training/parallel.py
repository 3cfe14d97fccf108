"""Data parallelism by torch's DistributedDataParallel (DDP), with buckets that a resumed run forms alike."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from run.machine import Machine


def wrap(model: nn.Module, machine: Machine) -> nn.Module:
    """The model as a training step calls it: in DDP, with rank 0's weights on every rank; as it is on one rank."""
    if machine.ranks.world_size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def form_buckets(model: nn.Module, machine: Machine, shape: tuple[int, int]) -> None:
    """DDP forms its buckets anew after the first backward pass, and with them changes in which order numbers are added:
    a resumed run would part from one that was not. So a first pass on tokens of this shape is thrown away.
    """
    if isinstance(model, DistributedDataParallel):
        tokens = torch.zeros(shape, dtype=torch.int64, device=machine.device)
        with machine.forward_context():
            loss = model(tokens, tokens)
        loss.backward()
        model.zero_grad()
