"""The optimizer that the settings name, its state over the ranks, and the learning-rate schedule."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn as nn
from torch import Tensor

from lion import Lion
from run.machine import Machine
from run.ranks import Ranks
from run.settings import Settings
from sophia import SophiaG, SophiaH

# What each optimizer remembers of a parameter
STATE = {
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "lion": {"exp_avg"},
    "sophiah": {"exp_avg", "hessian"},
    "sophiag": {"exp_avg", "hessian"},
}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for the matrices of Linear layers; none for embeddings, biases and LayerNorm gains."""
    matrices = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p in matrices], "weight_decay": weight_decay},
        {"params": [p for p in params if p not in matrices], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, settings: Settings, machine: Machine) -> torch.optim.Optimizer:
    """The optimizer; with `shard_optimizer` one that updates and remembers a part of the parameters on each rank."""
    s = settings
    groups = parameter_groups(model, s.weight_decay)
    options = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2)}
    if s.optimizer == "adamw":
        kind, more = torch.optim.AdamW, {"eps": 1e-8, "fused": machine.device.type in ("cuda", "cpu")}
    elif s.optimizer == "lion":
        kind, more = Lion, {"compile": machine.compile}
    else:
        kind = SophiaG if s.optimizer == "sophiag" else SophiaH
        more = {"rho": s.rho, "compile": machine.compile}
    if s.shard_optimizer and machine.ranks.count > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # seconds to import

        return ZeroRedundancyOptimizer(groups, kind, process_group=machine.ranks.group, **options, **more)
    return kind(groups, **options, **more)


def own_part(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer of the parameters that this rank updates: of all, unless they are shared out."""
    return getattr(optimizer, "optim", optimizer)


def step(optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """One update; the ranks that share out the parameters then send each other what they updated."""
    with contextlib.nullcontext() if own_part(optimizer) is optimizer else ranks.exchanging():
        optimizer.step()


def update_hessian(optimizer: torch.optim.Optimizer, params: list[Tensor], estimate: list[Tensor]) -> None:
    """Hand Sophia the estimates for `params`."""
    estimates = dict(zip(params, estimate, strict=True))
    own = own_part(optimizer)
    own.update_hessian([estimates[param] for group in own.param_groups for param in group["params"]])


def unclipped_fraction(optimizer: torch.optim.Optimizer, ranks: Ranks) -> float:
    """Sophia's `unclipped_fraction` over all parameters."""
    own = own_part(optimizer)
    if own is optimizer:
        return own.unclipped_fraction()
    size = sum(param.numel() for group in own.param_groups for param in group["params"])
    parts = ranks.collect((own.unclipped_fraction() * size, size))
    return sum(unclipped for unclipped, _ in parts) / sum(size for _, size in parts)


def own_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What this rank keeps of the optimizer's state, as <parameter>/<name of the state>."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = own_part(optimizer).state
    return {f"{names[param]}/{key}": value for param, values in state.items() for key, value in values.items()}


def gather_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The state of all ranks, for all of them, a tensor at a time."""
    own = own_state(model, optimizer)
    parts = ranks.collect({path: (tensor.shape, tensor.dtype) for path, tensor in own.items()})
    for rank, part in enumerate(parts):
        for path, (shape, dtype) in part.items():
            mine = rank == ranks.rank
            tensor = own[path].to(device) if mine else torch.empty(shape, dtype=dtype, device=device)
            ranks.broadcast(tensor, rank)
            yield path, tensor


def load_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Tensor] | None,
    ranks: Ranks,
    device: torch.device,
) -> None:
    """Have every rank go on with its part of rank 0's `state`. Hyperparameters stay those of `optimizer`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = own_part(optimizer)
    params = [param for group in own.param_groups for param in group["params"]]
    numbers = {names[param]: number for number, param in enumerate(params)}
    kept: dict[int, dict[str, Tensor]] = {}
    for path, shape, dtype in ranks.share([(path, value.shape, value.dtype) for path, value in (state or {}).items()]):
        tensor = state[path].to(device) if state else torch.empty(shape, dtype=dtype, device=device)
        ranks.broadcast(tensor)
        name, _, key = path.rpartition("/")
        if name in numbers:
            kept.setdefault(numbers[name], {})[key] = tensor
    own.load_state_dict({"state": kept, "param_groups": own.state_dict()["param_groups"]})


def learning_rate(settings: Settings, step: int) -> float:
    """The rate that update `step` (from 1) uses: linear warm-up to the peak, reached at update `warmup_iters`, then
    half a cosine to `min_lr`, reached at `lr_decay_iters` (or constant without `decay_lr`).
    """
    s = settings
    if step < s.warmup_iters:
        return s.learning_rate * step / s.warmup_iters
    if not s.decay_lr:
        return s.learning_rate
    if step >= s.lr_decay_iters:
        return s.min_lr
    progress = (step - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters)
    return s.min_lr + (s.learning_rate - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
