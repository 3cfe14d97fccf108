"""How large a study is: its model, batch and length, and where its searches begin."""

import math
from dataclasses import dataclass
from typing import Any

from run.settings import ROOT, read_config
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


SHAPE = "dataset n_layer n_head n_embd block_size batch_size micro_batch_size eval_sequences compile".split()
QUICKSTART: Settings = {name: read_config(ROOT / "config" / "quickstart.py")[name] for name in SHAPE} | {
    "max_iters": 500, "warmup_iters": 50, "eval_interval": 50, "device": "cpu", "dtype": "float32",
}  # fmt: skip
LAPTOP: Settings = {
    "dataset": "books",
    "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 1600, "micro_batch_size": 100,
    "max_iters": 120, "warmup_iters": 24, "eval_interval": 10, "eval_sequences": 1024, "device": "cpu",
    "dtype": "float32", "compile": False,
}  # fmt: skip
GPU: Settings = {
    "dataset": "openwebtext",
    "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 1024, "batch_size": 120, "micro_batch_size": 40,
    "max_iters": 500, "warmup_iters": 100, "eval_interval": 50, "eval_sequences": 512, "device": "cuda",
    "dtype": "bfloat16",
}  # fmt: skip
PAPER: Settings = {
    "dataset": "openwebtext",
    "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 480, "micro_batch_size": 12,
    "max_iters": 50_000, "warmup_iters": 2000, "eval_interval": 1000, "device": "cuda", "dtype": "bfloat16",
}  # fmt: skip


def with_batch(settings: Settings, batch_size: int) -> Settings:
    """The same on another batch, as large a part of which is for curvature, in groups of four sequences."""
    changed = {"batch_size": batch_size, "micro_batch_size": math.gcd(batch_size, settings["micro_batch_size"])}
    if "hessian_batch_size" in settings:
        part = settings["hessian_batch_size"] / settings["batch_size"]
        changed["hessian_batch_size"] = max(4, 4 * round(part * batch_size / 4))
    return settings | changed


def optimizers(batch_size: int) -> dict[str, Settings]:
    """What makes an optimizer; curvature is estimated on as large a part of a batch as in the paper."""
    half, fifteenth = {"hessian_batch_size": batch_size // 2}, {"hessian_batch_size": 4 * round(batch_size / 60)}
    return {
        "adamw": {"optimizer": "adamw"},
        "lion": {"optimizer": "lion"},
        "sophiag_paper": {"optimizer": "sophiag", "hessian_estimator": "paper"} | half,
        "sophiag": {"optimizer": "sophiag", "hessian_estimator": "averaged"} | fifteenth,
        "sophiah": {"optimizer": "sophiah"} | fifteenth,
    }


def centres(adamw: float, lion: float, sophia: dict[str, float]) -> dict[str, dict[str, float]]:
    """Where the searches begin: at these learning rates, and otherwise at the optimizers' defaults."""
    return {
        "adamw": {"learning_rate": adamw, "beta1": 0.9, "beta2": 0.95},
        "lion": {"learning_rate": lion, "beta1": 0.95, "beta2": 0.98},
        "sophiag_paper": sophia,
        "sophiag": sophia,
        "sophiah": sophia | {"rho": sophia["rho"] / 5},
    }


SCALES = {
    # Sophia begins at a lower beta1, and may begin at a higher rho, than the paper's where runs are too short for h to
    # fill up
    "quickstart": Scale(
        QUICKSTART,
        {
            "adamw": {"optimizer": "adamw"},
            "sophiag": {"optimizer": "sophiag", "hessian_estimator": "averaged", "hessian_batch_size": 16},
        },
        centres(adamw=4e-3, lion=1e-3, sophia={"learning_rate": 1e-3, "rho": 0.05, "beta1": 0.8}),
        first=2,
        tuning=8,
        seeds=(1,),
    ),
    "laptop": Scale(
        LAPTOP,
        optimizers(LAPTOP["batch_size"]),
        centres(adamw=4e-3, lion=1e-3, sophia={"learning_rate": 4e-3, "rho": 0.2, "beta1": 0.8}),
        first=6,
        tuning=24,
        seeds=(1, 2, 3),
    ),
    "gpu": Scale(
        GPU,
        optimizers(GPU["batch_size"]),
        centres(adamw=1.2e-3, lion=4e-4, sophia={"learning_rate": 1e-3, "rho": 0.1, "beta1": 0.9}),
        first=4,
        tuning=8,
        seeds=(1, 2, 3),
    ),
    "paper": Scale(
        PAPER,
        optimizers(PAPER["batch_size"]),
        centres(adamw=6e-4, lion=1e-4, sophia={"learning_rate": 6e-4, "rho": 0.05, "beta1": 0.96}),
        first=4,
        tuning=8,
        seeds=(1, 2, 3),
    ),
}
