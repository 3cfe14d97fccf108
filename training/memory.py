"""What a pass takes on a GPU, compiled and in bfloat16. The figures are read off the code that torch.compile (2.13)
generates for contexts up to 1,024: `python -m tests.cuda_scenarios memory` compares. None was measured on a GPU.
"""

from dataclasses import dataclass

from head import ChunkLoss, chunk_rows
from model import GPTConfig
from training.hessian_product import TangentLoss


@dataclass(frozen=True)
class Pass:
    """Bytes of tensors, for each token and channel where nothing else is said."""

    block: int  # that a block keeps for its backward pass
    block_input: int  # … with checkpoint_activations
    copies: int  # of the blocks' weights, for each weight
    copies_again: int  # … with checkpoint_activations, in the backward pass
    in_head: int  # besides the blocks'
    in_backward: int  # likewise
    chunk: int  # logits of a chunk
    logit: int  # for each logit of a chunk
    embedding: int  # for each weight of the embedding, in the head


TRAINING = Pass(36, 4, 2, 2, in_head=8, in_backward=14, chunk=ChunkLoss.gpu_logits, logit=4, embedding=6)
HUTCHINSON = Pass(70, 8, 4, 0, in_head=20, in_backward=40, chunk=TangentLoss.gpu_logits, logit=14, embedding=8)


def peak_bytes(kind: Pass, config: GPTConfig, sequences: int, checkpointed: bool) -> int:
    """The most that a pass over full sequences takes at a time, besides tensors as large as the weights: those
    themselves, sums of gradients, the optimizer's state, and the directions of a Hutchinson pass.
    """
    C, V, L, tokens = config.n_embd, config.vocab_size, config.n_layer, sequences * config.block_size
    kept, copies = (kind.block_input, kind.copies_again) if checkpointed else (kind.block, kind.copies)
    logits = chunk_rows(tokens, V, kind.chunk) * V
    head = kind.in_head * tokens * C + kind.logit * logits + kind.embedding * V * C
    backward = (kind.in_backward + kind.block - kept) * tokens * C + 6 * V * C  # checkpointed: a block's tensors again
    copies *= 12 * L * C**2
    return kept * L * tokens * C + max(head if checkpointed else head + copies, backward + copies)


def hutchinson_sequences(config: GPTConfig, micro_batch_size: int, checkpointed: bool, more: int) -> int:
    """How many sequences a Hutchinson pass may take, to need no more than training on a micro-batch does; at least one.
    `more` are the bytes of tensors as large as the weights that it needs besides.
    """
    most = peak_bytes(TRAINING, config, micro_batch_size, checkpointed) - more
    fitting = (n for n in range(1, micro_batch_size) if peak_bytes(HUTCHINSON, config, n, checkpointed) <= most)
    return max(fitting, default=1)
