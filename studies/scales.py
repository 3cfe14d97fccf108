"""How large a study is: its model, batch and length, and where its searches begin."""

from dataclasses import dataclass
from typing import Any

from studies.search import Space

Settings = dict[str, Any]

LABELS = {
    "adamw": "AdamW",
    "lion": "Lion",
    "sophiag_paper": "Sophia-G, paper's estimator",
    "sophiag": "Sophia-G, averaged estimator",
    "sophiah": "Sophia-H",
}


@dataclass(frozen=True)
class Scale:
    base: Settings  # of every run
    optimizers: dict[str, Settings]  # besides the base, by LABELS' keys
    centres: dict[str, dict[str, float]]  # of the searches
    first: int  # random runs of a search
    tuning: int  # runs of a search
    seeds: tuple[int, ...]

    def settings(self, optimizer: str) -> Settings:
        return self.base | self.optimizers[optimizer]

    def space(self, optimizer: str) -> Space:
        return Space(self.centres[optimizer])


OPTIMIZERS: dict[str, Settings] = {
    "adamw": {"optimizer": "adamw"},
    "lion": {"optimizer": "lion"},
    "sophiag_paper": {"optimizer": "sophiag", "hessian_estimator": "paper"},
    "sophiag": {"optimizer": "sophiag", "hessian_estimator": "averaged"},
    "sophiah": {"optimizer": "sophiah"},
}
LAPTOP: Settings = {
    "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 128, "batch_size": 1024, "micro_batch_size": 64,
    "max_iters": 240, "warmup_iters": 24, "eval_interval": 10, "eval_sequences": 1024, "device": "cpu",
    "dtype": "bfloat16",
}  # fmt: skip
GPU: Settings = {
    "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 1024, "batch_size": 120, "micro_batch_size": 40,
    "max_iters": 1000, "warmup_iters": 100, "eval_interval": 50, "eval_sequences": 512, "device": "cuda",
    "dtype": "bfloat16",
}  # fmt: skip
PAPER: Settings = {
    "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 480, "micro_batch_size": 12,
    "max_iters": 100_000, "warmup_iters": 2000, "eval_interval": 1000, "device": "cuda", "dtype": "bfloat16",
}  # fmt: skip


def centres(adamw: float, lion: float, sophia: float, sophias_beta1: float) -> dict[str, dict[str, float]]:
    """Where the searches begin: at these learning rates, and otherwise at the optimizers' defaults."""
    g = {"learning_rate": sophia, "rho": 0.05, "beta1": sophias_beta1}
    return {
        "adamw": {"learning_rate": adamw, "beta1": 0.9, "beta2": 0.95},
        "lion": {"learning_rate": lion, "beta1": 0.95, "beta2": 0.98},
        "sophiag_paper": g,
        "sophiag": g,
        "sophiah": g | {"rho": 0.01},
    }


SCALES = {
    # Sophia's beta1 begins at 0.9, as short runs do badly with the paper's 0.96
    "laptop": Scale(
        LAPTOP,
        OPTIMIZERS
        | {"sophiag_paper": OPTIMIZERS["sophiag_paper"] | {"hessian_batch_size": 512}},  # half, as the paper's
        centres(adamw=8e-3, lion=1e-3, sophia=8e-3, sophias_beta1=0.9),
        first=8,
        tuning=16,
        seeds=(1, 2, 3),
    ),
    "gpu": Scale(
        GPU,
        OPTIMIZERS | {"sophiag_paper": OPTIMIZERS["sophiag_paper"] | {"hessian_batch_size": 60}},
        centres(adamw=1.2e-3, lion=4e-4, sophia=1e-3, sophias_beta1=0.9),
        first=4,
        tuning=8,
        seeds=(1, 2, 3),
    ),
    "paper": Scale(
        PAPER,
        OPTIMIZERS,
        centres(adamw=6e-4, lion=1e-4, sophia=6e-4, sophias_beta1=0.96),
        first=4,
        tuning=8,
        seeds=(1, 2, 3),
    ),
}
