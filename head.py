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

CPU_BYTES, GPU_BYTES = 2**29, 2**30  # of a chunk's logits: AMX multiplies 2,048 rows at twice the speed of 512


class ChunkLoss(nn.Module):
    """The loss of a chunk: the sum over its positions of the cross-entropy of their labels. A label of -1 is left out.
    A subclass may take other targets than labels, in `labels`, or have another `loss`.
    """

    logit_copies = 2  # tensors of the logits' size at a time: the logits and their gradient

    def labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (N, V) and targets (…, N) give integers (N,)."""
        return targets

    def loss(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden (N, C), weight (V, C), targets (…, N): a scalar in float32, or float64 for float64 inputs."""
        logits = F.linear(hidden, weight)  # (N, V)
        logits = logits.to(wide_dtype(logits))
        labels = self.labels(logits.detach(), targets)  # (N,)
        # Written out, as F.cross_entropy compares labels in 64 bits: a small model's step takes 3 % longer on a CPU.
        peak = logits.detach().amax(dim=-1, keepdim=True)  # (N, 1)
        log_total = (logits - peak).exp().sum(dim=-1).log() + peak.squeeze(-1)  # (N,), log of the softmax's denominator
        return ((log_total - of_labels(logits, labels)) * (labels >= 0)).sum()

    def forward(self, d_weight: Tensor | None, hidden: Tensor, weight: Tensor, *inputs: Tensor) -> tuple:
        """The loss, and its gradient by `hidden`; that by `weight` is added to `d_weight`. With None neither."""
        if d_weight is None:
            return self.loss(hidden, weight, *inputs), None
        (d_hidden, more), loss = torch.func.grad_and_value(self.loss, argnums=(0, 1))(hidden, weight, *inputs)
        d_weight += more
        return loss, d_hidden


def of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each label, (N,)."""
    tokens = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    return torch.where(labels.to(torch.int32).unsqueeze(-1) == tokens, logits, 0).sum(dim=-1)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix products with the tensor: autocast's, or its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums and exponentials over the tensor: float32, or float64 for a float64 tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def chunk_rows(positions: int, row_bytes: int, chunk_bytes: int) -> int:
    """Positions in a chunk of so many bytes. Chunks are of one size where fewer than twice as many do it."""
    least = max(1, math.ceil(positions * row_bytes / chunk_bytes))
    chunks = next((n for n in range(least, 2 * least) if positions % n == 0), least)
    return math.ceil(positions / chunks)


class _MeanInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, count, chunk_loss, with_gradients, *constants):
        dtype = product_dtype(hidden)
        row_bytes = len(weight) * dtype.itemsize * chunk_loss.logit_copies
        rows = chunk_rows(len(hidden), row_bytes, CPU_BYTES if hidden.device.type == "cpu" else GPU_BYTES)
        low_weight = weight.to(dtype)  # once for all chunks
        d_weight = torch.zeros_like(weight) if with_gradients else None
        results = [
            chunk_loss(d_weight, chunk.to(dtype), low_weight, some, *constants)
            for chunk, some in zip(hidden.split(rows), targets.split(rows, dim=-1), strict=True)
        ]
        losses, d_hidden = zip(*results, strict=True)
        if with_gradients:
            ctx.gradients, ctx.count = (torch.cat(d_hidden).to(hidden.dtype), d_weight), count
        return torch.stack(losses).sum() / count

    @staticmethod
    def backward(ctx, gradient):
        if ctx.gradients is None or torch.is_grad_enabled():  # a second derivative would lack the head's part
            raise RuntimeError("this loss can be differentiated only once: take F.cross_entropy of the logits instead")
        d_hidden, d_weight = (tensor.mul_(gradient / ctx.count) for tensor in ctx.gradients)  # in place: they are large
        ctx.gradients = None
        return d_hidden, d_weight, *[None] * (len(ctx.needs_input_grad) - 2)


def mean_in_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor | int, chunk_loss: ChunkLoss, *constants: Tensor
) -> Tensor:
    """The sum of the losses of all positions, divided by `count`: a scalar that can be differentiated once.

    hidden (N, C) and weight (V, C) are multiplied in autocast's format. `targets` (…, N) are split like them,
    and `constants` go whole to every chunk: both are what `chunk_loss` takes.
    """
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _MeanInChunks.apply(hidden, weight, targets, count, chunk_loss, with_gradients, *constants)
