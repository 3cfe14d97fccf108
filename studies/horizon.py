"""Horizon: does the best beta1 of Sophia-G rise with the length of the run?"""

from matplotlib.figure import Figure

from studies.claims import Claim
from studies.groups import Groups, best_of, draw_band, losses, losses_of, table, tuned
from studies.runs import Runner, run_groups
from studies.scales import Scale

BETA1 = (0.6, 0.8, 0.9, 0.96)
LENGTHS = (1 / 8, 1 / 2, 2)  # times the steps of `losses`
RATE_FACTORS = (0.5, 1)  # times the best learning rate of `losses`, and times that rate scaled by 1 - beta1
SEEDS = 3


def groups(runner: Runner, scale: Scale) -> Groups:
    best = tuned(runner, scale, "sophiag")
    wanted = {}
    for length in LENGTHS:
        steps = round(length * best["max_iters"])
        for beta1 in BETA1:
            scales = (1, (1 - beta1) / (1 - best["beta1"]))
            rates = {round(scale * factor * best["learning_rate"], 9) for scale in scales for factor in RATE_FACTORS}
            for rate in sorted(rates):
                changed = {"max_iters": steps, "eval_interval": steps, "beta1": beta1, "learning_rate": rate}
                wanted[f"{steps} steps, β1 {beta1}, learning rate {rate:g}"] = best | changed
    return run_groups(runner, wanted, scale.seeds[:SEEDS])


def best_rates(groups: Groups) -> dict[tuple[int, float], str]:
    """By steps and beta1, the label of the group with the best learning rate."""
    labels: dict[tuple[int, float], list[str]] = {}
    for label, group in groups.items():
        labels.setdefault((group[0].settings["max_iters"], group[0].settings["beta1"]), []).append(label)
    return {key: best_of(groups, candidates) for key, candidates in labels.items()}


def markdown(groups: Groups) -> str:
    return table({label: groups[label] for label in best_rates(groups).values()})


def claims(groups: Groups) -> list[Claim]:
    best = {key: losses(groups[label]) for key, label in best_rates(groups).items()}
    steps = sorted({steps for steps, _ in best})
    shortest, longest = (best[at, 0.96] - best[at, 0.8] for at in (steps[0], steps[-1]))
    text = f"β1 0.96 gains on 0.8 with length: its loss less 0.8's at {steps[-1]} steps, less that at {steps[0]}"
    return [Claim("horizon", text, longest - shortest)]


def figure(groups: Groups) -> Figure:
    best = best_rates(groups)
    drawing = Figure(figsize=(10, 3.6), layout="constrained")
    lengths = sorted({steps for steps, _ in best})
    for axes, steps in zip(drawing.subplots(1, len(lengths)), lengths, strict=True):
        draw_band(axes, 0, "", BETA1, losses_of(groups, [best[steps, beta1] for beta1 in BETA1]))
        axes.set(title=f"{steps} steps", xlabel="β1", ylabel="final validation loss" if steps == lengths[0] else "")
    return drawing
