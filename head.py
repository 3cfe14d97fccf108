"""The loss of GPT-2's output head, without ever holding the logits of all positions.

With a vocabulary of 50,304 the logits are the largest tensor of a step. The gradient of a sum is the sum of the
gradients, so the head goes over the positions in chunks: it takes loss and gradients of a chunk and forgets its logits.

Letters in the shape comments: N positions, C channels, V the size of the vocabulary.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sophia import labels_from_uniforms

# Logits of a chunk. On a CPU a chunk is to fit into its caches; on GPUs, which want large products: not measured.
CPU_LOGITS, GPU_LOGITS = 2**25, 2**28


class LabelLoss(nn.Module):
    """The loss of a chunk: the sum over its positions of the cross-entropy of given labels; -1 is left out."""

    def labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return labels

    def loss(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden (N, C), weight (V, C), targets (…, N): a scalar in float32, or float64 for float64 inputs."""
        logits = F.linear(hidden, weight)  # (N, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = self.labels(logits.detach(), targets)  # (N,)
        # Compiled on a CPU this takes a twentieth less than F.cross_entropy, which compares labels in 64 bits.
        peak = logits.detach().amax(dim=-1, keepdim=True)  # (N, 1)
        log_total = (logits - peak).exp().sum(dim=-1).log() + peak.squeeze(-1)  # (N,), of the softmax's denominators
        tokens = torch.arange(len(weight), dtype=torch.int32, device=labels.device)
        own = torch.where(labels.to(torch.int32).unsqueeze(-1) == tokens, logits, 0).sum(dim=-1)  # (N,), of the labels
        return ((log_total - own) * (labels >= 0)).sum()

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool) -> tuple[Tensor, ...]:
        """The loss, and with gradients those by `hidden` and `weight`."""
        if not with_gradients:
            return (self.loss(hidden, weight, targets),)
        gradients, loss = torch.func.grad_and_value(self.loss, argnums=(0, 1))(hidden, weight, targets)
        return loss, *gradients


class SampledLabelLoss(LabelLoss):
    """The same for labels drawn from the model's own softmax, as the Gauss-Newton-Bartlett estimator needs them."""

    def labels(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """uniforms (2, N) in [0, 1) decide the draw."""
        return labels_from_uniforms(logits, uniforms)


class _MeanInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, count, loss_of):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        logits = CPU_LOGITS if device == "cpu" else GPU_LOGITS
        chunks = max(1, math.ceil(len(hidden) * len(weight) / logits))
        size = math.ceil(len(hidden) / chunks)
        with_gradients = any(ctx.needs_input_grad)
        low_weight = weight.to(dtype)  # once for all chunks
        total, d_hidden, d_weight = 0, [], None
        for chunk, some in zip(hidden.split(size), targets.split(size, dim=-1), strict=True):
            loss, *gradients = loss_of(chunk.to(dtype), low_weight, some, with_gradients)
            total = total + loss
            if with_gradients:
                d_hidden.append(gradients[0])
                d_weight = gradients[1].to(weight.dtype) if d_weight is None else d_weight.add_(gradients[1])
                del gradients  # as large as the weight
        if with_gradients:
            ctx.gradients, ctx.count = (torch.cat(d_hidden).to(hidden.dtype), d_weight), count
        return total / count

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():  # for a second derivative, which would lack the head's part
            raise RuntimeError("this loss can be differentiated only once: take F.cross_entropy of the logits instead")
        d_hidden, d_weight = (tensor.mul_(gradient / ctx.count) for tensor in ctx.gradients)  # in place: they are large
        del ctx.gradients
        return d_hidden, d_weight, None, None, None


def mean_in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor | int, loss_of: LabelLoss) -> Tensor:
    """The sum of the losses of all positions, divided by `count`: a scalar that can be differentiated once.

    hidden (N, C) and weight (V, C) are multiplied in autocast's format. `targets` (…, N) are what `loss_of` takes.
    """
    return _MeanInChunks.apply(hidden, weight, targets, count, loss_of)
