"""Batch: the best settings of `losses` at other batches, for the same tokens and for the same number of steps.

The learning rate is tried as it was found and scaled with the square root of the batch.
"""

import math
from typing import Any

from matplotlib.figure import Figure

from records.curves import COLORS, MARKERS
from studies.losses import best_settings, tune
from studies.report import markdown_table
from studies.runs import Runner
from studies.scales import LABELS, Scale, with_batch

OPTIMIZERS = ("adamw", "lion", "sophiag")
FACTORS = (1 / 16, 1 / 4, 1, 4)  # of the batch
KINDS = {"equal_tokens": "the same tokens", "equal_steps": "the same steps"}


def study(runner: Runner, scale: Scale) -> dict[str, Any]:
    tuned = {name: best_settings(scale, name, tune(runner, scale, name)) for name in OPTIMIZERS}
    sets = {
        (name, kind, factor): candidates(best | {"seed": scale.seeds[0]}, kind, factor)
        for name, best in tuned.items()
        for kind in KINDS
        for factor in FACTORS
    }
    results = iter(runner([settings for candidates in sets.values() for settings in candidates]))
    rows = []
    for (name, kind, _), candidates_ in sets.items():
        found = [next(results) for _ in candidates_]
        best = min(found, key=lambda result: result.loss)
        settings = best.settings
        rows.append(
            {
                "optimizer": name,
                "kind": kind,
                "tokens_a_step": settings["batch_size"] * settings["block_size"],
                "steps": settings["max_iters"],
                "loss": best.loss,
                "learning_rate": settings["learning_rate"],
                "tried": {f"{result.settings['learning_rate']:.3g}": result.loss for result in found},
            }
        )
    return {"runs": rows}


def candidates(best: dict[str, Any], kind: str, factor: float) -> list[dict[str, Any]]:
    """The settings of a batch `factor` times as large, with either learning rate."""
    steps = round(best["max_iters"] / (factor if kind == "equal_tokens" else max(FACTORS)))
    changed = with_batch(best, round(best["batch_size"] * factor)) | {
        "max_iters": steps,
        "warmup_iters": round(steps * best["warmup_iters"] / best["max_iters"]),
        "eval_interval": max(10, steps // 24),
    }
    rate = best["learning_rate"]
    rates = {float(f"{rate * scaled:.4g}") for scaled in (1, math.sqrt(factor))}
    return [changed | {"learning_rate": rate} for rate in sorted(rates)]


def markdown(table: dict[str, Any]) -> str:
    rows = [
        [
            LABELS[row["optimizer"]],
            KINDS[row["kind"]],
            f"{row['tokens_a_step']:,}",
            row["steps"],
            ", ".join(f"{rate}: {loss:.3f}" for rate, loss in row["tried"].items()),
            f"{row['loss']:.3f}",
        ]
        for row in table["runs"]
    ]
    return markdown_table("optimizer | for | tokens a step | steps | learning rate: loss | best", rows)


def figure(table: dict[str, Any]) -> Figure:
    drawing = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, (kind, title) in zip(drawing.subplots(1, 2), KINDS.items(), strict=True):
        for number, name in enumerate(OPTIMIZERS):
            runs = [row for row in table["runs"] if (row["optimizer"], row["kind"]) == (name, kind)]
            points = [(row["tokens_a_step"], row["loss"]) for row in runs]
            axes.plot(*zip(*points, strict=True), color=COLORS[number], marker=MARKERS[number], label=LABELS[name])
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens a step")
        axes.set_title(title)
        axes.set_ylabel("final validation loss (nats per token)")
        axes.grid(alpha=0.3)
    axes.legend()
    return drawing
