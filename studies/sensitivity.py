"""Sensitivity: the loss of both Sophias over ρ and β2, around the best settings of `losses`."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from studies.losses import best_settings, tune
from studies.report import markdown_table
from studies.runs import Runner
from studies.scales import LABELS, Scale

OPTIMIZERS = ("sophiag", "sophiah")
RHO_FACTORS = (0.25, 0.5, 1, 2, 4)
BETA2 = (0.9, 0.97, 0.99)
SHORTER = 2  # a fraction of the steps


def study(runner: Runner, scale: Scale) -> dict[str, Any]:
    rows = []
    for name in OPTIMIZERS:
        best = best_settings(scale, name, tune(runner, scale, name))
        shorter = best | {"max_iters": best["max_iters"] // SHORTER}
        rhos = [float(f"{best['rho'] * factor:.4g}") for factor in RHO_FACTORS]
        results = iter(runner([shorter | {"rho": rho, "beta2": beta2} for beta2 in BETA2 for rho in rhos]))
        rows.append({"optimizer": name, "rho": rhos, "beta2": BETA2,
                     "losses": [[next(results).loss for _ in rhos] for _ in BETA2]})  # fmt: skip
    return {"grids": rows}


def markdown(table: dict[str, Any]) -> str:
    rows = [
        [
            LABELS[grid["optimizer"]],
            beta2,
            *(f"{rho:.3g}: {loss:.3f}" for rho, loss in zip(grid["rho"], losses, strict=True)),
        ]
        for grid in table["grids"]
        for beta2, losses in zip(grid["beta2"], grid["losses"], strict=True)
    ]
    return markdown_table("optimizer | β2 | ρ: final loss" + " | " * (len(RHO_FACTORS) - 1), rows)


def figure(table: dict[str, Any]) -> Figure:
    drawing = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, grid in zip(drawing.subplots(1, len(OPTIMIZERS)), table["grids"], strict=True):
        losses = np.array(grid["losses"])
        finite = losses[np.isfinite(losses)]
        axes.imshow(losses, cmap="cividis_r", vmin=finite.min(), vmax=min(finite.max(), finite.min() + 1))
        for (row, column), loss in np.ndenumerate(losses):
            dark = math.isfinite(loss) and loss > finite.min() + 0.5 * (finite.max() - finite.min())
            axes.text(column, row, f"{loss:.3f}", ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(grid["rho"])), [f"{rho:.3g}" for rho in grid["rho"]])
        axes.set_yticks(range(len(grid["beta2"])), grid["beta2"])
        axes.set_xlabel("ρ")
        axes.set_ylabel("β2")
        axes.set_title(f"{LABELS[grid['optimizer']]}: final validation loss", fontsize=11)
    return drawing
