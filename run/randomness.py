"""Random numbers that depend on (seed, purpose, step) alone, so that nothing a run does shifts what it draws later."""

import numpy as np
import torch

DATA, LABELS, DIRECTIONS, DROPOUT, CURVATURE_DROPOUT = range(5)  # purposes


def stream(seed: int, purpose: int, *position: int) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, purpose, *position))


def torch_seed(seed: int, purpose: int, *position: int) -> int:
    """A seed for torch.Generator.manual_seed."""
    return int(stream(seed, purpose, *position).generate_state(1, np.uint64)[0])


def seed_dropout(seed: int, step: int, rank: int, purpose: int = DROPOUT) -> None:
    """Seed the global generator, from which dropout alone draws: a step's masks depend on no other step."""
    torch.manual_seed(torch_seed(seed, purpose, step, rank))
