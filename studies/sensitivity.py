"""Sensitivity: the loss of both Sophias over ρ and β2, around the best settings of `losses`."""

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
SHADES = 0.2  # nats above the lowest loss that the picture tells apart


def study(runner: Runner, scale: Scale) -> dict[str, Any]:
    rows = []
    for name in OPTIMIZERS:
        best = best_settings(scale, name, tune(runner, scale, name))
        shorter = best | {"max_iters": best["max_iters"] // SHORTER}
        rhos = [float(f"{best['rho'] * factor:.4g}") for factor in RHO_FACTORS]
        results = iter(runner([shorter | {"rho": rho, "beta2": beta2} for beta2 in BETA2 for rho in rhos]))
        losses = [[next(results).loss for _ in rhos] for _ in BETA2]
        lowest, highest = (extreme(map(extreme, losses)) for extreme in (min, max))
        rows.append({"optimizer": name, "rho": rhos, "beta2": BETA2, "losses": losses,
                     "lowest": lowest, "highest": highest})  # fmt: skip
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
        lowest = grid["lowest"]
        axes.imshow(grid["losses"], cmap="cividis_r", vmin=lowest, vmax=lowest + SHADES)
        for (row, column), loss in np.ndenumerate(grid["losses"]):
            color = "white" if loss > lowest + SHADES / 2 else "black"
            axes.text(column, row, f"{loss:.3f}", ha="center", va="center", color=color)
        axes.set_xticks(range(len(grid["rho"])), [f"{rho:.3g}" for rho in grid["rho"]])
        axes.set_yticks(range(len(grid["beta2"])), grid["beta2"])
        axes.set_xlabel("ρ")
        axes.set_ylabel("β2")
        axes.set_title(f"{LABELS[grid['optimizer']]}: final validation loss", fontsize=11)
    return drawing
