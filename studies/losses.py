"""Losses: every optimizer tuned alike, then fresh seeds at its best; some also for shorter and longer schedules."""

from functools import partial

import numpy as np
from matplotlib.figure import Figure

from plot import COLORS
from studies.claims import Claim
from studies.groups import Groups, best_of, draw_band, losses, markdown_table, table, tune, tuned
from studies.runs import Runner, run_groups, together
from studies.scales import LABELS, Scale, Settings
from studies.search import Tuned

RATE_FACTORS = (0.5, 1, 2)  # tried again for a longer schedule


def searches(runner: Runner, scale: Scale) -> dict[str, Tuned]:
    found = together([partial(tune, runner, scale, name) for name in scale.axes])
    return dict(zip(scale.axes, found, strict=True))


def groups(runner: Runner, scale: Scale) -> Groups:
    searches(runner, scale)  # all at once, to keep every job busy
    best = {name: tuned(runner, scale, name) for name in scale.optimizers}
    wanted = {LABELS[name]: settings for name, settings in best.items()}
    for factor, names in scale.lengths.items():
        for name in names:
            wanted[label(name, factor)] = with_length(runner, scale, best[name], factor)
    return run_groups(runner, {name: settings | scale.final for name, settings in wanted.items()}, scale.seeds)


def label(optimizer: str, factor: float) -> str:
    """The label of runs with so many times the steps of the scale."""
    return LABELS[optimizer] + ("" if factor == 1 else f", {factor:g} N")


def with_length(runner: Runner, scale: Scale, best: Settings, factor: float) -> Settings:
    """The settings with so many times the steps; with more of them at the best of some learning rates."""
    changed = best | {"max_iters": round(factor * best["max_iters"])}
    if factor < 2 or not scale.axes:
        return changed
    rates = {f"{rate:g}": changed | {"learning_rate": rate * best["learning_rate"]} for rate in RATE_FACTORS}
    tried = run_groups(runner, rates, scale.budget.seeds[:1])
    return rates[best_of(tried, rates)]


def claims(groups: Groups) -> list[Claim]:
    final = {name: losses(group) for name, group in groups.items()}
    adamw, twice = final["AdamW"], final["AdamW, 2 N"]
    tolerance = (adamw - twice).mean() / 10
    found = []
    for name in ("Sophia-G", "Sophia-H"):
        text = f"{name} needs half of AdamW's steps: its loss at N less AdamW's at 2 N"
        found.append(Claim(f"half {name}", text, final[name] - twice, confirmed_below=tolerance))
        text = f"{name} ends below AdamW: its loss less AdamW's, both at "
        found.append(Claim(f"better {name}", f"{text}N", final[name] - adamw))
        found.append(Claim(f"better {name} 2", f"{text}2 N", final[f"{name}, 2 N"] - twice))
    text = "Muon ends below AdamW: its loss less AdamW's, both at N"
    return [*found, Claim("better Muon", text, final["Muon"] - adamw)]


def markdown(groups: Groups) -> str:
    return f"{table(groups)}\n\n{speedups(groups)}"


def adamw_over_steps(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of AdamW's schedules in steps, ascending, and the losses at their ends, (seeds, schedules)."""
    ends = {group[0].settings["max_iters"]: name for name, group in groups.items() if name.startswith("AdamW")}
    return np.array(sorted(ends)), np.array([losses(groups[ends[steps]]) for steps in sorted(ends)]).T


def speedups(groups: Groups) -> str:
    """AdamW's steps to each optimizer's loss over that one's, by lines between the ends of AdamW's schedules."""
    steps, ends = adamw_over_steps(groups)
    lengths, rows = steps / groups["AdamW"][0].settings["max_iters"], []
    for name in others(groups):
        pairs = zip(losses(groups[name]), ends, strict=True)
        ratios = [np.interp(-loss, -adamw, lengths, left=0, right=np.inf) for loss, adamw in pairs]
        rows.append([name, ", ".join(in_words(ratio, lengths) for ratio in ratios)])
    return markdown_table("effective speed-up over AdamW | of each seed", rows)


def others(groups: Groups) -> list[str]:
    """The optimizers beside AdamW, after as many steps."""
    own = groups["AdamW"][0].settings["max_iters"]
    return [name for name, group in groups.items() if name != "AdamW" and group[0].settings["max_iters"] == own]


def in_words(ratio: float, known: np.ndarray) -> str:
    if ratio == 0:
        return f"below {known[0]:.2f}"
    return f"{ratio:.2f}" if np.isfinite(ratio) else f"above {known[-1]:.2f}"


def search_table(found: dict[str, Tuned]) -> str:
    rows = []
    for name, search in found.items():
        best, fresh = search.settings, losses(search.finalists[search.best])
        places = zip(search.best, search.space.axes.values(), strict=True)
        inside = all(0 <= place < len(axis) for place, axis in places)
        others = [f"{losses(runs).mean():.4f}" for point, runs in search.finalists.items() if point != search.best]
        rows.append([
            LABELS[name], len(search.tried), sum(not np.isfinite(run.loss) for run in search.tried.values()),
            ", ".join(f"{setting} {value:g}" for setting, value in best.items()),
            "in the first grid" if inside else "past its edge",
            f"{search.tried[search.best].loss:.4f}", f"{fresh.mean():.4f}", ", ".join(others),
        ])  # fmt: skip
    header = "tuning | runs | diverged | best | where | its loss | fresh seeds | the other finalists"
    return markdown_table(header, rows)


def figure(groups: Groups) -> Figure:
    """Losses over steps; and AdamW's at the ends of its schedules, off which the others' effective speed-up is read."""
    drawing = Figure(figsize=(13, 5), layout="constrained")
    over_steps, speedup = panels = drawing.subplots(1, 2, subplot_kw={"xlabel": "steps"})
    optimizers = ["AdamW", *others(groups)]
    for name in (*optimizers, *(name for name in groups if name.endswith(", 2 N"))):
        curves = np.array([result.curve[1:] for result in groups[name]])  # (seeds, points, 2)
        draw_band(over_steps, optimizers.index(name.removesuffix(", 2 N")), name, curves[0, :, 0], curves[:, :, 1])
    ends = [losses(group).mean() for group in groups.values()]
    over_steps.set(ylim=(min(ends) - 0.03, max(ends) + 0.4), ylabel="validation loss (nats per token)")
    draw_band(speedup, 0, "AdamW, at the ends of its schedules", *adamw_over_steps(groups))
    for number, name in enumerate(optimizers[1:], start=1):
        speedup.axhline(losses(groups[name]).mean(), color=COLORS[number], linestyle="--", label=name)
    for axes in panels:
        axes.legend()
    return drawing
