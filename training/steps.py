"""The two things a loop does with its batches: gradients of the training loss, and the validation loss."""

import contextlib

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from training import randomness
from training.batches import Batches
from training.machine import Machine


def data_parallel(model: nn.Module, machine: Machine) -> nn.Module:
    """The model whose gradients are averaged over the ranks; without other ranks, the model itself."""
    if machine.world_size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def accumulate_gradients(model: nn.Module, batches: Batches, step: int) -> Tensor:
    """Add the gradient of the mean loss over the batch of update `step` to the parameters' .grad, over all ranks.
    Returns this rank's part of that loss, a scalar on the device; the mean over the ranks is the batch's.
    """
    settings, machine = batches.settings, batches.machine
    if settings.dropout > 0:
        randomness.seed_dropout(settings.seed, step, machine.rank)
    total = torch.zeros((), device=machine.device)
    count = batches.accumulation_steps
    for number, (x, y) in enumerate(batches.train(step), start=1):
        # gradients cross the network once a step, with the last micro-batch
        local = isinstance(model, DistributedDataParallel) and number < count
        with model.no_sync() if local else contextlib.nullcontext():
            with machine.autocast():
                loss = model(x, y) / count
            loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Batches) -> float:
    """Mean cross-entropy in nats over the fixed validation blocks, which the ranks share."""
    machine = batches.machine
    wide = torch.float32 if machine.device.type == "mps" else torch.float64
    sums = torch.zeros(2, dtype=wide, device=machine.device)  # of losses, of tokens
    model.eval()
    for x, y in batches.validation():
        with machine.autocast():
            loss = model(x, y)
        tokens = (y >= 0).sum()
        sums += torch.stack((loss * tokens, tokens))
    model.train()
    machine.sum_over_ranks([sums])
    loss, tokens = sums.tolist()
    return loss / tokens
