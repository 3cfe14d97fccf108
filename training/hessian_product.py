"""H u, the Hessian of a GPT's training loss times a direction: exact, in about twice the memory of a training pass.

Along u the loss changes at the rate g·u, and the gradient of that number is H u: reverse over forward mode. The forward
pass carries every activation as a pair: its value x and its tangent dx, the rate at which it changes along u. A
backward pass from the loss's tangent follows, as in training. Three things keep the model from being used as it is:

- Fused attention has no forward mode. So a block is taken apart: what comes before attention and what comes after it
  go through torch.func.jvp (`on_pairs`), and the tangent of attention is written out, for a few queries at a time. Its
  T x T matrices are computed again in the backward pass and are never in memory as a whole (as in FlashAttention,
  arXiv 2205.14135).
- The gradient of F.layer_norm's own tangent is wrong (torch 2.13): `PlainLayerNorm` takes its place.
- All blocks have the same code: one block without weights is compiled once and is given each block's weights in turn.

Letters in the shape comments: B sequences, H heads, T tokens, C channels, D = C / H; R queries of a block, N keys.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jvp
from torch.utils.checkpoint import checkpoint

from head import ChunkLoss, mean_in_chunks, of_labels, product_dtype, wide_dtype
from model import GPT, Block, GPTConfig

QUERIES_PER_BLOCK = 128

Named = dict[str, Tensor]


class HessianProduct:
    """Products with the Hessian of the loss of `model`, without dropout, at its present weights. With `compile` every
    part is compiled once, for all layers.
    """

    def __init__(self, model: GPT, compile: bool):
        def compiled(function: Callable) -> Callable:
            return torch.compile(function, dynamic=False) if compile else function

        self.model = model
        with torch.device("meta"):  # without weights
            parts = BeforeAttention(model.config), AfterAttention(model.config), PlainLayerNorm(model.config)
        self.before_attention, self.after_attention, self.norm = (compiled(on_pairs(part.eval())) for part in parts)
        self.attention = compiled(attention_tangent), compiled(attention_tangent_backward)
        self.loss_tangent = TangentLoss()
        if compile:
            self.loss_tangent.compile(dynamic=False)

    def weights(self) -> Named:
        """The model's weights by name, each with a `grad` of zeros, which is apart from the model's own gradients."""
        weights = {name: param.detach().requires_grad_() for name, param in self.model.named_parameters()}
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        return weights

    def add(self, weights: Named, u: Named, idx: Tensor, targets: Tensor, count: int) -> None:
        """Add H u, H that of the sum of the tokens' losses divided by `count`, to the `grad` of `weights`.

        idx, targets: (B, T) integers; a target of -1 is left out. `u` goes by the names of the parameters.
        """
        model, (embedding, positions) = self.model, ("wte.weight", "wpe.weight")

        def embed(weights: Named) -> Tensor:
            return F.embedding(idx, weights[embedding]) + weights[positions][: idx.shape[1]]

        x, dx = embed(weights), embed(u).requires_grad_()  # as in later layers, which share the compiled code
        for number, block in enumerate(model.h):
            parts = block, part_of(weights, f"h.{number}."), part_of(u, f"h.{number}.")
            if model.h.checkpoint_activations:
                x, dx = checkpoint(self.block, *parts, x, dx, use_reentrant=False, preserve_rng_state=False)
            else:
                x, dx = self.block(*parts, x, dx)
        hidden = torch.cat(self.norm(part_of(weights, "ln_f."), part_of(u, "ln_f."), (x,), (dx,)), dim=-1)  # (B, T, 2C)
        rows, head, du = hidden.flatten(0, 1), weights[embedding], u[embedding].to(product_dtype(x))
        mean_in_chunks(rows, head, targets.flatten(), count, self.loss_tangent, du).backward()

    def block(self, block: Block, weights: Named, u: Named, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        qkv, d_qkv = self.before_attention(weights, u, (x,), (dx,))
        y = F.scaled_dot_product_attention(*qkv, is_causal=True, scale=block.attn.scale)
        dy = AttentionTangent.apply(*qkv, *d_qkv, block.attn.scale, self.attention)
        return self.after_attention(weights, u, (x, y), (dx, dy))


def part_of(tensors: Named, prefix: str) -> Named:
    """The tensors whose names have a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class PlainLayerNorm(nn.LayerNorm):
    """LayerNorm by simple operations, so that the gradient of its tangent is right."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(wide_dtype(x))
        x = x - x.mean(dim=-1, keepdim=True)
        x = x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt() * self.weight
        return x if self.bias is None else x + self.bias


class PlainBlock(Block):
    def __init__(self, config: GPTConfig):
        super().__init__(config, layer_idx=0)
        self.ln_1, self.ln_2 = PlainLayerNorm(config), PlainLayerNorm(config)


class BeforeAttention(PlainBlock):
    """x (B, T, C) gives queries, keys and values, each (B, H, T, D)."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        (B, T, C), attn = x.shape, self.attn
        parts = attn.c_attn(self.ln_1(x)).split(C, dim=2)
        return tuple(part.view(B, T, attn.n_head, -1).transpose(1, 2) for part in parts)


