"""The two things a loop does with its batches: gradients of the training loss, and the validation loss."""

import torch
import torch.nn as nn
from torch import Tensor

from training import randomness
from training.batches import Batches


def accumulate_gradients(model: nn.Module, batches: Batches, step: int) -> Tensor:
    """Add the gradient of the mean loss over the batch of update `step`, of all ranks, to the parameters' .grad.
    Returns this rank's part of that loss and the norm of its part of the gradient, float32 (2,) on the device. The
    parts of the loss add up over the ranks to the batch's.
    """
    settings, machine = batches.settings, batches.machine
    if settings.dropout > 0:
        randomness.seed_dropout(settings.seed, step, machine.ranks.rank)
    total = torch.zeros((), device=machine.device)
    count = batches.accumulation_steps * machine.ranks.count
    for x, y in batches.train(step):
        with machine.autocast():
            loss = model(x, y) / count
        loss.backward()
        total += loss.detach()
    gradients = [parameter.grad for parameter in model.parameters()]
    norm = torch.nn.utils.get_total_norm(gradients) if machine.ranks.count > 1 else torch.zeros_like(total)
    # They cross the network once a step, and after the backward pass: compiled, it hands all of them over at its end.
    machine.ranks.sum(gradients)
    return torch.stack((total, norm))


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
    machine.ranks.sum([sums])
    loss, tokens = sums.tolist()
    return loss / tokens
