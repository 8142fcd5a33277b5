"""What a recipe's levels and problems cost on a machine, and which levels are therefore worth it.

Reading, decoding, computing and writing overlap, so each step takes as long as its longest part
(:meth:`pipeline.machine.Machine.seconds`). Arithmetic only: no torch, no data, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline import views
from pipeline.choice import Choice, Node, choose, otherwise
from pipeline.machine import Machine
from pipeline.recipe import Recipe
from pipeline.tiers import CACHE_SHARE, MEMORY_SHARE
from stages.spec import Shape
from store.layout import geometry
from store.order import batch_count

PROFILES = ("raw", "lz4", "zstd")
RISK_ROWS = 10_000
"""Training samples on which ``keep = "best"`` compares iterates."""
SCALE_ROWS = 4096
"""Most training rows that scales are chosen on."""
MOST_PROBLEMS = 64
"""How far a crossover is looked for."""


def operations(recipe: Recipe, j: int) -> int:
    """Multiply-adds of a forward pass of problem j for one crop."""
    inputs = recipe.shape(j - 1, recipe.augment.crop)
    layer = recipe.layers[j - 1]
    return layer.operations(inputs) + recipe.auxiliaries[j - 1].operations(layer.output(inputs))


def kind(recipe: Recipe, j: int) -> str:
    """What decides about the rate of layer j and its auxiliary classifier, whatever the recipe."""
    layer, auxiliary = recipe.layers[j - 1], recipe.auxiliaries[j - 1]
    channels, height, width = layer.output(recipe.shape(j - 1, recipe.augment.crop))
    how = ", max pooled" * (layer.pool == "max")
    c = f"k {auxiliary.k} of {auxiliary.width}" + " at half of it" * auxiliary.half_resolution
    if auxiliary.hidden:
        c = f"hidden {' '.join(map(str, auxiliary.hidden))}"
    return f"{layer.convolved_channels} to {channels} at {height}x{width}{how}, {c}"


@dataclass(frozen=True)
class RecipeCosts:
    """The costs of :mod:`pipeline.choice`, of a recipe on a machine."""

    recipe: Recipe
    machine: Machine
    train: int
    """Images of the training set."""
    test: int
    problems: int = 1
    """Solved at every depth, one after another."""

    @property
    def layers(self) -> int:
        return len(self.recipe.layers)

    def forms(self, depth: int) -> Sequence[str]:
        """The recipe's; fresh draws cannot be cached at all."""
        return () if views.mode(self.recipe) == "fresh" else (self.recipe.cache.profile,)

    def stored_as(self, profile: str) -> RecipeCosts:
        """The same recipe with another profile."""
        cache = replace(self.recipe.cache, profile=profile)
        return replace(self, recipe=replace(self.recipe, cache=cache))

    def nbytes(self, node: Node) -> int:
        """Of all levels of x_depth, on disk."""
        return math.ceil(
            self._level_rows(node) * self._row_bytes(node) / self.machine.ratio(node.form)
        )

    def write(self, base: Node, node: Node) -> float:
        rows, nbytes = self._level_rows(node), self._row_bytes(node)
        machine = self.machine
        host = self._row_bytes(base) / machine.decode(base.form)
        return rows * machine.seconds(
            compute=self._forward(base.depth, node.depth),
            host=host + nbytes / machine.encode(node.form),
            disk=nbytes / self.machine.ratio(node.form) / machine.disk_write,
            copy=(self._row_bytes(base) + nbytes) / machine.copy,
        )

    def solve(self, base: Node, j: int) -> float:
        schedule, machine = self.recipe.schedule, self.machine
        below, step = self._forward(base.depth, j - 1), operations(self.recipe, j)
        rates = machine.rates(kind(self.recipe, j))
        batch = schedule.batch
        rows = batch * batch_count(self.train, batch, drop_last=True) or self.train
        trained = rows * schedule.epochs
        one = trained * self._seconds(base, below + 3 * step / rates.train)
        looked_at = self._looked_at()
        return self.problems * (one + looked_at * self._seconds(base, below + step / rates.forward))

    def _looked_at(self) -> int:
        """Rows that are read without training on them: test images after epochs and at the end, the
        risk that picks the best iterate, and those that scales are chosen on."""
        schedule, precision = self.recipe.schedule, self.recipe.cache.precision
        every = schedule.test_every
        tests = self.test * (1 + (schedule.epochs // every if every else 0))
        risks = min(RISK_ROWS, self.train) * (schedule.epochs + 1) * (schedule.keep == "best")
        scales = min(SCALE_ROWS, self.train) * precision.startswith("uint")
        return tests + risks + scales

    def _seconds(self, base: Node, compute: float) -> float:
        """Of one row that is read from ``base``."""
        machine, nbytes = self.machine, self._row_bytes(base)
        reads = 1 / self.recipe.schedule.epochs if self._stays(base) else 1.0
        once = nbytes / machine.decode(base.form)
        return machine.seconds(
            compute=compute,
            host=reads * once + (1 - reads) * nbytes / machine.gather,
            disk=reads * nbytes / machine.ratio(base.form) / machine.disk_read,
            copy=nbytes / machine.copy,
        )

    def _stays(self, base: Node) -> bool:
        """Is it held in memory, unpacked, after the first epoch? The bounds are those of tiers."""
        share = CACHE_SHARE if base.form == "raw" else MEMORY_SHARE
        count = len(views.train_views(self.recipe)) if base.depth else 1
        return count * self.train * self._row_bytes(base) <= share * self.machine.memory

    def _forward(self, base: int, depth: int) -> float:
        """Seconds of layers base + 1 … depth for one cached row."""
        return sum(
            self.recipe.layers[j - 1].operations(self._shape(j - 1))
            / self.machine.rates(kind(self.recipe, j)).forward
            for j in range(base + 1, depth + 1)
        )

    def _shape(self, depth: int) -> Shape:
        return self.recipe.shape(depth, views.cached_size(self.recipe))

    def _row_bytes(self, node: Node) -> int:
        if node.depth == 0:
            size = self.recipe.data.size
            return self.recipe.data.channels * size * size
        precision = self.recipe.cache.precision
        return geometry(1, self._shape(node.depth), precision, 1 << 26).row_bytes

    def _level_rows(self, node: Node) -> int:
        count = len(views.train_views(self.recipe)) if node.depth else 1
        return count * self.train + self.test


@dataclass(frozen=True)
class Depth:
    """What is decided about one depth."""

    depth: int
    form: str | None
    """How x_depth is cached; None: it is computed again each time."""
    nbytes: int
    """On disk, if it is cached; else 0."""
    otherwise: float
    """Seconds of the cheapest run that decides differently here."""
    from_problems: int | None
    """The fewest problems per depth with which it is worth caching; None: more than was tried."""

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "otherwise": _finite(self.otherwise)}


@dataclass(frozen=True)
class Economics:
    """A recipe on a machine: what to cache, and what that saves. Times are in seconds."""

    machine: str
    source: str
    problems: int
    best: float
    always: float
    """Every depth cached, each in its cheapest form."""
    never: float
    profiles: dict[str, float]
    """The best, were all levels stored in this profile: the values would be the same."""
    depths: tuple[Depth, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "source": self.source,
            "problems": self.problems,
            "seconds": {
                "best": _finite(self.best),
                "always": _finite(self.always),
                "never": _finite(self.never),
            },
            "profiles": {name: _finite(value) for name, value in self.profiles.items()},
            "depths": [depth.as_json() for depth in self.depths],
        }


def _finite(seconds: float) -> float | None:
    """JSON has no infinity: None is what cannot be had."""
    return seconds if seconds < math.inf else None


def economics(costs: RecipeCosts, disk: float = math.inf) -> Economics:
    """The cheapest way, and what each decision of it is worth.

    Args:
        disk: bytes that the run may take.
    """
    best, between = choose(costs, disk=disk), range(1, costs.layers)
    every, fewest = frozenset(between), _crossovers(costs, disk)
    depths = tuple(
        _depth(costs, best, depth, disk, fewest.get(depth))
        for depth in (between if best.seconds < math.inf else ())
    )
    return Economics(
        costs.machine.name,
        costs.machine.source,
        costs.problems,
        best.seconds,
        choose(costs, disk=disk, must=every).seconds,
        choose(costs, disk=disk, never=every).seconds,
        {name: choose(costs.stored_as(name), disk=disk).seconds for name in PROFILES},
        depths,
    )


def _depth(costs: RecipeCosts, best: Choice, depth: int, disk: float, fewest: int | None) -> Depth:
    form = best.form(depth)
    nbytes = costs.nbytes(Node(depth, form)) if form else 0
    other = otherwise(costs, best, depth, disk=disk).seconds
    return Depth(depth, form, nbytes, other, fewest)


def _crossovers(costs: RecipeCosts, disk: float) -> dict[int, int]:
    """For each depth the fewest problems with which it is cached."""
    found: dict[int, int] = {}
    problems = 1
    while problems <= MOST_PROBLEMS and len(found) < costs.layers - 1:
        for node in choose(replace(costs, problems=problems), disk=disk).chain:
            found.setdefault(node.depth, problems)
        problems += 1
    return found
