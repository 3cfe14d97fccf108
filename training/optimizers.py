"""The optimizer that the settings name, its state by parameter, and the learning-rate schedule."""

import math

import torch
import torch.nn as nn
from torch import Tensor

from lion import Lion
from run.machine import Machine
from run.ranks import Ranks
from run.settings import Settings
from sophia import SophiaG, SophiaH


def learning_rate(settings: Settings, step: int) -> float:
    """That of update `step` (from 1): a linear warm-up to `warmup_iters`, half a cosine down to `lr_decay_iters`."""
    s = settings
    if step < s.warmup_iters:
        return s.learning_rate * step / s.warmup_iters
    if not s.decay_lr:
        return s.learning_rate
    if step >= s.lr_decay_iters:
        return s.min_lr
    progress = (step - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters)
    return s.min_lr + (s.learning_rate - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def betas(settings: Settings, step: int) -> tuple[float, float]:
    """The betas of update `step`. hessian_bias_correction: beta2 such that h is the paper's / (1 - beta2^estimates)."""
    beta2 = settings.beta2
    if settings.uses_curvature and settings.hessian_bias_correction:
        estimates = (step - 1) // settings.hessian_interval + 1
        beta2 = 1 - (1 - beta2) / (1 - beta2**estimates)
    return settings.beta1, beta2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for the matrices of Linear layers; none for embeddings, biases and LayerNorm gains."""
    matrices = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p in matrices], "weight_decay": weight_decay},
        {"params": [p for p in params if p not in matrices], "weight_decay": 0.0},
    ]


class MuonAndAdamW:
    """torch.optim.Muon on the blocks' matrices and AdamW on all other parameters, with one learning rate: Muon's update
    is scaled to the size that AdamW's has (arXiv 2502.16982, section 2.2). beta1 is the momentum of both.
    """

    def __init__(self, matrices: dict, others: dict, lr: float, betas: tuple[float, float], fused: bool):
        self.muon = torch.optim.Muon([matrices], lr=lr, momentum=betas[0], adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW([others], lr=lr, betas=betas, eps=1e-8, fused=fused)
        self.param_groups = self.muon.param_groups + self.adamw.param_groups
        self.state = self.muon.state = self.adamw.state  # one dict, as a checkpoint has both

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()


Optimizer = torch.optim.Optimizer | MuonAndAdamW


def make_optimizer(model: nn.Module, settings: Settings, machine: Machine) -> Optimizer:
    groups = parameter_groups(model, settings.weight_decay)
    options = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2)}
    fused = machine.device.type in ("cuda", "cpu")
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, eps=1e-8, fused=fused, **options)
    if settings.optimizer == "muon":
        return MuonAndAdamW(*groups, fused=fused, **options)
    if settings.optimizer == "lion":
        return Lion(groups, compile=machine.compile, **options)
    sophia = {"sophiag": SophiaG, "sophiah": SophiaH}[settings.optimizer]
    return sophia(groups, rho=settings.rho, compile=machine.compile, **options)


def parameters(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, as <parameter>/<name of the state>."""
    names = {param: name for name, param in model.named_parameters()}
    return {f"{names[param]}/{key}": value for param, state in optimizer.state.items() for key, value in state.items()}


def load_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Tensor], ranks: Ranks) -> None:
    """Load `state`, which rank 0 alone has, on every rank. Hyperparameters stay the optimizer's."""
    named = dict(model.named_parameters())
    for path, shape, dtype in ranks.broadcast_object([(path, x.shape, x.dtype) for path, x in state.items()]):
        name, _, key = path.rpartition("/")
        device = named[name].device
        tensor = state[path].to(device) if state else torch.empty(shape, dtype=dtype, device=device)
        ranks.broadcast(tensor)
        optimizer.state[named[name]][key] = tensor
