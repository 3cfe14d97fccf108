"""GPT-2: a decoder-only transformer (Radford et al., 2019).

Letters in the shape comments: B sequences, T tokens a sequence, C = n_embd channels, V = vocab_size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from head import ChunkLoss, mean_in_chunks


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. Each field but vocab_size is a setting too. The defaults are GPT-2 small's."""

    block_size: int = 1024
    vocab_size: int = 50304  # 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    exact_gelu: bool = False


class KVCache:
    """The keys and values of the tokens that a model has seen, for up to `size` tokens of B sequences."""

    def __init__(self, size: int):
        self.size, self.length = size, 0  # tokens it can hold, tokens it holds
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values, each (B, n_head, size, C / n_head)

    def append(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values of T more tokens, (B, n_head, T, C / n_head); returns those of all tokens."""
        if layer_idx == len(self.layers):
            shape = *k.shape[:2], self.size, k.shape[3]
            self.layers.append((k.new_empty(shape), v.new_empty(shape)))
        keys, values = self.layers[layer_idx]
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class CausalSelfAttention(nn.Module):
    """Whoever changes it changes training/hessian_product.py too, which computes it again with its tangent."""

    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.n_head, self.dropout, self.layer_idx = config.n_head, config.dropout, layer_idx
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, T, C) gives (B, T, C). With a cache x is the first T tokens, or one further token."""
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.append(self.layer_idx, k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1, scale=self.scale)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout, self.gelu = config.dropout, "none" if config.exact_gelu else "tanh"
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.ModuleList):
    checkpoint_activations = False  # if set, only the blocks' inputs are kept for the backward pass

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoint_activations else block(x)
        return x


class GPT(nn.Module):
    """Parameters are named as in Hugging Face's GPT-2. The output head is the token embedding itself (tied)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = Blocks(Block(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.chunk_loss = ChunkLoss()
        for name, parameter in self.named_parameters():
            # GPT-2's initialisation: N(0, 0.02), and residual projections scaled by 1 / sqrt(2 * n_layer)
            if parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def compile(self) -> None:
        """torch.compile, in place, the blocks and the loss: apart, so that every loss shares the compiled blocks."""
        for part in (self.h, self.chunk_loss):
            part.compile(dynamic=False)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final, normalised hidden states (B, T, C) of tokens `idx`, (B, T) integers, that follow the cached ones."""
        start, T = cache.length if cache else 0, idx.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"a sequence of {start + T} tokens is longer than block_size {self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[start : start + T]
        x = F.dropout(x, self.config.dropout, self.training)
        if cache is None:
            return self.ln_f(self.h(x))
        for block in self.h:  # one by one: a compiled self.h would be compiled anew for every length
            x = block(x, cache)
        cache.length += T
        return self.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for tokens `idx` (B, T); with `targets` (B, T), instead their mean cross-entropy in nats,
        a float32 scalar (float64 for a float64 model). A target of -1 is left out of the mean. The loss can be
        differentiated once; for second derivatives take F.cross_entropy of the logits.
        """
        hidden, weight = self.hidden(idx), self.wte.weight
        if targets is None:
            return F.linear(hidden, weight)
        count = (targets >= 0).sum()
        return mean_in_chunks(hidden.flatten(0, 1), weight, targets.flatten(), count, self.chunk_loss)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, generator=None) -> Tensor:
        """Tokens `idx` (B, T) and `max_new_tokens` more, (B, T + max_new_tokens). For the options see `draw`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, top_p, generator)], dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, generator=None) -> Iterator[Tensor]:
        """Yield what follows tokens `idx` (B, T), a token (B, 1) at a time. The context is the last block_size tokens.
        When it is full its older half is forgotten, and the rest is computed anew, as all its positions are new.
        """
        context = new = idx[:, -self.config.block_size :]
        cache = KVCache(self.config.block_size)
        for _ in range(max_new_tokens):
            if cache.length == self.config.block_size:
                context = new = context[:, (self.config.block_size + 1) // 2 :]
                cache.length = 0
            logits = F.linear(self.hidden(new, cache)[:, -1], self.wte.weight)  # (B, V)
            new = draw(logits.float(), temperature, top_k, top_p, generator)
            yield new
            context = torch.cat((context, new), dim=1)

    def flops_per_token(self) -> int:
        """Floating-point operations of one training step (forward and backward) per token of a full block: 6 per
        weight that is multiplied (all but the position embedding) plus attention's 12 * n_layer * n_embd * block_size
        (PaLM, arXiv 2204.02311, appendix B).
        """
        weights = sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel()
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator) -> Tensor:
    """Tokens (B, 1) drawn by `logits` (B, V) / temperature; temperature 0 (or below 1e-6) takes the likeliest. `top_k`
    leaves the k likeliest, and `top_p` of these the fewest whose probabilities add up to it.
    """
    if temperature < 1e-6:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        descending, tokens = probabilities.sort(descending=True)
        before = descending[:, :-1].cumsum(dim=-1)  # probability of all likelier tokens
        descending[:, 1:].masked_fill_(before >= top_p, 0)
        probabilities = probabilities.scatter(1, tokens, descending)
    return torch.multinomial(probabilities, 1, generator=generator)