class AfterAttention(PlainBlock):
    """x (B, T, C) and attention's output y (B, H, T, D) give the output of the block (B, T, C)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.attn.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


def on_pairs(module: nn.Module) -> Callable:
    """A module as a function of (weights, u, values of the inputs, their tangents), which gives the values of the
    outputs and their tangents.
    """

    def run(weights: Named, u: Named, values: tuple, tangents: tuple) -> tuple:
        def function(weights: Named, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            return functional_call(module, weights, inputs)

        return jvp(function, (weights, *values), (u, *tangents))

    return run


class AttentionTangent(torch.autograd.Function):
    """The tangent of causal attention, by `functions`: attention_tangent and attention_tangent_backward."""

    @staticmethod
    def forward(ctx, q, k, v, dq, dk, dv, scale, functions):
        ctx.scale, ctx.functions = torch.tensor(scale, dtype=torch.float64), functions  # a number would be a constant
        ctx.save_for_backward(q, k, v, dq, dk, dv)
        return functions[0](q, k, v, dq, dk, dv, ctx.scale)

    @staticmethod
    def backward(ctx, gradient):
        # half of the heads at a time, as the temporary tensors are large
        halves = zip(*(x.chunk(2, dim=1) for x in (*ctx.saved_tensors, gradient)), strict=True)
        gradients = [ctx.functions[1](*half, ctx.scale) for half in halves]
        return *(torch.cat(parts, dim=1) for parts in zip(*gradients, strict=True)), None, None


def attention_tangent(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: Tensor) -> Tensor:
    """The tangent of softmax(scale * q kᵀ, causal) v, (B, H, T, D) as all arguments, along dq, dk and dv."""
    shape, (q, k, v, dq, dk, dv) = q.shape, (x.flatten(0, 1) for x in (q, k, v, dq, dk, dv))  # (BH, T, D)
    rows = []
    for seen, p, c in attention_weights(q, k, dq, dk, scale):
        rows.append((p * c).to(q.dtype) @ v[:, :seen] + p.to(q.dtype) @ dv[:, :seen])
    return torch.cat(rows, dim=1).view(shape)


def attention_tangent_backward(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, gradient: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """The gradients by q, k, v, dq, dk and dv, where `gradient` is that by the tangent of attention, of its shape."""
    shape, dtype = q.shape, q.dtype
    q, k, v, dq, dk, dv, gradient = (x.flatten(0, 1) for x in (q, k, v, dq, dk, dv, gradient))  # (BH, T, D)
    g_q, g_dq, g_k, g_v, g_dk, g_dv = ([] for _ in range(6))  # a block of queries or keys each
    for seen, p, c in attention_weights(q, k, dq, dk, scale):
        own = slice(seen - p.shape[1], seen)
        g = gradient[:, own]
        by_dp = (g @ v[:, :seen].mT).to(p.dtype)  # dp = p * c
        by_dp = by_dp - (p * by_dp).sum(dim=-1, keepdim=True)
        by_p = (g @ dv[:, :seen].mT).to(p.dtype) + by_dp * c
        by_scores = (scale * p * (by_p - (p * by_p).sum(dim=-1, keepdim=True))).to(dtype)
        by_tangent = (scale * p * by_dp).to(dtype)  # the scores' tangent
        g_q.append(by_scores @ k[:, :seen] + by_tangent @ dk[:, :seen])
        g_dq.append(by_tangent @ k[:, :seen])
        add_blocks(g_k, by_scores.mT @ q[:, own] + by_tangent.mT @ dq[:, own])
        add_blocks(g_dk, by_tangent.mT @ q[:, own])
        add_blocks(g_v, (p * c).to(dtype).mT @ g)
        add_blocks(g_dv, p.to(dtype).mT @ g)
    return tuple(torch.cat(blocks, dim=1).to(dtype).view(shape) for blocks in (g_q, g_k, g_v, g_dq, g_dk, g_dv))


def add_blocks(sums: list[Tensor], part: Tensor) -> None:
    """Add to `sums`, one for each block of keys, the rows of `part` (BH, N, D). `part` has one block more."""
    blocks = part.to(wide_dtype(part)).split(QUERIES_PER_BLOCK, dim=1)
    sums[:] = [total + block for total, block in zip(sums, blocks, strict=False)] + [blocks[-1]]


def attention_weights(
    q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, scale: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each block of queries the number N of keys that they see, the attention weights p, and c = dp / p, which is
    the tangent of the scores less its mean under p; p and c are (BH, R, N).
    """
    queries, keys = torch.cat((dq, q), dim=-1), torch.cat((k, dk), dim=-1)  # (BH, T, 2D)
    for first in range(0, q.shape[1], QUERIES_PER_BLOCK):
        own, seen = slice(first, first + QUERIES_PER_BLOCK), min(first + QUERIES_PER_BLOCK, q.shape[1])
        scores = (q[:, own] @ k[:, :seen].mT).to(wide_dtype(q))
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(first + 1)
        p = (scale * scores).masked_fill(later, -torch.inf).softmax(dim=-1)
        tangent = scale * (queries[:, own] @ keys[:, :seen].mT).to(wide_dtype(q))
        yield seen, p, tangent - (p * tangent).sum(dim=-1, keepdim=True)


class TangentLoss(ChunkLoss):
    """The tangent of the loss of a chunk in place of the loss. `hidden` (N, 2C) holds the hidden states and their
    tangents, `du` (V, C) is the tangent of the weight.
    """

    logit_copies = 7  # 14 bytes a logit in bfloat16

    def loss(self, hidden: Tensor, weight: Tensor, targets: Tensor, du: Tensor) -> Tensor:
        values, tangents = hidden.chunk(2, dim=-1)
        logits = F.linear(values, weight)  # (N, V)
        tangent = (F.linear(tangents, weight) + F.linear(values, du)).to(wide_dtype(logits))
        mean = (logits.to(tangent.dtype).softmax(dim=-1) * tangent).sum(dim=-1)
        return ((mean - of_labels(tangent, targets)) * (targets >= 0)).sum()
