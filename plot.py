"""Draw runs: thick lines with markers are the validation loss, thin ones the training loss.

    python plot.py out/adamw out/sophiag -o curves.png         or curves.svg, curves.pdf
    python plot.py out/adamw_* out/sophiag_* --x=tokens        over tokens instead of steps
    python plot.py --speedup out/adamw out/sophiag             how much sooner is the second at the first's loss?

Runs whose settings differ in nothing but the seed and names are one curve: their mean, in a band from the lowest to
the highest. Lines are straight from one evaluation to the next, and --speedup reads the losses off these lines.
"""

import json
import math
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from run import errors
from run.errors import UserError
from run.files import read_json
from run.options import Parser
from training import metrics

# Okabe and Ito's palette, without its yellow, for every kind of colour vision; markers tell curves apart in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX*"
STYLE = {"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.formatter.use_mathtext": True}
X_AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training", "flops": "FLOPs"}
PANELS = {"lr": "learning rate", "grad_norm": "gradient\nnorm", "clip_rate": "share of\nsteps clipped",
          "win_rate": "unclipped\nfraction"}  # fmt: skip
NAMES = ("seed", "out_dir", "wandb_run_name")  # settings in which the seeds of a configuration may differ


@dataclass(frozen=True)
class Curve:
    """One run, or the seeds of one configuration."""

    label: str
    runs: list[dict[int, dict[str, Any]]]  # the rows of each, by step

    def points(self, x: str, key: str) -> np.ndarray:
        """(4, N): x, the mean of `key`, its lowest and highest value, at the steps where every run has x and key.
        Where x differs between the runs, as seconds do, it is the mean.
        """
        steps = [s for s in self.runs[0] if all(x in rows.get(s, ()) and key in rows[s] for rows in self.runs)]
        xs, values = (np.array([[rows[s][name] for s in steps] for rows in self.runs], float) for name in (x, key))
        return np.stack((xs.mean(0), values.mean(0), values.min(0), values.max(0)))


def read_curves(runs: list[Path], x: str = "step") -> list[Curve]:
    """The curves of folders that train.py wrote; those whose settings differ in seed and names alone are one curve."""
    groups: dict[str, dict[Any, Path]] = {}
    for run in runs:
        path = run / "settings.json"
        try:
            settings = read_json(path) if path.exists() else {"unknown": str(run)}
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        key = json.dumps({name: value for name, value in settings.items() if name not in NAMES}, sort_keys=True)
        while settings.get("seed") in groups.setdefault(key, {}):  # the same run again is a curve of its own
            key += " again"
        groups[key][settings.get("seed")] = run
    names = [run.resolve().name for run in runs]
    labels = {run: name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)}
    curves = []
    for group in groups.values():
        label, count = os.path.commonprefix([labels[run] for run in group.values()]), len(group)
        label = label if count == 1 else f"{label.rstrip('_-./')} ({count} seeds)".lstrip()
        curves.append(Curve(label, [read_rows(run, x) for run in group.values()]))
    return curves


def read_rows(run: Path, x: str) -> dict[int, dict[str, Any]]:
    path = run / metrics.FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: name folders that train.py wrote")
    rows = {row["step"]: row for row in metrics.read_rows(path)}
    keys = {key for row in rows.values() for key in row}
    for key in ("val/loss", x):
        if key not in keys:
            found = f"no {key!r}, only {', '.join(sorted(keys))}" if keys else "no rows yet"
            raise UserError(f"{path} has {found}")
    return rows


