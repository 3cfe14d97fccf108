"""Losses: each optimizer tuned with as many runs, then three seeds of twice the steps at its best; AdamW also with
twice as many again.
"""

import math
from functools import partial
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from records.curves import COLORS, MARKERS, first_x_at
from studies.report import given, markdown_table
from studies.runs import Result, Runner, together
from studies.scales import LABELS, Scale
from studies.search import Search, search

LONGER = 2  # times the steps of the runs that tune
NAMES = LABELS | {"adamw_twice": "AdamW, twice the steps"}


def study(runner: Runner, scale: Scale) -> dict[str, Any]:
    names = list(scale.optimizers)
    searches = dict(zip(names, together([partial(tune, runner, scale, name) for name in names]), strict=True))
    steps = LONGER * scale.base["max_iters"]
    finals = {name: best_settings(scale, name, searches[name]) | {"max_iters": steps} for name in names}
    finals["adamw_twice"] = finals["adamw"] | {"max_iters": 2 * steps}
    results = iter(runner([final | {"seed": seed} for final in finals.values() for seed in scale.seeds]))
    groups = {name: [next(results) for _ in scale.seeds] for name in finals}
    goal = fmean(result.loss for result in groups["adamw"])
    return {
        "fingerprints": {name: group[0].fingerprints for name, group in groups.items()},
        "search": {name: found.table() for name, found in searches.items()},
        "final": {name: summary(group, goal) for name, group in groups.items()},
    }


def tune(runner: Runner, scale: Scale, optimizer: str) -> Search:
    return search(runner, scale.settings(optimizer), scale.space(optimizer), scale.first, scale.tuning)


def best_settings(scale: Scale, optimizer: str, found: Search) -> dict[str, Any]:
    return scale.settings(optimizer) | found.space.values(found.best)


def summary(group: list[Result], goal: float) -> dict[str, Any]:
    """Of runs that differ in their seed: losses, the steps to the loss `goal`, time, clipping, and the mean curve."""
    losses = [result.loss for result in group]
    alive = [result for result in group if math.isfinite(result.loss)]
    steps = [first_x_at(goal, *np.array(result.curve).T) for result in alive]
    last = [result.last for result in alive]
    curves = np.array([result.curve for result in alive])
    return {
        "losses": losses,
        "mean": fmean(losses),
        "sd": stdev(losses) if len(alive) == len(losses) > 1 else None,
        "diverged": len(losses) - len(alive),
        "steps_to_adamws_loss": steps,
        "seconds": [row["seconds"] for row in last],
        "clip_rate": fmean([row["clip_rate"] for row in last] or [math.nan]),
        "unclipped_fraction": [row["win_rate"] for row in last if "win_rate" in row],
        "curve": curves.mean(axis=0).round(4).tolist() if alive else [],
    }


def markdown(table: dict[str, Any]) -> str:
    tuned = [
        [
            LABELS[name],
            len(found["runs"]),
            given(found["best"]),
            f"{found['best_loss']:.3f}",
            past_the_edge(found) or "no edge",
            len(found["untried_neighbours_of_the_best"]),
            sum(not math.isfinite(run["loss"]) for run in found["runs"]),
        ]
        for name, found in table["search"].items()
    ]
    finals = [
        [
            NAMES[name],
            ", ".join(f"{loss:.3f}" for loss in found["losses"]),
            f"{found['mean']:.3f}",
            "" if found["sd"] is None else f"{found['sd']:.3f}",
            ", ".join("never" if steps is None else f"{steps:.0f}" for steps in found["steps_to_adamws_loss"]),
            f"{fmean(found['seconds'] or [math.nan]):.0f}",
            f"{found['clip_rate']:.0%}",
            ", ".join(f"{share:.2f}" for share in found["unclipped_fraction"]),
            found["diverged"],
        ]
        for name, found in table["final"].items()
    ]
    hashes = [[LABELS[name], *found.values()] for name, found in table["fingerprints"].items() if name in LABELS]
    return "\n\n".join(
        (
            markdown_table(
                "tuning | runs | best | its loss | a step past the edge | neighbours not tried | diverged", tuned
            ),
            markdown_table(
                "final runs | losses of the seeds | mean | sd | steps to AdamW's mean | seconds | "
                "clipped steps | unclipped fraction | diverged",
                finals,
            ),
            markdown_table("first seed's hash of | batches | initial weights | validation blocks", hashes),
        )
    )


def past_the_edge(found: dict[str, Any]) -> str:
    best = found["best"]
    steps = [(name, run) for run in found["past_the_edge"] for name in best if run[name] != best[name]]
    return ", ".join(f"{name} {run[name]:g}: {run['loss']:.3f}" for name, run in steps)


def figure(table: dict[str, Any]) -> Figure:
    drawing = Figure(figsize=(8, 5), layout="constrained")
    axes = drawing.subplots()
    for number, (name, found) in enumerate(table["final"].items()):
        if not found["curve"]:
            continue
        steps, losses = zip(*found["curve"][1:], strict=True)
        axes.plot(steps, losses, color=COLORS[number], marker=MARKERS[number], markevery=0.1, label=NAMES[name])
    ends = [found["mean"] for found in table["final"].values() if math.isfinite(found["mean"])]
    axes.set_ylim(min(ends) - 0.05, max(ends) + 0.8)
    axes.set_xlabel("steps")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return drawing
