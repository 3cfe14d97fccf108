"""GPT-2: a decoder-only transformer (Radford et al., 2019) in one file.

Letters in the shape comments: B sequences, T tokens a sequence, C = n_embd channels, V = vocab_size.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LAYERS = 1000  # a file that tells of more was made to waste memory
SHORT = 256  # tokens, up to which a CPU trains in bfloat16 faster with plain attention than with PyTorch's fused one
# Logits that a loss has in memory at a time; on GPUs, where products want to be large: not measured
CPU_LOGITS, LOGITS = 2**25, 2**28


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

    @property
    def parameters(self) -> int:
        """The number of weights of such a model."""
        E, biases = self.n_embd, self.bias
        block = 12 * E * E + 2 * E + biases * (9 * E + 2 * E)  # four matrices and two norms
        return (self.vocab_size + self.block_size) * E + self.n_layer * block + (1 + biases) * E


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2)
        q, k, v = heads.split(self.n_head, dim=1)  # each (B, n_head, T, C / n_head)
        dropout = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= SHORT:
            past = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            scores = torch.where(past, (q @ k.mT).float() * self.scale, -math.inf)  # (B, n_head, T, T)
            y = F.dropout(scores.softmax(dim=-1).to(v.dtype), dropout) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the output head, which never has the logits of all positions in memory: as the gradient of
    a sum is the sum of gradients, each part's is taken at once, and its logits are forgotten.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        draw: Callable | None,
        head_pass: Callable,
        learning: bool,
    ) -> Tensor:
        """hidden (N, C), weight (V, C), targets (…, N); `draw` as for GPT.forward; `head_pass`: the function below, or
        what torch.compile makes of it. Gradients are computed if `learning`.
        """
        (N, _), V, device = hidden.shape, len(weight), hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        low_hidden, low_weight = hidden.to(dtype), weight.to(dtype)  # once for all parts
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_weight = torch.zeros_like(weight, dtype=wide) if learning else None
        parts = max(1, math.ceil(N * V / (CPU_LOGITS if device == "cpu" else LOGITS)))
        size = math.ceil(N / parts)
        results = [
            head_pass(part, low_weight, given, draw, wide, d_weight)
            for part, given in zip(low_hidden.split(size), targets.split(size, dim=-1), strict=True)
        ]
        losses, labels, d_hidden = zip(*results, strict=True)
        labels = torch.cat(labels)
        kept, index = (labels >= 0).to(wide).unsqueeze(-1), labels.clamp_min(0)
        scale = 1 / kept.sum()
        if learning:  # the gradient by a logit is its softmax, less 1 if it is the label's
            d_hidden = torch.cat(d_hidden) - kept * low_weight[index]
            d_weight.index_add_(0, index, low_hidden * -kept)
            finite = scale.nan_to_num(posinf=0)  # without a label the loss is nan, its gradient 0, as F.cross_entropy's
            ctx.save_for_backward(hidden, weight, labels, finite)
            ctx.gradients = d_hidden, d_weight
        return torch.stack(losses).sum() * scale

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, scale = ctx.saved_tensors
        if ctx.gradients is not None and not torch.is_grad_enabled():
            d_hidden, d_weight = (x.mul_(gradient * scale) for x in ctx.gradients)  # in place, as they are large
        else:  # for a second derivative, or once more: the plain way, from inputs that do not depend on each other
            with torch.enable_grad():
                hidden, weight = (
                    x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (hidden, weight)
                )
                loss = token_cross_entropy(F.linear(hidden, weight), labels)
                d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight), gradient, create_graph=True)
        ctx.gradients = None
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None, None, None, None


def head_pass(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    draw: Callable | None,
    wide: torch.dtype,
    d_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """For some of the positions, hidden (n, C): the sum of their losses in the format `wide`, their labels (n,), and
    the gradient (n, C) by `hidden` of the logarithms of their softmaxes' denominators. That by `weight` is added to
    `d_weight`; where that is None there are none.
    """
    logits = F.linear(hidden, weight).to(wide)  # (n, V)
    labels = draw(logits, targets) if draw else targets
    kept = (labels >= 0).to(wide).unsqueeze(-1)  # (n, 1)
    index = labels.clamp_min(0).unsqueeze(-1)
    peak = logits.amax(dim=-1, keepdim=True)
    masses = (logits - peak).exp_()
    total = masses.sum(dim=-1, keepdim=True)
    loss = ((total.log() + peak - logits.gather(-1, index)) * kept).sum()
    if d_weight is None:
        return loss, labels, None
    del logits
    softmax = masses.mul_(kept / total).to(hidden.dtype)
    d_weight += softmax.t() @ hidden
    return loss, labels, softmax @ weight


class GPT(nn.Module):
    """The model. Its parameters have the names that Hugging Face's GPT-2 gives them, without the prefix `transformer.`;
    the output head is the token embedding itself (tied), so it has no parameter of its own.

    Set `checkpoint_activations` to keep only the blocks' inputs for the backward pass and compute the rest again.
    """

    checkpoint_activations = False
    head_pass = staticmethod(head_pass)

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        for name, parameter in self.named_parameters():
            # GPT-2's initialisation: N(0, 0.02), and residual projections scaled by 1 / sqrt(2 * n_layer)
            if parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def compile(self, **options) -> None:
        """torch.compile, in place, the blocks and the head, apart: so all losses share the compiled blocks. Copies of
        the model, and `generate`, whose lengths change, are not compiled.
        """
        self.hidden = torch.compile(self.hidden, **options)
        self.head_pass = torch.compile(self.head_pass, **options)

    def __getstate__(self) -> dict:
        # what is compiled belongs to this very model
        return {name: value for name, value in super().__getstate__().items() if name not in ("hidden", "head_pass")}

    def hidden(self, idx: Tensor) -> Tensor:
        """The final, normalised hidden states, (B, T, C), of tokens `idx`, (B, T) integers."""
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size {self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[:T]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoint_activations else block(x)
        return self.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None, draw: Callable | None = None) -> Tensor:
        """Logits (B, T, V) for tokens `idx` (B, T); with `targets` (B, T), instead their mean cross-entropy in nats,
        a float32 scalar (float64 for a float64 model). A target of -1 is left out of the mean.

        The targets may depend on the logits: `draw(logits, targets)`, called with (n, V) and (…, n) for parts of the
        positions, returns (n,); `targets` are then (…, B, T) of what it needs. The loss can be differentiated twice by
        torch.autograd; for torch.func's transforms, take `token_cross_entropy` of the logits.
        """
        hidden, weight = self.hidden(idx), self.wte.weight
        if targets is None:
            return F.linear(hidden, weight)
        if targets.shape[-2:] != idx.shape:
            raise ValueError(f"targets of shape {tuple(targets.shape)} for tokens of shape {tuple(idx.shape)}")
        learning = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return HeadLoss.apply(hidden.flatten(0, 1), weight, targets.flatten(-2), draw, self.head_pass, learning)

    def flops_per_token(self) -> int:
        """Floating-point operations of one training step (forward and backward) per token of a full block: 6 per
        weight that is multiplied (all but the position embedding) plus attention's 12 * n_layer * n_embd * block_size
        (PaLM, arXiv 2204.02311, appendix B).
        """
        c = self.config
        weights = sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield `max_new_tokens` continuations of `idx` (B, T), one token (B, 1) at a time. Temperature 0 (or below
        1e-6) takes the most likely token; `top_k` samples from the k most likely. Context beyond block_size is
        forgotten.
        """
        for _ in range(max_new_tokens):
            last = GPT.hidden(self, idx[:, -self.config.block_size :])[:, -1]  # (B, C); never compiled
            logits = F.linear(last, self.wte.weight).float()  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature < 1e-6:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
            idx = torch.cat((idx, token), dim=1)
            yield token

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`idx` (B, T) and its continuation, (B, T + max_new_tokens); see `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator)], dim=1)

    @classmethod
    def from_pretrained(cls, name_or_folder: str, block_size: int | None = None, dropout: float = 0.0) -> "GPT":
        """A model with Hugging Face GPT-2 weights: a folder with config.json and model.safetensors, or a name on the
        hub (`gpt2`, `gpt2-medium`, …), which is downloaded. A smaller `block_size` drops the later positions.
        Raises FileNotFoundError or OSError where the weights cannot be had, ValueError where they are not GPT-2's.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(name_or_folder)
        if folder.is_dir():
            paths = [folder / "config.json", folder / "model.safetensors"]
        else:
            from huggingface_hub import hf_hub_download

            paths = [hf_hub_download(name_or_folder, name) for name in ("config.json", "model.safetensors")]
        try:
            with open(paths[0], "rb") as file:
                hf = dict(json.loads(file.read(2**20)))
            weights = {name.removeprefix("transformer."): w for name, w in load_file(paths[1]).items()}
            config = GPTConfig(
                block_size=block_size or hf["n_positions"],
                vocab_size=hf["vocab_size"],
                n_layer=hf["n_layer"],
                n_head=hf["n_head"],
                n_embd=hf["n_embd"],
                dropout=dropout,
                bias=True,
                scale_attn_by_inverse_layer_idx=hf.get("scale_attn_by_inverse_layer_idx", False),
            )
            sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
            if any(type(size) is not int or size < 1 for size in sizes) or config.n_layer > MAX_LAYERS:
                raise ValueError(f"impossible sizes in config.json: {sizes}")
        except (ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
            raise ValueError(f"{name_or_folder} is damaged: {error}") from error
        if hf.get("model_type") != "gpt2" or hf.get("activation_function", "gelu_new") != "gelu_new":
            raise ValueError(f"{name_or_folder} is not a GPT-2 model")
        if config.block_size > hf["n_positions"]:
            raise ValueError(f"{name_or_folder} has {hf['n_positions']} positions, fewer than block_size {block_size}")
        if config.parameters > sum(weight.numel() for weight in weights.values()):
            raise ValueError(f"{name_or_folder} is damaged: it lacks weights that its config.json tells of")
        model = cls(config)
        for name, parameter in model.named_parameters():
            if name not in weights:
                raise ValueError(f"{name_or_folder} lacks the weight {name}")
            weight = weights[name]
            if ".attn.c_" in name or ".mlp.c_" in name:
                weight = weight.t()  # Hugging Face's Conv1D keeps (in, out); a bias is not changed by .t()
            if name == "wpe.weight":
                weight = weight[: config.block_size]
            if weight.shape != parameter.shape:
                raise ValueError(f"{name_or_folder}: {name} has the shape {tuple(weight.shape)}")
            with torch.no_grad():
                parameter.copy_(weight)
        return model


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of `targets` (…) under `logits` (…, V), in float32 or wider; -1 is left out."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, -2).to(wide), targets.flatten(), ignore_index=-1)
