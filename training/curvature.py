"""The curvature step: Sophia's estimates over many micro-batches and many ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from head import ChunkLoss, mean_in_chunks
from model import GPT
from run.machine import Machine
from run.randomness import CURVATURE_DROPOUT, DIRECTIONS, seed_dropout, torch_seed
from run.settings import Settings
from sophia import labels_from_uniforms, normal_like
from training.batches import Batches
from training.hessian_product import HessianProduct


class SampledLabelLoss(ChunkLoss):
    """The loss of labels that the model draws itself, from its softmax, by uniform numbers (2, N) in [0, 1)."""

    def labels(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        return labels_from_uniforms(logits, uniforms)


class Curvature:
    """Estimates of the Hessian diagonal, from the first sequences of a step. Weights, seed and step determine them."""

    def __init__(self, model: GPT, settings: Settings, machine: Machine, batches: Batches):
        self.model, self.settings, self.machine, self.batches = model, settings, machine, batches
        self._hessian_product = HessianProduct(model, machine.compile) if settings.optimizer == "sophiah" else None
        self._sampled_label_loss = SampledLabelLoss()
        if machine.compile:
            self._sampled_label_loss.compile(dynamic=False)

    def is_due(self, step: int) -> bool:
        """Whether update `step` (from 1) begins with an estimate: the first does, then every hessian_interval-th."""
        return self.settings.uses_curvature and (step - 1) % self.settings.hessian_interval == 0

    def estimate(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """One tensor for each of `params`, the same on every rank."""
        settings = self.settings
        if settings.optimizer == "sophiah":
            return self._hutchinson(step, params)
        if settings.dropout > 0:
            seed_dropout(settings.seed, step, self.machine.ranks.rank, CURVATURE_DROPOUT)
        if settings.hessian_estimator == "averaged":
            return self._averaged_gauss_newton_bartlett(step, params)
        return self._gauss_newton_bartlett(step, params)

    def _gauss_newton_bartlett(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """B * g * g, g the mean gradient over all B token positions of the sequences (the paper's algorithm 2)."""
        sequences = self.settings.hessian_batch_size
        mean = [torch.zeros_like(param) for param in params]
        for count, gradients in self._sampled_gradients(step, params, self.settings.micro_batch_size):
            torch._foreach_add_(mean, gradients, alpha=count / sequences)
            del gradients  # as large as the weights
        self.machine.ranks.all_reduce(mean)
        torch._foreach_mul_(mean, mean)
        torch._foreach_mul_(mean, sequences * self.settings.block_size)
        return mean

    def _averaged_gauss_newton_bartlett(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """The mean of b * g * g over n groups of b token positions each: unbiased like the paper's estimate for every
        b, with about an n-th of its variance (more for parameters that few positions of a group touch).
        """
        group = self.settings.hessian_group_size
        mean = [torch.zeros_like(param) for param in params]
        weight = group * self.settings.block_size / (self.settings.hessian_batch_size // group)  # b / n
        for _, gradients in self._sampled_gradients(step, params, group, group):
            torch._foreach_addcmul_(mean, gradients, gradients, value=weight)
            del gradients
        self.machine.ranks.all_reduce(mean)
        return mean

    def _sampled_gradients(self, step: int, params: list[Tensor], most: int, group: int = 1) -> Iterator[tuple]:
        """For each pass its number of sequences, and the gradients of their mean loss with labels the model draws."""
        uniforms = self.batches.label_uniforms(step)  # (2, hessian_batch_size, block_size)
        for (x, _), (first, last) in self.batches.curvature(step, most, group):
            with self.machine.forward_context():
                weight, targets = self.model.wte.weight, uniforms[:, first:last].flatten(1)
                hidden = self.model.hidden(x).flatten(0, 1)  # (positions, C)
                loss = mean_in_chunks(hidden, weight, targets, len(hidden), self._sampled_label_loss)
            del hidden  # while the caller works
            yield last - first, torch.autograd.grad(loss, params)

    def _hutchinson(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """u * (H u), with one u for all sequences (the paper's algorithm 1)."""
        settings, product = self.settings, self._hessian_product
        seed = torch_seed(settings.seed, DIRECTIONS, step)
        directions = normal_like(params, torch.Generator(self.machine.device).manual_seed(seed))
        for direction in directions:  # take rank 0's: GPUs of another kind draw other numbers
            self.machine.ranks.broadcast(direction)
        named, direction_of = dict(self.model.named_parameters()), dict(zip(params, directions, strict=True))
        weights, u = product.weights(), {name: direction_of[param] for name, param in named.items()}
        tokens = settings.hessian_batch_size * settings.block_size
        for (x, y), _ in self.batches.curvature(step, settings.hessian_micro_batch_size):
            with self.machine.forward_context():
                product.add(weights, u, x, y, tokens)
        sums = {named[name]: weight.grad for name, weight in weights.items()}
        total = [sums[param] for param in params]
        self.machine.ranks.all_reduce(total)
        torch._foreach_mul_(total, directions)
        return total
