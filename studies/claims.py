"""Claims about runs: each has a rule of decision, a 95 % interval, and one word for an answer.

A claim is about the mean difference of losses between runs that share their seed, and with it their first weights and
their batches. It is confirmed where the difference is certainly below one bound, and refuted where it is certainly
above another: by Student's t-test at 5 %, two-sided, with Holm's correction over all claims of a report.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_1samp

LEVEL = 0.05


@dataclass(frozen=True)
class Claim:
    name: str
    text: str
    difference: np.ndarray  # (seeds,) nats per token
    confirmed_below: float = 0.0
    refuted_above: float = 0.0
    refuted_first: bool = False  # what counts where both hold
    can_be_confirmed: bool = True

    def interval(self) -> tuple[float, float, float]:
        """The mean difference and its 95 % interval."""
        low, high = ttest_1samp(self.difference, 0.0).confidence_interval(1 - LEVEL)
        return float(self.difference.mean()), float(low), float(high)

    def leaning(self) -> tuple[str, float]:
        """The word that the data speak for, and the p-value against it."""
        below = 2 * ttest_1samp(self.difference, self.confirmed_below, alternative="less").pvalue
        above = 2 * ttest_1samp(self.difference, self.refuted_above, alternative="greater").pvalue
        words = {"confirmed": float(below) if self.can_be_confirmed else 1.0, "refuted": float(above)}
        sure = [word for word, p in words.items() if p <= LEVEL] or [min(words, key=words.get)]
        word = sure[-1] if self.refuted_first else sure[0]
        return word, words[word]


def verdicts(claims: Sequence[Claim]) -> dict[str, str]:
    """`confirmed`, `refuted` or `undecided` for each claim by its name, by Holm's step-down procedure."""
    words, answers, left = {claim.name: claim.leaning() for claim in claims}, {}, len(claims)
    for name, (word, p) in sorted(words.items(), key=lambda item: item[1][1]):
        stopped = "undecided" in answers.values()
        answers[name] = word if p * left <= LEVEL and not stopped else "undecided"
        left -= 1
    return answers


def in_words(claim: Claim) -> str:
    mean, low, high = claim.interval()
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