@matplotlib.rc_context(STYLE)
def picture(curves: list[Curve], x: str = "step", panels: bool = False) -> Figure:
    """The losses over `x`, with `panels` whatever of PANELS the runs have below them."""
    keys = [key for key in PANELS if panels and any(curve.points(x, key).size for curve in curves)]
    figure, ratios = Figure(figsize=(8, 5 + 1.4 * len(keys)), layout="constrained"), [3.5] + [1] * len(keys)
    loss, *others = figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for number, curve in enumerate(curves):
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        loss.plot(*curve.points(x, "train/loss")[:2], color=style["color"], linewidth=0.8, alpha=0.6)
        draw(loss, curve, x, "val/loss", label=curve.label, linewidth=2, **style)
        for axes, key in zip(others, keys, strict=True):
            draw(axes, curve, x, key, linewidth=1.2, **style)
            axes.set_ylabel(PANELS[key])
            if key == "grad_norm":  # where a single step can be a hundred times as large
                axes.set_yscale("log")
    loss.plot([], [], color="gray", linewidth=0.8, label="training loss")
    loss.set_ylabel("loss (nats per token)")
    figure.axes[-1].set_xlabel(X_AXES[x])
    columns = max(1, 80 // (8 + max(len(curve.label) for curve in curves)))
    figure.legend(loc="outside upper center", ncols=columns, frameon=False)
    figure.align_ylabels()
    return figure


def draw(axes: Axes, curve: Curve, x: str, key: str, **style: Any) -> None:
    """The mean as a line, the range of several seeds as a band around it."""
    xs, mean, low, high = curve.points(x, key)
    axes.plot(xs, mean, markersize=5, markevery=0.1, **style)
    if len(curve.runs) > 1:
        axes.fill_between(xs, low, high, color=style["color"], alpha=0.2, linewidth=0)


def mark_speedup(axes: Axes, base: Curve, other: Curve, x: str) -> str:
    """Show in `axes` where `other` has the last validation loss of `base`, by lines between the evaluations.
    Returns it in a sentence, which ends with the ratio of the two x.
    """
    end, level = base.points(x, "val/loss")[:2, -1]
    goal = f"the final validation loss of {base.label}, {level:.4f}"
    reached = first_x_at(level, *other.points(x, "val/loss")[:2])
    if reached == 0:
        raise UserError(f"{other.label} starts at or below {goal}: there is no speedup to speak of")
    sentence = f"{other.label} never reaches {goal}"
    if reached is not None:
        spent = [in_words(value) for value in (reached, end)]
        ratio = f"speedup {end / reached:.3f}"
        sentence = f"{other.label} has {goal}, after {spent[0]} {X_AXES[x]}, {base.label} after {spent[1]}: {ratio}"
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "gray"}
        for place, text in zip((reached, end), spent, strict=True):
            axes.plot(place, level, marker="o", markersize=9, color="black", fillstyle="none", markeredgewidth=1.5)
            axes.annotate(text, (place, level), (0, 28), textcoords="offset points", ha="center", bbox=box,
                          arrowprops={"arrowstyle": "-"})  # fmt: skip
    axes.axhline(level, color="black", linestyle="--", linewidth=1.2)
    axes.set_title(textwrap.fill(sentence, 80), fontsize=11)
    return sentence


def in_words(x: float) -> str:
    return f"{x:.3g}" if x >= 1e7 else f"{x:,.{int(x < 1000)}f}".removesuffix(".0")


def first_x_at(level: float, xs: np.ndarray, losses: np.ndarray) -> float | None:
    """The first x at which the line through the points is down to `level`; None where it never is."""
    below = np.flatnonzero(losses <= level)
    if not len(below):
        return None
    pair = [below[0], max(below[0] - 1, 0)]
    return float(np.interp(level, losses[pair], xs[pair]))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"), help="picture to write")
    parser.add_argument("--x", choices=X_AXES, default="step", help="horizontal axis")
    parser.add_argument("--panels", action="store_true", help="learning rate, gradient norm and clipping below")
    parser.add_argument("--max-loss", type=float, metavar="LOSS", help="top of the loss axis")
    parser.add_argument("--speedup", action="store_true", help="when has the second curve the first's final loss?")
    options = parser.parse_args()

    curves = read_curves(options.runs, options.x)
    figure = picture(curves, options.x, options.panels)
    if options.max_loss is not None:
        lowest = figure.axes[0].dataLim.ymin
        if not lowest < options.max_loss < math.inf:
            raise UserError(f"--max-loss: {options.max_loss} is not above the lowest loss, {lowest:.4f}")
        figure.axes[0].set_ylim(lowest - 0.05 * (options.max_loss - lowest), options.max_loss)
    if options.speedup:
        if len(curves) != 2:
            raise UserError(f"--speedup takes two curves, these runs make {len(curves)} (seeds make one)")
        print(mark_speedup(figure.axes[0], *curves, options.x))
    try:
        figure.savefig(options.output, dpi=200)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {options.output}: {error}") from None
    print(options.output.resolve())


if __name__ == "__main__":
    errors.run(main)
