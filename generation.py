"""Text from a model, token by token: the keys and values of earlier tokens are kept and not computed again.

Letters in the shape comments: B sequences, T new tokens of each, N tokens of the longest, C channels, V = vocab_size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from head import product_dtype


@torch.no_grad()
def stream(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, generator=None) -> Iterator[Tensor]:
    """Yield `max_new_tokens` continuations by a GPT in eval mode, one token (B, 1) at a time. `draw` has the options.
    Prompts are the rows of a tensor (B, T), or B tensors of any lengths from 1: each goes on as it would alone.

    The context is the last block_size tokens of the prompt and what follows. When it is full its older half is
    forgotten, and the keys and values of the rest are computed again, as all positions are new.
    """
    size = model.config.block_size
    rows = [row[-size:] for row in prompts]
    lengths, context = [len(row) for row in rows], pad_sequence(rows, batch_first=True, padding_value=-1)
    length = (context >= 0).sum(dim=1, keepdim=True)  # (B, 1): `lengths`, on the device
    context = F.pad(context, (0, size - max(lengths))).clamp(min=0)  # (B, block_size)
    places = torch.arange(size, device=context.device).unsqueeze(0)
    cache, cached = Cache(model, len(rows), min(size, max(lengths) + max_new_tokens)), False
    for _ in range(max_new_tokens):
        positions = length - 1 if cached else places[:, : max(lengths)]  # of what is not cached
        hidden = cache.hidden(context.take_along_dim(positions, dim=1), positions, max(lengths))
        last = hidden.take_along_dim((length - 1 - positions[:, :1]).unsqueeze(-1), dim=1)[:, 0]  # (B, C)
        token = draw(F.linear(last, model.wte.weight).float(), temperature, top_k, top_p, generator)
        yield token
        cached = max(lengths) < size
        if not cached:
            full, forgotten = length == size, (size + 1) // 2
            context = torch.where(full, context.roll(-forgotten, dims=1), context)
            length = length - forgotten * full
            lengths = [n - forgotten if n == size else n for n in lengths]
        context.scatter_(1, length, token)
        length, lengths = length + 1, [n + 1 for n in lengths]


class Cache:
    """The keys and values of B sequences, for up to `size` tokens each."""

    def __init__(self, model, sequences: int, size: int):
        config, weight = model.config, model.wte.weight
        shape = config.n_layer, 2, sequences, config.n_head, size, config.n_embd // config.n_head
        self.model, self.layers = model, weight.new_zeros(shape, dtype=product_dtype(weight))
        self.rows = torch.arange(sequences, device=weight.device).unsqueeze(1)

    def hidden(self, idx: Tensor, positions: Tensor, longest: int) -> Tensor:
        """The final, normalised hidden states, (B, T, C), of tokens `idx` (B, T) at `positions` (B or 1, T), where the
        longest sequence has N = `longest` tokens, these included. Earlier tokens are cached, these will be.
        """
        x = self.model.wte(idx) + self.model.wpe(positions)
        seen = torch.arange(longest, device=idx.device) <= positions[:, None, :, None]  # (B or 1, 1, T, N)
        for block, (keys, values) in zip(self.model.h, self.layers, strict=True):  # each (B, n_head, size, C / n_head)
            q, k, v = block.before(x)
            keys[self.rows, :, positions] = k.transpose(1, 2)
            values[self.rows, :, positions] = v.transpose(1, 2)
            keys, values = keys[:, :, :longest], values[:, :, :longest]
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=block.attn.scale)
            x = block.after(x, y)
        return self.model.ln_f(x)


def draw(logits, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None) -> Tensor:
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
        before = descending[:, :-1].cumsum(dim=-1)  # of the second and so on, the sum of all that are likelier
        descending[:, 1:].masked_fill_(before >= top_p, 0)
        probabilities = probabilities.scatter(1, tokens, descending)
    return torch.multinomial(probabilities, 1, generator=generator)
