"""Tuning that is the same for every optimizer: the same number of runs on a lattice around a stated centre.

A hyperparameter's values are its centre times powers of two; for a decay beta they are those of 1 - beta. The first
runs are the centre and random points around it, the rest are neighbours of the best so far. So the lattice itself has
no edge. Where a value of the best is the lowest or the highest that was tried, one more run goes a step further. It
tells whether the search ended too early, and does not take part in it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from studies.runs import Result, Runner

RANGE = {"learning_rate": 2, "beta1": 1, "beta2": 1, "rho": 1}  # of the random points: powers of two either way
Point = tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """The hyperparameters that are tuned, with their centre."""

    centre: dict[str, float]

    def values(self, point: Point) -> dict[str, float]:
        pairs = zip(self.centre.items(), point, strict=True)
        return {name: float(f"{on_lattice(name, centre, power):.4g}") for (name, centre), power in pairs}

    def is_valid(self, point: Point) -> bool:
        values = self.values(point)
        return all(0 <= values[name] < 1 for name in values if name.startswith("beta"))

    def random_points(self, count: int) -> list[Point]:
        """The centre and count - 1 more, different from each other: the same powers for every space of as many axes."""
        points, draw = [(0,) * len(self.centre)], random.Random(0)
        while len(points) < count:
            point = tuple(draw.randint(-RANGE[name], RANGE[name]) for name in self.centre)
            if point not in points and self.is_valid(point):
                points.append(point)
        return points

    def neighbours(self, point: Point) -> Iterator[Point]:
        for axis in range(len(point)):
            for step in (-1, 1):
                near = (*point[:axis], point[axis] + step, *point[axis + 1 :])
                if self.is_valid(near):
                    yield near


def on_lattice(name: str, centre: float, power: int) -> float:
    return 1 - (1 - centre) * 2.0**power if name.startswith("beta") else centre * 2.0**power


@dataclass(frozen=True)
class Search:
    """What a search tried, in its order, and what lies a step past the edge of it."""

    space: Space
    tried: dict[Point, Result]
    past_the_edge: dict[Point, Result]

    @property
    def best(self) -> Point:
        return min(self.tried, key=lambda point: self.tried[point].loss)

    def neighbours_past_the_edge(self) -> list[Point]:
        """Those of the best that have a value outside of all that was tried."""
        spans = [(min(powers), max(powers)) for powers in zip(*self.tried, strict=True)]
        return [
            near
            for near in self.space.neighbours(self.best)
            if not all(low <= power <= high for power, (low, high) in zip(near, spans, strict=True))
        ]

    def table(self) -> dict[str, Any]:
        known = self.tried | self.past_the_edge
        untried = [self.space.values(near) for near in self.space.neighbours(self.best) if near not in known]
        return {
            "centre": self.space.centre,
            "runs": self._rows(self.tried),
            "best": self.space.values(self.best),
            "best_loss": self.tried[self.best].loss,
            "past_the_edge": self._rows(self.past_the_edge),
            "untried_neighbours_of_the_best": untried,
        }

    def _rows(self, results: dict[Point, Result]) -> list[dict[str, float]]:
        return [self.space.values(point) | {"loss": result.loss} for point, result in results.items()]


def search(runner: Runner, base: dict[str, Any], space: Space, first: int, count: int) -> Search:
    """`count` runs: `first` of them drawn, the others neighbours of the best; when it has none left, of the next. Then
    those past the edge.
    """

    def run(points: list[Point]) -> dict[Point, Result]:
        return dict(zip(points, runner([base | space.values(point) for point in points]), strict=True))

    tried = run(space.random_points(first))
    while wanted := next_points(space, tried)[: count - len(tried)]:
        tried |= run(wanted)
    found = Search(space, tried, {})
    return replace(found, past_the_edge=run(found.neighbours_past_the_edge()))


def next_points(space: Space, tried: dict[Point, Result]) -> list[Point]:
    for point in sorted(tried, key=lambda point: tried[point].loss):
        near = [near for near in space.neighbours(point) if near not in tried]
        if near:
            return near
    return []
