"""Our training beside other projects': the same weights, batches and labels, and how far the losses part.

python -m studies.parity --peer DIR …     checkouts of nanoGPT or the released Sophia; others are settings
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.token_files import open_data
from run import errors
from run.machine import Machine, set_up
from run.options import Parser
from run.settings import OPTIMIZER_DEFAULTS, Settings, read
from sophia import labels_from_uniforms
from studies import peers
from train import update
from training.batches import Batches
from training.curvature import Curvature
from training.optimizers import Optimizer, betas, learning_rate, make_optimizer
from training.start import make_model

STEPS = 100
SHOWN = (1, 3, 10, 30, 100)  # the steps whose losses are printed


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--peer", nargs="+", type=Path, metavar="DIR", required=True, help="what to compare with")
    options, arguments = parser.parse_known_args()
    settings = read(arguments)
    machine = dataclasses.replace(set_up(settings), dtype=torch.float32, compile=False)
    print(json.dumps({folder.resolve().name: compare(folder, settings, machine) for folder in options.peer}))


def compare(folder: Path, settings: Settings, machine: Machine) -> dict[str, Any]:
    """The peer's optimizer decays what ours decays, and takes its estimates where ours does, with their labels."""
    peers.machines(folder, machine)  # refuses what is no peer
    name = "sophiag" if peers.is_sophia(folder) else "adamw"
    chosen = OPTIMIZER_DEFAULTS[name] | {"optimizer": name, "hessian_estimator": "paper", "dropout": 0.0}
    chosen |= {"exact_gelu": name == "adamw"}  # as in nanoGPT, but not in its fork, the released Sophia
    chosen |= {"hessian_batch_size": settings.batch_size, "max_iters": STEPS, "lr_decay_iters": STEPS}
    settings = dataclasses.replace(settings, **chosen, warmup_iters=STEPS // 10)
    data = open_data(settings.dataset, settings.block_size)
    torch.manual_seed(settings.seed)
    ours, batches = make_model(settings, data, machine, None), Batches(data, settings, machine)
    optimizer, curvature = make_optimizer(ours, settings, machine), Curvature(ours, settings, machine, batches)
    with contextlib.redirect_stdout(sys.stderr):  # where peers may print what they like
        model = peers.model(settings, folder, data.padded_vocab_size).to(machine.device)
    model.transformer.load_state_dict(ours.state_dict(), strict=False)  # the released model has masks besides
    theirs = {param: model.transformer.get_parameter(name) for name, param in ours.named_parameters()}
    groups = [group | {"params": [theirs[param] for param in group["params"]]} for group in optimizer.param_groups]
    losses = their_losses(model, peers.optimizer(groups, settings, folder), settings, Batches(data, settings, machine))
    step_of = functools.partial(update, model=ours, optimizer=optimizer, batches=batches, curvature=curvature)
    pairs = [(step_of(step).loss.item(), next(losses)) for step in range(1, STEPS + 1)]
    return {
        "optimizer": name,
        "losses": {step: pairs[step - 1] for step in SHOWN},
        "largest_difference_until": {step: max(abs(a - b) for a, b in pairs[:step]) for step in SHOWN},
    }


def their_losses(model: nn.Module, optimizer: Optimizer, settings: Settings, batches: Batches) -> Iterator[float]:
    """Train the peer's model. Gives the mean loss over the batch of every update."""
    tokens = {"bs": settings.batch_size * settings.block_size} if settings.uses_curvature else {}
    for step in itertools.count(1):
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = learning_rate(settings, step), betas(settings, step)
        if settings.uses_curvature and step % settings.hessian_interval == 1:
            uniforms = batches.label_uniforms(step)
            for (x, _), (first, last) in batches.curvature(step, settings.micro_batch_size):
                logits = model(x, 0)[0].flatten(0, 1)
                labels = labels_from_uniforms(logits.detach(), uniforms[:, first:last].flatten(1))
                (F.cross_entropy(logits, labels) * (last - first) / settings.batch_size).backward()
            optimizer.update_hessian()
            optimizer.zero_grad()
        total = 0.0
        for x, y in batches.train(step):
            loss = model(x, y)[1] / batches.accumulation_steps
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step(**tokens)
        optimizer.zero_grad()
        yield total


if __name__ == "__main__":
    errors.run(main)
