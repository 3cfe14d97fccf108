"""Why: the best Sophia-G of `losses` with one part changed at a time, and the others with Sophia's betas. One seed."""

from typing import Any

from matplotlib.figure import Figure

from studies.losses import best_settings, tune
from studies.report import markdown_table
from studies.runs import Runner
from studies.scales import Scale

NO_LIMIT = 100  # times larger steps allowed, of the same share of a Newton step


def study(runner: Runner, scale: Scale) -> dict[str, Any]:
    best = {name: best_settings(scale, name, tune(runner, scale, name)) for name in ("adamw", "lion", "sophiag")}
    variants = {
        label: best["sophiag"] | {"seed": scale.seeds[0]} | change for label, change in changes(best["sophiag"]).items()
    }
    for name, label in (("adamw", "AdamW"), ("lion", "Lion")):
        own = best[name] | {"seed": scale.seeds[0]}
        variants |= {f"{label}, as tuned": own, f"{label}, Sophia's betas": own | {"beta1": 0.96, "beta2": 0.99}}
    results = runner(list(variants.values()))
    return {
        "runs": {
            label: {"loss": result.loss, "unclipped_fraction": result.last.get("win_rate")}
            for label, result in zip(variants, results, strict=True)
        }
    }


def changes(best: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rate, rho = best["learning_rate"] * NO_LIMIT, best["rho"] * NO_LIMIT
    return (
        {
            "as tuned": {},
            "clipped at 100 x the step": {"learning_rate": rate, "rho": rho, "weight_decay": 0.2 / NO_LIMIT},
            "no curvature (sign of the momentum)": {"rho": 0.0},
            "bias-corrected h": {"hessian_bias_correction": True},
            "h from every sequence": {"hessian_batch_size": best["batch_size"]},
        }
        | {f"an estimate every {interval} steps": {"hessian_interval": interval} for interval in (1, 4, 50)}
        | {f"β1 {beta1}": {"beta1": beta1} for beta1 in (0.8, 0.9, 0.95, 0.97)}
    )


def markdown(table: dict[str, Any]) -> str:
    rows = []
    for label, run in table["runs"].items():
        share = run["unclipped_fraction"]
        rows.append([label, f"{run['loss']:.3f}", "" if share is None else f"{share:.2f}"])
    return markdown_table("variant | final loss | unclipped fraction at the end", rows)


def figure(table: dict[str, Any]) -> Figure:
    labels, losses = list(table["runs"]), [run["loss"] for run in table["runs"].values()]
    drawing = Figure(figsize=(8, 0.3 * len(labels) + 1.2), layout="constrained")
    axes = drawing.subplots()
    finite = [loss for loss in losses if loss < 20]
    for number, loss in enumerate(losses):
        shown = min(loss, max(finite))
        axes.plot(shown, number, "o", color="#0072B2" if loss in finite else "#D55E00")
        axes.annotate(f"{loss:.3f}", (shown, number), (8, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set_xlim(min(finite) - 0.2, max(finite) + 0.2)
    axes.set_xlabel("final validation loss (nats per token)")
    return drawing
