"""What a loop does with its batches: an update of the weights, and the validation loss."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model import GPT
from run import randomness
from tokens.batches import Batches
from training import optimizers
from training.curvature import Curvature


def update(
    step: int,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    curvature: Curvature,
    before_change: Callable[[], None] = lambda: None,
) -> Tensor:
    """Update `step` (from 1) of the weights, without a wait for its results. `before_change` is called before
    weights or optimizer state change. Returns, float32 (3,) on the device, this rank's part of the loss, the norm of
    its part of the gradient (0 if it is the only rank), and the norm of the gradient before clipping.
    """
    settings, ranks = batches.settings, batches.machine.ranks
    lr = optimizers.learning_rate(settings, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if curvature.is_due(step):
        estimate = curvature.estimate(step, params)
        before_change()
        optimizers.update_hessian(optimizer, params, estimate)
        del estimate
    part = accumulate_gradients(model, batches, step)
    norm = torch.nn.utils.clip_grad_norm_(params, settings.grad_clip or math.inf)
    before_change()
    optimizers.step(optimizer, ranks)
    optimizer.zero_grad()
    return torch.cat((part, norm.view(1)))


def accumulate_gradients(model: GPT, batches: Batches, step: int) -> Tensor:
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
def validation_loss(model: GPT, batches: Batches) -> float:
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
