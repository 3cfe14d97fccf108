"""Random numbers that depend on (seed, purpose, step) alone, so that nothing a run does shifts what it draws later."""

import numpy as np

DATA, LABELS, DIRECTIONS, DROPOUT = range(4)  # purposes


def stream(seed: int, purpose: int, *position: int) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, purpose, *position))


def torch_seed(seed: int, purpose: int, *position: int) -> int:
    """A seed for torch.Generator.manual_seed."""
    return int(stream(seed, purpose, *position).generate_state(1, np.uint64)[0])
