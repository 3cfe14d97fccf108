"""Parts: the tuned Sophia-G with one part changed at a time, and AdamW without norm clipping."""

import numpy as np
from matplotlib.figure import Figure

from studies.claims import Claim
from studies.groups import Groups, draw_band, losses, losses_of, mean_of, tuned
from studies.runs import Runner, run_groups
from studies.scales import Scale, doubled

RHO = (0.0, *doubled(0.0125, 0.8))
RANGE = 5  # values of rho, 16-fold from the first to the last
FLAT = 0.02  # nats per token between them
UNCLIPPED = (0.1, 0.5)  # the shares of coordinates that a flat range has to span, as the paper advises
USE = 0.01
SEEDS = 3
TUNED, NO_CLIPPING = "as tuned", "no norm clipping"


def groups(runner: Runner, scale: Scale) -> Groups:
    best, adamw = tuned(runner, scale, "sophiag"), tuned(runner, scale, "adamw")
    beta2, paper = best["beta2"], {"hessian_estimator": "paper", "hessian_batch_size": best["batch_size"] // 2}
    every = {f"an estimate every {n} steps": {"hessian_interval": n, "beta2": beta2 ** (n / 10)} for n in (1, 50)}
    changes = {TUNED: {}, **{rho_label(rho): {"rho": rho} for rho in RHO}, **every}
    changes |= {"the paper's estimator": paper, "bias-corrected h": {"hessian_bias_correction": True}}
    changes[NO_CLIPPING] = {"grad_clip": 0.0}
    wanted = {label: best | change for label, change in changes.items()}
    wanted |= {"AdamW": adamw, f"AdamW, {NO_CLIPPING}": adamw | {"grad_clip": 0.0}}
    return run_groups(runner, wanted, scale.seeds[:SEEDS])


def rho_label(rho: float) -> str:
    return f"ρ {rho:g}"


def flattest(groups: Groups) -> tuple[list[str], bool]:
    """The 16-fold range of rho that spans UNCLIPPED, or else any, with the flattest mean loss; and whether it does."""

    def spans(labels: list[str]) -> bool:
        shares = [mean_of(groups[label], "win_rate") for label in labels]
        return min(shares) <= UNCLIPPED[0] and max(shares) >= UNCLIPPED[1]

    labels = [rho_label(rho) for rho in RHO[1:]]
    ranges = [labels[first : first + RANGE] for first in range(len(labels) - RANGE + 1)]
    candidates = [labels for labels in ranges if spans(labels)] or ranges
    best = min(candidates, key=lambda labels: np.ptp(losses_of(groups, labels).mean(axis=0)))
    return best, spans(best)


def claims(groups: Groups) -> list[Claim]:
    def less(left: str, right: str) -> np.ndarray:
        return losses(groups[left]) - losses(groups[right])

    flat, spans = flattest(groups)
    means = losses_of(groups, flat).mean(axis=0)
    worst, best = flat[int(means.argmax())], flat[int(means.argmin())]
    over = f"the loss is flat from {flat[0]} to {flat[-1][2:]}: the worst less the best"
    every = "an estimate every step is of no use: every ten steps' loss less its"
    return [
        Claim("rho", over, less(worst, best), FLAT, FLAT, can_be_confirmed=spans),
        Claim("interval", every, less(TUNED, "an estimate every 1 steps"), USE, USE),
        Claim("estimator", "averaging beats the paper's estimator: its loss less the paper's",
              less(TUNED, "the paper's estimator")),
        Claim("bias correction", "bias correction of h helps: the loss with it less without",
              less("bias-corrected h", TUNED)),
        Claim("clipping Sophia-G", "clipping the norm helps Sophia-G: the loss with it less without",
              less(TUNED, NO_CLIPPING)),
        Claim("clipping AdamW", "clipping the norm helps AdamW: the loss with it less without",
              less("AdamW", f"AdamW, {NO_CLIPPING}")),
    ]  # fmt: skip


def figure(groups: Groups) -> Figure:
    drawing = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawing.subplots()
    labels = [rho_label(rho) for rho in RHO]
    draw_band(axes, 0, "final validation loss", range(len(RHO)), losses_of(groups, labels))
    axes.set_xticks(range(len(RHO)), [f"{rho:g}" for rho in RHO])
    axes.set(xlabel="ρ", ylabel="final validation loss (nats per token)")
    share = axes.twinx()
    share.plot(range(len(RHO)), [mean_of(groups[label], "win_rate") for label in labels], "k--", label="unclipped")
    share.set(ylabel="unclipped share of coordinates (dashed)", ylim=(0, 1))
    return drawing
