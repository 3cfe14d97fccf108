"""The curvature step: Sophia's estimates over many micro-batches and many ranks."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, token_cross_entropy
from sophia import hutchinson, labels_from_uniforms
from training import randomness
from training.batches import Batches
from training.machine import Machine
from training.settings import Settings


class Curvature:
    """Estimates of the Hessian diagonal from the first hessian_batch_size sequences of a step's batch. An estimate
    depends on (weights, seed, step) alone, not on ranks or micro-batches.
    """

    def __init__(self, model: GPT, settings: Settings, machine: Machine, batches: Batches):
        self.model, self.settings, self.machine, self.batches = model, settings, machine, batches
        self.sampled_loss = torch.compile(sampled_loss, dynamic=False) if machine.compile else sampled_loss

    def is_due(self, step: int) -> bool:
        """Whether update `step` (from 1) begins with an estimate: the first does, then every hessian_interval-th."""
        return self.settings.optimizer.startswith("sophia") and (step - 1) % self.settings.hessian_interval == 0

    def estimate(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """One tensor for each of `params`, the same on every rank."""
        if self.settings.optimizer == "sophiah":
            return self._hutchinson(step, params)
        if self.settings.hessian_estimator == "averaged":
            return self._averaged_gauss_newton_bartlett(step, params)
        return self._gauss_newton_bartlett(step, params)

    def _gauss_newton_bartlett(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """B * g * g, g the mean gradient over all B token positions of the sequences (the paper's algorithm 2)."""
        sequences = self.settings.hessian_batch_size
        mean = [torch.zeros_like(param) for param in params]
        for (x, _), (first, last) in self.batches.curvature(step, self.settings.micro_batch_size):
            gradients = self._sampled_gradients(step, params, x, (first, last))
            torch._foreach_add_(mean, gradients, alpha=(last - first) / sequences)
        self.machine.sum_over_ranks(mean)
        torch._foreach_mul_(mean, mean)
        torch._foreach_mul_(mean, sequences * self.settings.block_size)
        return mean

    def _averaged_gauss_newton_bartlett(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """The mean of b * g * g over n groups of b token positions each: unbiased like the paper's estimate for every
        b, with an n-th of the variance that one squared gradient of all positions has.
        """
        s = self.settings
        mean = [torch.zeros_like(param) for param in params]
        weight = s.hessian_group_size * s.block_size / (s.hessian_batch_size // s.hessian_group_size)  # b / n
        for (x, _), rows in self.batches.curvature(step, s.hessian_group_size, group=s.hessian_group_size):
            gradients = self._sampled_gradients(step, params, x, rows)
            torch._foreach_addcmul_(mean, gradients, gradients, value=weight)
        self.machine.sum_over_ranks(mean)
        return mean

    def _sampled_gradients(self, step: int, params: list[Tensor], x: Tensor, rows: tuple[int, int]) -> tuple:
        with self.machine.autocast():
            loss = self.sampled_loss(self.model, x, self.batches.label_uniforms(step, rows))
        return torch.autograd.grad(loss, params)

    def _hutchinson(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """u * (H u), with one u for all sequences (the paper's algorithm 1)."""
        seed = randomness.torch_seed(self.settings.seed, randomness.DIRECTIONS, step)
        mean = [torch.zeros_like(param) for param in params]
        for (x, y), (first, last) in self.batches.curvature(step, self.settings.micro_batch_size):
            # fused attention has no second derivative
            with self.machine.autocast(), sdpa_kernel(SDPBackend.MATH):
                loss = self.model(x, y)
                generator = torch.Generator(self.machine.device).manual_seed(seed)  # the same u for every chunk
                estimate = hutchinson(loss, params, generator)
            torch._foreach_add_(mean, estimate, alpha=(last - first) / self.settings.hessian_batch_size)
        self.machine.sum_over_ranks(mean)
        return mean


def sampled_loss(model: GPT, x: Tensor, uniforms: Tensor) -> Tensor:
    """Mean cross-entropy against labels drawn from the model's own softmax, for Gauss-Newton-Bartlett."""
    logits = model(x)
    return token_cross_entropy(logits, labels_from_uniforms(logits.detach(), uniforms))
