"""Stability: the largest learning rate that trains a deeper model, with and without inverse-layer scaling.

The runs have a quarter of the batch of `losses` and half of its steps. They begin with half of its best rate, which is
then doubled. A rate is stable when its run ends within TOLERANCE nats of the best of its ladder. The share of steps
with a clipped gradient is in the table of `losses`.
"""

from typing import Any

from matplotlib.figure import Figure

from records.curves import COLORS, MARKERS
from studies.losses import best_settings, tune
from studies.report import markdown_table
from studies.runs import Runner
from studies.scales import LABELS, Scale, with_batch

OPTIMIZERS = ("adamw", "lion", "sophiag", "sophiah")
LADDER = (0.5, 1, 2, 4, 8)
TOLERANCE = 0.3
DEEPER, SHORTER, SMALLER = 3, 2, 4  # times the layers, and fractions of the steps and of the batch


def study(runner: Runner, scale: Scale) -> dict[str, Any]:
    ladders = {
        (name, scaled): ladder(best_settings(scale, name, tune(runner, scale, name)), scaled)
        for name in OPTIMIZERS
        for scaled in (False, True)
    }
    results = iter(runner([settings for rungs in ladders.values() for settings in rungs]))
    rows = []
    for (name, scaled), rungs in ladders.items():
        found = {settings["learning_rate"]: next(results).loss for settings in rungs}
        lowest = min(found.values())
        stable = [rate for rate, loss in found.items() if loss <= lowest + TOLERANCE]
        largest = {"largest_stable": max(stable), "is_the_last_tried": max(stable) == max(found)}
        rows.append({"optimizer": name, "inverse_layer_scaling": scaled, "losses": list(found.items())} | largest)
    return {"runs": rows}


def ladder(best: dict[str, Any], scaled: bool) -> list[dict[str, Any]]:
    deeper = with_batch(best, best["batch_size"] // SMALLER) | {
        "n_layer": DEEPER * best["n_layer"],
        "max_iters": best["max_iters"] // SHORTER,
        "scale_attn_by_inverse_layer_idx": scaled,
    }
    return [deeper | {"learning_rate": float(f"{best['learning_rate'] * factor:.4g}")} for factor in LADDER]


def markdown(table: dict[str, Any]) -> str:
    rows = [
        [
            LABELS[row["optimizer"]],
            "yes" if row["inverse_layer_scaling"] else "no",
            ", ".join(f"{rate:.3g}: {loss:.3f}" for rate, loss in row["losses"]),
            f"{row['largest_stable']:.3g}" + (" or more" if row["is_the_last_tried"] else ""),
        ]
        for row in table["runs"]
    ]
    return markdown_table("optimizer | inverse-layer scaling | learning rate: final loss | largest stable", rows)


def figure(table: dict[str, Any]) -> Figure:
    drawing = Figure(figsize=(10, 5), layout="constrained")
    axes = drawing.subplots()
    top = max(min(loss for _, loss in row["losses"]) for row in table["runs"]) + 1.5
    for row in table["runs"]:
        number = OPTIMIZERS.index(row["optimizer"])
        rates, losses = zip(*row["losses"], strict=True)
        scaled = row["inverse_layer_scaling"]
        label = LABELS[row["optimizer"]] + (", inverse-layer scaling" if scaled else "")
        style = {"color": COLORS[number], "marker": MARKERS[number], "linestyle": "--" if scaled else "-"}
        axes.plot(rates, [min(loss, top) for loss in losses], label=label, **style)
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("final validation loss (nats per token)")
    axes.grid(alpha=0.3)
    drawing.legend(loc="outside right upper", fontsize=9)
    return drawing
