"""Batch and size: does Sophia-G do better against AdamW with a larger batch, or with a larger model?

Both are tuned at the scale's own batch and size, and only the learning rate is tried again elsewhere.
"""

from dataclasses import dataclass

from matplotlib.figure import Figure

from studies.claims import Claim
from studies.groups import Groups, best_of, draw_band, losses, losses_of, tuned
from studies.runs import Runner, run_groups
from studies.scales import LABELS, Scale, Settings

OPTIMIZERS = ("adamw", "sophiag")
SEEDS = 3


@dataclass(frozen=True)
class Elsewhere:
    """A study of this kind: what is larger there, the settings for it, and the learning rates over the best."""

    name: str
    change: Settings
    rates: tuple[float, ...]

    def groups(self, runner: Runner, scale: Scale) -> Groups:
        wanted = {}
        for name in OPTIMIZERS:
            best = tuned(runner, scale, name)
            wanted[LABELS[name]] = best
            for factor in self.rates:
                rate = factor * best["learning_rate"]
                change = {name: value for name, value in self.change.items() if name in best}
                wanted[f"{LABELS[name]}, larger {self.name}, {rate:g}"] = best | change | {"learning_rate": rate}
        return run_groups(runner, wanted, scale.seeds[:SEEDS])

    def claims(self, groups: Groups) -> list[Claim]:
        here = losses(groups["Sophia-G"]) - losses(groups["AdamW"])
        sophia, adamw = (losses(groups[best_of(groups, labels(groups, name))]) for name in ("Sophia-G", "AdamW"))
        text = f"Sophia-G gains on AdamW with a larger {self.name}: its loss less AdamW's there, less that here"
        return [Claim(self.name, text, (sophia - adamw) - here)]

    def figure(self, groups: Groups) -> Figure:
        drawing = Figure(figsize=(7, 4), layout="constrained")
        axes = drawing.subplots()
        for number, name in enumerate(("AdamW", "Sophia-G")):
            rates = [groups[label][0].settings["learning_rate"] for label in labels(groups, name)]
            draw_band(axes, number, name, rates, losses_of(groups, labels(groups, name)))
        axes.set(xscale="log", xlabel="peak learning rate", ylabel="final validation loss (nats per token)")
        axes.legend()
        return drawing


def labels(groups: Groups, optimizer: str) -> list[str]:
    return [label for label in groups if label.startswith(f"{optimizer}, larger")]


BATCH = Elsewhere("batch", {"batch_size": 128, "hessian_batch_size": 32}, rates=(1, 2, 4))
SIZE = Elsewhere("size", {"n_layer": 3, "n_head": 3, "n_embd": 96}, rates=(0.25, 0.5, 1, 2))
