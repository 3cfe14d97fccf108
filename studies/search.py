"""Tuning, the same for every optimizer: runs spread over a grid, the neighbours of the best, then fresh seeds.

The first runs are spread by Sobol's sequence. Then come the untried neighbours of the best so far, a step along one
axis, or where it has none those of the next best, until there are enough runs and the best has none. An axis goes on
past its ends. The best of many is partly luck: the first three run again, and fresh seeds decide. The search goes on
while their choice has untried neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from studies.runs import Result, Runner, run_groups

FINALISTS = 3
Point = tuple[int, ...]  # the place of a value on each axis
Axes = dict[str, tuple[float, ...]]  # values in ascending order by the setting's name


@dataclass(frozen=True)
class Budget:
    """How many runs a search has, and its seeds: the first one's for the search, the others' for the finalists."""

    spread: int = 12
    least: int = 24
    seeds: tuple[int, ...] = (1, 2, 3)


@dataclass(frozen=True)
class Space:
    axes: Axes

    def settings(self, point: Point) -> dict[str, float]:
        places = zip(self.axes.items(), point, strict=True)
        return {name: value_at(name, values, place) for (name, values), place in places}

    def spread(self, count: int) -> list[Point]:
        """`count` different points of the grid, by Sobol's sequence."""
        sizes = torch.tensor([len(values) for values in self.axes.values()])
        draws = torch.quasirandom.SobolEngine(len(sizes)).fast_forward(1).draw(64 * count)  # the first is a corner
        points = [tuple(place) for place in (draws * sizes).long().tolist()]
        return list(dict.fromkeys(points))[:count]

    def neighbours(self, point: Point) -> Iterator[Point]:
        for axis, name in enumerate(self.axes):
            for step in (-1, 1):
                near = (*point[:axis], point[axis] + step, *point[axis + 1 :])
                if not name.startswith("beta") or 0 <= self.settings(near)[name] < 1:
                    yield near


def value_at(name: str, values: tuple[float, ...], place: int) -> float:
    """The value at a place of an axis. Past its ends a step doubles or halves the value; of a beta, 1 - beta."""
    inside = min(max(place, 0), len(values) - 1)
    factor = 2.0 ** (place - inside)
    value = 1 - (1 - values[inside]) / factor if name.startswith("beta") else values[inside] * factor
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Tuned:
    """What a search tried, in its order, and the finalists with their fresh seeds."""

    space: Space
    tried: dict[Point, Result]
    finalists: dict[Point, list[Result]]

    @property
    def best(self) -> Point:
        return min(self.finalists, key=lambda point: fmean(result.loss for result in self.finalists[point]))

    @property
    def settings(self) -> dict[str, float]:
        return self.space.settings(self.best)


def search(runner: Runner, base: dict[str, Any], axes: Axes, budget: Budget) -> Tuned:
    space = Space(axes)

    def run(points: list[Point], seeds: tuple[int, ...]) -> dict[Point, list[Result]]:
        return run_groups(runner, {point: base | space.settings(point) for point in points}, seeds)

    def run_once(points: list[Point]) -> dict[Point, Result]:
        return {point: result for point, (result,) in run(points, budget.seeds[:1]).items()}

    def ranking() -> list[Point]:
        return sorted(tried, key=lambda point: tried[point].loss)

    tried, finalists = run_once(space.spread(budget.spread)), {}
    while True:
        while wanted := untried_neighbours(space, ranking(), tried, enough=len(tried) >= budget.least):
            tried |= run_once(wanted)
        first = [point for point in ranking()[:FINALISTS] if point not in finalists]
        finalists |= run(first, budget.seeds[1:])
        tuned = Tuned(space, tried, finalists)
        if not (wanted := untried_neighbours(space, [tuned.best], tried, enough=True)):
            return tuned
        tried |= run_once(wanted)


def untried_neighbours(space: Space, ranking: list[Point], tried: dict, enough: bool) -> list[Point]:
    """Those of the best; unless there are `enough` runs, those of the first that has any."""
    for point in ranking[:1] if enough else ranking:
        if near := [near for near in space.neighbours(point) if near not in tried]:
            return near
    return []
