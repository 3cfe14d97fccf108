"""The curvature step: Sophia's estimates over many micro-batches and many ranks."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, token_cross_entropy
from run import randomness
from run.machine import Machine
from run.settings import Settings
from sophia import hessian_vector_product, labels_from_uniforms, normal_like
from tokens.batches import Batches


class Curvature:
    """Estimates of the Hessian diagonal from the first hessian_batch_size sequences of a step's batch. An estimate
    depends on (weights, seed, step) alone, not on ranks or micro-batches.
    """

    def __init__(self, model: GPT, settings: Settings, machine: Machine, batches: Batches):
        self.model, self.settings, self.machine, self.batches = model, settings, machine, batches
        self.add_loss_curvature = add_loss_curvature
        if machine.compile:
            self.add_loss_curvature = torch.compile(add_loss_curvature, dynamic=False)

    def is_due(self, step: int) -> bool:
        """Whether update `step` (from 1) begins with an estimate: the first does, then every hessian_interval-th."""
        return self.settings.optimizer.startswith("sophia") and (step - 1) % self.settings.hessian_interval == 0

    def estimate(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """One tensor for each of `params`, the same on every rank."""
        s = self.settings
        if s.dropout > 0:
            randomness.seed_dropout(s.seed, step, self.machine.ranks.rank, randomness.CURVATURE_DROPOUT)
        if s.optimizer == "sophiah":
            return self._hutchinson(step, params)
        if s.hessian_estimator == "averaged":
            return self._averaged_gauss_newton_bartlett(step, params)
        return self._gauss_newton_bartlett(step, params)

    def _gauss_newton_bartlett(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """B * g * g, g the mean gradient over all B token positions of the sequences (the paper's algorithm 2)."""
        sequences = self.settings.hessian_batch_size
        mean = [torch.zeros_like(param) for param in params]
        uniforms = self.batches.label_uniforms(step)
        for (x, _), (first, last) in self.batches.curvature(step, self.settings.micro_batch_size):
            weight = (last - first) / sequences
            torch._foreach_add_(mean, self._sampled_gradients(params, x, uniforms[:, first:last]), alpha=weight)
        self.machine.ranks.sum(mean)
        torch._foreach_mul_(mean, mean)
        torch._foreach_mul_(mean, sequences * self.settings.block_size)
        return mean

    def _averaged_gauss_newton_bartlett(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """The mean of b * g * g over n groups of b token positions each: unbiased like the paper's estimate for every
        b, with about an n-th of its variance (more for parameters that few positions of a group touch).
        """
        s = self.settings
        mean = [torch.zeros_like(param) for param in params]
        weight = s.hessian_group_size * s.block_size / (s.hessian_batch_size // s.hessian_group_size)  # b / n
        uniforms = self.batches.label_uniforms(step)
        for (x, _), (first, last) in self.batches.curvature(step, s.hessian_group_size, group=s.hessian_group_size):
            add_squares(mean, self._sampled_gradients(params, x, uniforms[:, first:last]), weight)
        self.machine.ranks.sum(mean)
        return mean

    def _sampled_gradients(self, params: list[Tensor], x: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
        with self.machine.autocast():
            loss = self.model(x, uniforms, draw=labels_from_uniforms)
        return torch.autograd.grad(loss, params)

    def _hutchinson(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """u * (H u), with one u for all sequences (the paper's algorithm 1)."""
        seed = randomness.torch_seed(self.settings.seed, randomness.DIRECTIONS, step)
        directions = normal_like(params, torch.Generator(self.machine.device).manual_seed(seed))
        names = {param: name for name, param in self.model.named_parameters()}
        point = {names[param]: param.detach() for param in params}
        towards = {names[param]: u for param, u in zip(params, directions, strict=True)}
        mean = {name: torch.zeros_like(param) for name, param in point.items()}
        # Forward over reverse keeps every activation twice, and the directions besides: a quarter of a micro-batch
        # takes about the memory of a whole one in training. Checkpoints have no forward mode: without them it is an
        # eighth of a micro-batch that is trained on with them.
        size = max(1, self.settings.micro_batch_size // (8 if self.model.checkpoint_activations else 4))
        for (x, y), (first, last) in self.batches.curvature(step, size):
            weight = (last - first) / self.settings.hessian_batch_size
            # fused attention has no second derivative
            with self.machine.autocast(), sdpa_kernel(SDPBackend.MATH), keeping_activations(self.model):
                self.add_loss_curvature(mean, weight, self.model, point, towards, x, y)
        products = list(mean.values())
        self.machine.ranks.sum(products)
        torch._foreach_mul_(products, directions)
        return products


def add_squares(total: list[Tensor], tensors: tuple[Tensor, ...], weight: float) -> None:
    torch._foreach_addcmul_(total, tensors, tensors, value=weight)


@contextlib.contextmanager
def keeping_activations(model: GPT) -> Iterator[None]:
    checkpointed, model.checkpoint_activations = model.checkpoint_activations, False
    try:
        yield
    finally:
        model.checkpoint_activations = checkpointed


def add_loss_curvature(
    total: dict[str, Tensor],
    weight: float,
    model: GPT,
    point: dict[str, Tensor],
    directions: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
) -> None:
    """Add weight * H u of the training loss at the weights `point` to `total`."""

    def loss(weights: dict[str, Tensor]) -> Tensor:
        # from the logits, as a model's own loss has no forward mode
        return token_cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    for name, product in hessian_vector_product(loss, point, directions).items():
        total[name].add_(product, alpha=weight)
