"""Scaling: four sizes, the learning rate tuned at each with as many runs; a power law through each optimizer's best."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from records.curves import COLORS, MARKERS
from studies.losses import best_settings, tune
from studies.report import markdown_table
from studies.runs import Runner
from studies.scales import LABELS, Scale

OPTIMIZERS = ("adamw", "lion", "sophiag")
SIZES = ((0.5, 0.5), (1, 0.75), (1, 1), (1.5, 1.5))  # times layers and channels of the scale's model
RATES = (0.5, 1, 2)  # times the rate that is best at size 1 over the channels' factor
SHORTER = 2  # a fraction of the steps


def study(runner: Runner, scale: Scale) -> dict[str, Any]:
    sets = {
        (name, size): candidates(best_settings(scale, name, tune(runner, scale, name)), size)
        for name in OPTIMIZERS
        for size in SIZES
    }
    results = iter(runner([settings for rates in sets.values() for settings in rates]))
    rows = []
    for (name, _), rates in sets.items():
        runs = [next(results) for _ in rates]
        found = {run.settings["learning_rate"]: run.loss for run in runs}
        best = min(found, key=found.get)
        inside = best not in (min(found), max(found))
        rows.append(
            {
                "optimizer": name,
                "parameters": runs[0].parameters,
                "losses": list(found.items()),
                "learning_rate": best,
                "loss": found[best],
                "inside": inside,
            }
        )
    return {"runs": rows, "fits": {name: fit([row for row in rows if row["optimizer"] == name]) for name in OPTIMIZERS}}


def candidates(best: dict[str, Any], size: tuple[float, float]) -> list[dict[str, Any]]:
    layers, channels = size
    sized = best | {
        "n_layer": round(best["n_layer"] * layers),
        "n_embd": round(best["n_embd"] * channels),
        "max_iters": best["max_iters"] // SHORTER,
    }
    return [sized | {"learning_rate": float(f"{best['learning_rate'] * rate / channels:.4g}")} for rate in RATES]


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """log(loss) = intercept + slope * log(parameters), by least squares, with the slope's standard error."""
    sizes, losses = ([np.log(row[key]) for row in rows] for key in ("parameters", "loss"))
    (slope, intercept), covariance = np.polyfit(sizes, losses, 1, cov=True)
    return {"slope": slope, "slope_stderr": math.sqrt(covariance[0, 0]), "intercept": intercept}


def markdown(table: dict[str, Any]) -> str:
    rows = [
        [
            LABELS[row["optimizer"]],
            f"{row['parameters']:,}",
            ", ".join(f"{rate:.3g}: {loss:.3f}" for rate, loss in row["losses"]),
            f"{row['loss']:.3f}",
            "inside" if row["inside"] else "on the edge",
        ]
        for row in table["runs"]
    ]
    fits = [[LABELS[name], f"{fit['slope']:.3f} ± {fit['slope_stderr']:.3f}"] for name, fit in table["fits"].items()]
    return "\n\n".join(
        (
            markdown_table("optimizer | parameters | learning rate: final loss | best | the best rate", rows),
            markdown_table("loss ∝ parameters^slope | slope ± standard error", fits),
        )
    )


def figure(table: dict[str, Any]) -> Figure:
    drawing = Figure(figsize=(8, 5), layout="constrained")
    axes = drawing.subplots()
    for number, name in enumerate(OPTIMIZERS):
        points = [(row["parameters"], row["loss"]) for row in table["runs"] if row["optimizer"] == name]
        sizes, losses = np.array(points).T
        line, color = table["fits"][name], COLORS[number]
        label = f"{LABELS[name]}: slope {line['slope']:.3f} ± {line['slope_stderr']:.3f}"
        axes.plot(sizes, losses, linestyle="none", color=color, marker=MARKERS[number], label=label)
        axes.plot(sizes, np.exp(line["intercept"]) * sizes ** line["slope"], color=color, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.set_xlabel("parameters")
    axes.set_ylabel("final validation loss (nats per token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return drawing
