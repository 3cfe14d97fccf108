"""The optimizer that the settings name, its parameter groups, and the learning-rate schedule."""

import math

import torch
import torch.nn as nn

from lion import Lion
from sophia import SophiaG, SophiaH
from training.machine import Machine
from training.settings import Settings


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for the matrices of Linear layers; none for embeddings, biases and LayerNorm gains."""
    matrices = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p in matrices], "weight_decay": weight_decay},
        {"params": [p for p in params if p not in matrices], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, settings: Settings, machine: Machine) -> torch.optim.Optimizer:
    s = settings
    groups = parameter_groups(model, s.weight_decay)
    betas = (s.beta1, s.beta2)
    if s.optimizer == "adamw":
        fused = machine.device.type in ("cuda", "cpu")
        return torch.optim.AdamW(groups, lr=s.learning_rate, betas=betas, eps=1e-8, fused=fused)
    if s.optimizer == "lion":
        return Lion(groups, lr=s.learning_rate, betas=betas, compile=machine.compile)
    sophia = SophiaG if s.optimizer == "sophiag" else SophiaH
    return sophia(groups, lr=s.learning_rate, betas=betas, rho=s.rho, compile=machine.compile)


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
