"""Groups of runs that differ in their seed alone: how they are run, told in a table, and drawn."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from plot import COLORS, MARKERS
from studies.runs import Result, Runner
from studies.scales import Scale, Settings
from studies.search import Tuned, search

Groups = dict[str, list[Result]]  # by their labels, the seeds in order


def tuned(runner: Runner, scale: Scale, optimizer: str) -> Settings:
    """The settings of an optimizer with the best that its search found."""
    settings = scale.settings(optimizer)
    return settings | tune(runner, scale, optimizer).settings if optimizer in scale.axes else settings


def tune(runner: Runner, scale: Scale, optimizer: str) -> Tuned:
    return search(runner, scale.settings(optimizer), scale.axes[optimizer], scale.budget)


def losses(group: Iterable[Result]) -> np.ndarray:
    """Final validation losses in nats per token, (seeds,)."""
    return np.array([result.loss for result in group])


def losses_of(groups: Groups, labels: Iterable[str]) -> np.ndarray:
    """Those of several groups, (seeds, groups)."""
    return np.array([losses(groups[label]) for label in labels]).T


def mean_of(group: list[Result], key: str) -> float:
    """The mean of a value of the last rows of metrics.jsonl; nan where a run has none."""
    return float(np.mean([result.last.get(key, np.nan) for result in group]))


def best_of(groups: Groups, labels: Iterable[str]) -> str:
    return min(labels, key=lambda label: losses(groups[label]).mean())


def table(groups: Groups) -> str:
    rows = []
    for label, group in groups.items():
        values, unclipped = losses(group), mean_of(group, "win_rate")
        rows.append([
            label, ", ".join(f"{loss:.4f}" for loss in values), f"{values.mean():.4f}",
            f"{values.std(ddof=1):.4f}" if len(values) > 1 else "",
            f"{mean_of(group, 'clip_rate'):.0%}", "" if np.isnan(unclipped) else f"{unclipped:.2f}",
        ])  # fmt: skip
    return markdown_table("runs | losses of the seeds | mean | sd | clipped steps | unclipped coordinates", rows)


def markdown_table(header: str, rows: Iterable[Sequence[Any]]) -> str:
    """`header` has the columns' names, with | between them."""
    columns = header.count("|") + 1
    lines = [header, " | ".join(["---"] * columns), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def draw_band(axes: Axes, number: int, label: str, x: Sequence[float], seeds: np.ndarray) -> None:
    """A line for the mean over `seeds` (seeds, points), and a band of a standard deviation either way."""
    mean, sd = seeds.mean(axis=0), seeds.std(axis=0, ddof=min(1, len(seeds) - 1))
    color = COLORS[number % len(COLORS)]
    axes.plot(x, mean, color=color, marker=MARKERS[number % len(MARKERS)], markersize=4, label=label)
    axes.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)
