"""Training steps of other projects, from their checkouts: nanoGPT, and the released code of Sophia."""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.tokenizers import GPT2
from run.errors import UserError
from run.machine import Machine, set_matmul_precision
from run.settings import Settings

NOTES = [
    "nanoGPT's optimizer is AdamW and the released Sophia's is Sophia-G, whatever ours is",
    "same: the number formats and the compilation of ours; as_it_runs: float32, eager, as nanoGPT runs on a CPU",
    "a peer's batch is on the device already, ours is read and copied",
    "all run under the same environment variables; on a CPU ours alone flushes denormals and has a fused AdamW",
    "the released Sophia estimates curvature on all sequences of a step, ours on hessian_batch_size of them",
]


def machines(folder: Path, machine: Machine) -> dict[str, Machine]:
    """Names for the peer in `folder`, and how it computes under each: as ours does, and on a CPU as by itself."""
    if not (folder / "model.py").is_file():
        raise UserError(f"--peer {folder} is no checkout of nanoGPT or of the released Sophia: it has no model.py")
    same, name = dataclasses.replace(machine, plain_attention=False), folder.resolve().name
    as_it_runs = dataclasses.replace(same, dtype=torch.float32, compile=False)
    return ({f"{name}_as_it_runs": as_it_runs} if machine.device.type == "cpu" else {}) | {f"{name}_same": same}


def is_sophia(folder: Path) -> bool:
    return (folder / "sophia.py").exists()


def model(settings: Settings, folder: Path, vocab_size: int = -(-GPT2.vocab_size // 64) * 64) -> nn.Module:
    """The peer's model, for our settings."""
    for name in ("model", "sophia"):  # ours, which theirs would be taken for
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    theirs = importlib.import_module("model")
    shape = {name: getattr(settings, name) for name in "block_size n_layer n_head n_embd dropout bias".split()}
    return theirs.GPT(theirs.GPTConfig(vocab_size=vocab_size, **shape))


def optimizer(groups: list[dict], settings: Settings, folder: Path) -> torch.optim.Optimizer:
    """The peer's optimizer for these parameter groups, after `model`: nanoGPT's is torch's AdamW."""
    betas = settings.beta1, settings.beta2
    if is_sophia(folder):
        return importlib.import_module("sophia").SophiaG(groups, betas=betas, rho=settings.rho)
    return torch.optim.AdamW(groups, betas=betas)


def step(settings: Settings, machine: Machine, folder: Path) -> Callable[[bool], None]:
    """The update of the peer's train script, on one batch, for our settings."""
    set_matmul_precision(settings, machine.device)
    raw = model(settings, folder).to(machine.device)
    sophia, device = is_sophia(folder), machine.device
    options = [settings.weight_decay, settings.learning_rate, (settings.beta1, settings.beta2)]
    options = ["sophiag", *options, 0.05, device.type] if sophia else [*options, device.type]
    optimizer = raw.configure_optimizers(*options)
    called = torch.compile(raw) if machine.compile else raw
    passes = settings.batch_size // settings.micro_batch_size
    x, y = torch.randint(GPT2.vocab_size, (2, settings.micro_batch_size, settings.block_size), device=device)

    def gradients(loss: Callable[[], Tensor]) -> None:
        for _ in range(passes):
            with machine.forward_context():
                part = loss() / passes
            part.backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), settings.grad_clip)

    def sampled_loss() -> Tensor:
        logits, _ = called(x, 0)
        labels = torch.distributions.Categorical(logits=logits).sample()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-1)

    def update(with_estimate: bool) -> None:
        gradients(lambda: called(x, y)[1])
        optimizer.step(**({"bs": settings.batch_size * settings.block_size} if sophia else {}))
        optimizer.zero_grad(set_to_none=True)
        if with_estimate:
            gradients(sampled_loss)
            optimizer.update_hessian()
            optimizer.zero_grad(set_to_none=True)

    return update
