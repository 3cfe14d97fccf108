"""GPT-2: a decoder-only transformer (Radford et al., 2019).

Letters in the shape comments: B sequences, T tokens a sequence, C = n_embd channels, V = vocab_size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from generation import stream
from head import ChunkLoss, mean_in_chunks
from sophia import labels_from_uniforms


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 small's, its vocabulary padded to a multiple of 64."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    exact_gelu: bool = False


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, n_head, T, C / n_head)."""
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale)

    def merge(self, y: Tensor) -> Tensor:
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

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x, self.attn.attend(*self.before(x)))

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.heads(self.ln_1(x))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.attn.merge(y)
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.ModuleList):
    checkpoint_activations = False  # if set, only the blocks' inputs are kept for the backward pass

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoint_activations else block(x)
        return x


class GPT(nn.Module):
    """The model. Its parameters have the names that Hugging Face's GPT-2 gives them, without the prefix `transformer.`;
    the output head is the token embedding itself (tied), so it has no parameter of its own.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = Blocks(Block(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.label_loss, self.sampled_label_loss = ChunkLoss(), ChunkLoss(draw=labels_from_uniforms)
        for name, parameter in self.named_parameters():
            # GPT-2's initialisation: N(0, 0.02), and residual projections scaled by 1 / sqrt(2 * n_layer)
            if parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def compile(self) -> None:
        """torch.compile, in place, what takes the time: in parts, so that all losses share the blocks."""
        for part in (self.h, self.label_loss, self.sampled_label_loss):
            part.compile(dynamic=False)

    def hidden(self, idx: Tensor) -> Tensor:
        """The final, normalised hidden states, (B, T, C), of tokens `idx`, (B, T) integers."""
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size {self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[:T]
        return self.ln_f(self.h(F.dropout(x, self.config.dropout, self.training)))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for tokens `idx` (B, T); with `targets` (B, T), instead their mean cross-entropy in nats,
        a float32 scalar (float64 for a float64 model). A target of -1 is left out of the mean. The loss can be
        differentiated once; for second derivatives take F.cross_entropy of the logits.
        """
        hidden, weight = self.hidden(idx), self.wte.weight
        if targets is None:
            return F.linear(hidden, weight)
        count = (targets >= 0).sum()
        return mean_in_chunks(hidden.flatten(0, 1), weight, targets.flatten(), count, self.label_loss)

    def sampled_loss(self, idx: Tensor, uniforms: Tensor) -> Tensor:
        """The mean cross-entropy of labels drawn from the model's own softmax by `uniforms` (2, B, T) in [0, 1)."""
        hidden, uniforms = self.hidden(idx).flatten(0, 1), uniforms.flatten(1)
        return mean_in_chunks(hidden, self.wte.weight, uniforms, len(hidden), self.sampled_label_loss)

    def flops_per_token(self) -> int:
        """Floating-point operations of one training step (forward and backward) per token of a full block: 6 per
        weight that is multiplied (all but the position embedding) plus attention's 12 * n_layer * n_embd * block_size
        (PaLM, arXiv 2204.02311, appendix B).
        """
        weights = sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel()
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, generator=None) -> Tensor:
        """`idx` (B, T) and its continuation, (B, T + max_new_tokens); generation.py tells more."""
        return torch.cat([idx, *stream(self, idx, max_new_tokens, temperature, top_k, top_p, generator)], dim=1)

    @classmethod
    def from_pretrained(cls, name_or_folder: str, block_size: int | None = None, dropout: float = 0.0) -> "GPT":
        """A model with GPT-2 weights: of a name on the hub, a folder or a ckpt.pt file. See `pretrained.load`."""
        import pretrained  # which builds on this module

        return pretrained.load(name_or_folder, block_size, dropout)
