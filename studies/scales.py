"""How large a study is: its model, batch and length, its optimizers, and the grids of their searches."""

from dataclasses import dataclass, field
from typing import Any

from run.settings import ROOT, read_config
from studies.search import Axes, Budget

Settings = dict[str, Any]

LABELS = {
    "adamw": "AdamW",
    "muon": "Muon",
    "lion": "Lion",
    "signum": "Signum",
    "sophiag": "Sophia-G",
    "sophiag_paper": "Sophia-G, paper's estimator",
    "sophiah": "Sophia-H",
}


@dataclass(frozen=True)
class Scale:
    base: Settings  # shared by every run
    optimizers: dict[str, Settings]  # besides the base, by LABELS' keys
    axes: dict[str, Axes]  # to search; an optimizer without any is tuned already
    lengths: dict[float, tuple[str, ...]]  # besides the scale's own: times its steps, and the optimizers
    final: Settings = field(default_factory=dict)  # besides the tuned settings, in the final runs
    budget: Budget = field(default_factory=Budget)  # for a search
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15)  # for the final runs; no search has seen them

    def settings(self, optimizer: str) -> Settings:
        return self.base | self.optimizers[optimizer]


LENGTHS = {0.5: ("adamw",), 1.5: ("adamw",), 2: ("adamw", "sophiag", "sophiah")}
TWICE = {2: ("adamw",)}

QUICKSTART = read_config(ROOT / "config" / "quickstart.py") | {"device": "cpu", "dtype": "float32"}
del QUICKSTART["out_dir"]
QUICKSTART_SOPHIA = {
    name: QUICKSTART.pop(name)
    for name in "optimizer hessian_estimator hessian_batch_size learning_rate beta1 beta2 rho".split()
}
SHORT: Settings = {
    "dataset": "books",
    "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 1600, "micro_batch_size": 100,
    "max_iters": 240, "warmup_iters": 24, "eval_interval": 10, "eval_sequences": 1024, "device": "cpu",
    "dtype": "float32", "compile": False,
}  # fmt: skip
LAPTOP: Settings = {
    "dataset": "books_bytes",
    "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 32, "micro_batch_size": 32,
    "max_iters": 5000, "warmup_iters": 100, "eval_interval": 2500, "eval_sequences": 0, "log_interval": 100,
    "device": "cpu", "dtype": "float32",
}  # fmt: skip
GPU: Settings = {
    "dataset": "openwebtext",
    "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 1024, "batch_size": 32, "micro_batch_size": 32,
    "max_iters": 5000, "warmup_iters": 100, "eval_interval": 250, "eval_sequences": 512, "device": "cuda",
    "dtype": "bfloat16",
}  # fmt: skip


def optimizers(quarter: int, group: int) -> dict[str, Settings]:
    """What makes an optimizer. Curvature is estimated from a `quarter` of the batch, in groups for Sophia-G."""
    averaged = {"optimizer": "sophiag", "hessian_estimator": "averaged", "hessian_group_size": group}
    return {
        "adamw": {"optimizer": "adamw"},
        "muon": {"optimizer": "muon"},
        "lion": {"optimizer": "lion"},
        # Sophia without curvature: rho 0 leaves the sign of the momentum
        "signum": averaged | {"rho": 0.0, "hessian_batch_size": group, "hessian_interval": 1_000_000},
        "sophiag": averaged | {"hessian_batch_size": quarter},
        "sophiah": {"optimizer": "sophiah", "hessian_batch_size": quarter},
    }


def doubled(least: float, most: float) -> tuple[float, ...]:
    """From `least` to `most`, each twice the one before."""
    values = [least]
    while 1.5 * values[-1] < most:
        values.append(2 * values[-1])
    return tuple(values)


def axes(adamw: tuple[float, ...], signs: tuple[float, ...], sophia: tuple[float, ...]) -> dict[str, Axes]:
    """The grids, by the learning rates of AdamW and Muon, of sign updates, and of Sophia."""
    sophiag = {
        "learning_rate": sophia,
        "beta1": (0.6, 0.8, 0.9, 0.96),
        "beta2": (0.9, 0.95, 0.99),
        "rho": doubled(0.0125, 0.2),
    }
    return {
        "adamw": {"learning_rate": adamw, "beta1": (0.8, 0.9, 0.95), "beta2": (0.95, 0.98, 0.995)},
        "muon": {"learning_rate": adamw, "beta1": (0.8, 0.9, 0.95, 0.98)},
        "lion": {"learning_rate": signs, "beta1": (0.6, 0.8, 0.9, 0.96), "beta2": (0.9, 0.95, 0.98, 0.99)},
        "signum": {"learning_rate": signs, "beta1": (0.6, 0.8, 0.9, 0.96)},
        "sophiag": sophiag,
        "sophiah": sophiag | {"rho": doubled(0.0025, 0.04)},
    }


SCALES = {
    "laptop": Scale(
        LAPTOP,
        optimizers(quarter=8, group=1),
        axes(doubled(2e-3, 6.4e-2), doubled(2.5e-4, 4e-3), doubled(2.5e-4, 8e-3)),
        LENGTHS,
        final={"eval_interval": 1000},
    ),
    "gpu": Scale(
        GPU,
        optimizers(quarter=8, group=4),
        axes(doubled(5e-4, 8e-3), doubled(1.25e-4, 1e-3), doubled(2.5e-4, 2e-3)),
        LENGTHS,
        budget=Budget(spread=6, least=12),
        seeds=(11, 12, 13),
    ),
    # two scales with runs too short for h to fill up; found by 24 and by 13 runs each on a lattice of factors of two
    "short": Scale(
        SHORT,
        {
            "adamw": {"optimizer": "adamw", "learning_rate": 8e-3, "beta1": 0.8, "beta2": 0.8},
            "lion": {"optimizer": "lion", "learning_rate": 2e-3, "beta1": 0.6, "beta2": 0.99},
            "sophiag_paper": {"optimizer": "sophiag", "hessian_estimator": "paper", "hessian_batch_size": 800,
                              "learning_rate": 0.016, "rho": 0.025, "beta1": 0.6},
            "sophiag": {"optimizer": "sophiag", "hessian_estimator": "averaged", "hessian_batch_size": 108,
                        "learning_rate": 2e-3, "rho": 0.1, "beta1": 0.6},
            "sophiah": {"optimizer": "sophiah", "hessian_batch_size": 108, "learning_rate": 2e-3, "rho": 0.04,
                        "beta1": 0.6},
        },
        {},
        TWICE,
        seeds=(1, 2, 3),
    ),
    "quickstart": Scale(
        QUICKSTART,
        {
            "adamw": {"optimizer": "adamw", "learning_rate": 8e-3, "beta1": 0.8, "beta2": 0.95},
            "sophiag": QUICKSTART_SOPHIA,
        },
        {},
        TWICE,
        seeds=(1337,),  # the default
    ),
}  # fmt: skip
