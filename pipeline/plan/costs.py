"""What a recipe's levels and problems cost on a machine: seconds and bytes.

Reading, decoding, computing and writing overlap, so each step takes as long as its longest part
(``machine.Machine.seconds``). Arithmetic only: no torch, no data, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate

from strata.pipeline.errors import BudgetError
from strata.pipeline.plan import tiers
from strata.pipeline.plan.choose import CachedDepth
from strata.pipeline.plan.machine import Machine, RowRate
from strata.pipeline.recipe import augmentation as views
from strata.pipeline.recipe.recipe import ProblemSpec, Recipe
from strata.store.level.layout import Geometry, geometry
from strata.store.read.order import batch_count

PROFILES = ("raw", "lz4", "zstd")
RISK_ROWS = 10_000
"""Training samples on which ``keep = "best"`` compares iterates."""
SCALE_ROWS = 4096
"""Most training rows that scales are chosen on."""
SCORE_ROWS = 8192
"""Most training rows that filters are judged on before some are removed."""


def operations(recipe: Recipe, j: int) -> int:
    """Multiply-adds of a forward pass of problem j, as it is solved, for one crop."""
    return _operations(recipe, recipe.problems[j - 1])


def _operations(recipe: Recipe, problem: ProblemSpec) -> int:
    """Multiply-adds of a forward pass of a problem for one crop."""
    layer, auxiliary = problem
    inputs = recipe.shape(layer.index - 1, recipe.augment.crop)
    return layer.operations(inputs) + auxiliary.operations(layer.output(inputs))


def passes(recipe: Recipe, j: int) -> tuple[int, float]:
    """How often problem j goes through the training set, and how many of its first epochs that is
    worth in multiply-adds: fine-tuning after filters were removed takes fewer."""
    epochs, whole = recipe.schedule.epochs, operations(recipe, j)
    if not recipe.compress:
        return epochs, float(epochs)
    left = [_operations(recipe, problem) / whole for problem in recipe.fine_tuned(j)]
    tuned = recipe.compress.epochs
    return epochs + tuned * len(left), epochs + tuned * sum(left)


def kind(recipe: Recipe, j: int) -> str:
    """What decides about the rate of layer j and its auxiliary classifier, whatever the recipe."""
    layer, auxiliary = recipe.problems[j - 1]
    channels, height, width = layer.output(recipe.shape(j - 1, recipe.augment.crop))
    c = f"k {auxiliary.k} of {auxiliary.width}" + " at half of it" * auxiliary.half_resolution
    if auxiliary.hidden:
        c = f"hidden {' '.join(map(str, auxiliary.hidden))}"
    return f"{layer.convolved_channels} to {channels} at {height}x{width}{layer.remark}, {c}"


def level_geometry(recipe: Recipe, depth: int, rows: int, profile: str = "raw") -> Geometry:
    """Shape and shards of a level of x_depth with ``rows`` rows."""
    shard_bytes, data = recipe.cache.shard_mb << 20, recipe.data
    if depth == 0:
        return geometry(rows, (data.channels, data.size, data.size), "uint8", shard_bytes)
    shape = recipe.shape(depth, views.cached_size(recipe))
    return geometry(rows, shape, recipe.cache.precision, shard_bytes, profile)


@dataclass(frozen=True)
class Feeding:
    """How often an epoch does each thing with a row that it reads, on average over the epochs."""

    decoded: float
    gathered: float
    read: float
    """From the disk."""
    copied: float
    """To the device."""


@dataclass(frozen=True)
class RecipeCosts:
    """The costs of a recipe on a machine, from which ``choose.cheapest_chain`` chooses."""

    recipe: Recipe
    machine: Machine
    """The machine, with only the memory, and memory of its device, that rows may take."""
    train: int
    """Images of the training set."""
    test: int
    problems: int = 1
    """Solved at every depth, one after another."""
    loader: str = "native"
    """``native`` or ``ffcv``."""
    tier: str = "auto"
    """Where rows are held while a problem reads them, if that was asked for."""

    @property
    def layers(self) -> int:
        return len(self.recipe.layers)

    def forms(self, depth: int) -> Sequence[str]:
        """How x_depth may be stored: as the recipe says, or with ``auto`` in every way that can be
        read; not at all where draws are fresh."""
        profile = self.recipe.cache.profile
        if views.mode(self.recipe) == "fresh":
            return ()
        every = ("raw",) if self._by_ffcv else PROFILES
        return every if profile == "auto" else (profile,)

    def stored_as(self, profile: str) -> RecipeCosts:
        """The costs of the same recipe with another profile."""
        cache = replace(self.recipe.cache, profile=profile)
        return replace(self, recipe=replace(self.recipe, cache=cache))

    def nbytes(self, node: CachedDepth) -> int:
        """Bytes on disk of all levels of x_depth."""
        unpacked = sum(self._levels(node)) * self._row_bytes[node.depth]
        return math.ceil(unpacked / self._rate(node).ratio)

    # ---- writing --------------------------------------------------------------------------------

    def write(self, base: CachedDepth, node: CachedDepth) -> float:
        """Seconds of computing all levels of a depth from a level below, and storing them."""
        return sum(self.write_level(base, node, rows) for rows in self._levels(node))

    def write_level(self, base: CachedDepth, node: CachedDepth, rows: int) -> float:
        """Seconds of one level of ``rows`` rows. The last shard is published when nothing is left
        to compute: of a level of one shard, nothing overlaps."""
        machine, sizes = self.machine, self._row_bytes
        below, above, shards = sizes[base.depth], sizes[node.depth], self._shards(node.depth, rows)
        read = 0.0 if self._in_page_cache(base) else below / self._rate(base).ratio
        host = below / self._decode(base) + above / self._rate(node).encode
        computing = rows * machine.seconds(
            compute=self._forward(base.depth, node.depth),
            host=host,
            disk=read / machine.disk_read,
            copy=(below + above) / machine.copy,
        )
        nbytes = rows * above / self._rate(node).ratio
        publishing = nbytes / machine.disk_write + shards * machine.publish_shard
        last = min(computing, publishing) / shards
        return max(computing, publishing) + last + machine.publish_level

    # ---- solving --------------------------------------------------------------------------------

    def solve(self, base: CachedDepth, j: int) -> float:
        """Seconds of all problems at layer j, each computing x_{j-1} from ``base``."""
        below, (step, look) = self._forward(base.depth, j - 1), self._problems[j - 1]
        epochs, worth = passes(self.recipe, j)
        training = self.epoch(base, below + step * worth / epochs) * epochs
        looking = self._rows_evaluated(j) * self._seconds(base, below + look)
        return self.problems * (training + looking)

    @cached_property
    def _problems(self) -> list[tuple[float, float]]:
        """Seconds of one row of every problem, in training and in evaluation."""
        rates = [self.machine.rates(kind(self.recipe, j)) for j in range(1, self.layers + 1)]
        work = [operations(self.recipe, j) for j in range(1, self.layers + 1)]
        return [(3 * n / r.train, n / r.forward) for n, r in zip(work, rates, strict=True)]

    def epoch(self, base: CachedDepth, compute: float) -> float:
        """Seconds of an epoch of one problem.

        Args:
            compute: seconds for one row, beyond reading it from ``base``.
        """
        batch = self.recipe.schedule.batch
        rows = batch * batch_count(self.train, batch, drop_last=True) or self.train
        return rows * self._seconds(base, compute)

    def reading(self, base: CachedDepth) -> float:
        """Seconds of an epoch that does nothing but read."""
        return self.epoch(base, 0.0)

    def recomputing(self, base: CachedDepth, depth: int) -> float:
        """Seconds of an epoch that does nothing but compute x_depth from a level below."""
        return self.epoch(base, self._forward(base.depth, depth))

    def _rows_evaluated(self, j: int) -> int:
        """Rows that are read without training on them: test images after epochs and at the end, the
        risk that picks the best iterate, and those that scales are chosen on, or filters."""
        schedule, precision = self.recipe.schedule, self.recipe.cache.precision
        every, removals = schedule.test_every, len(self.recipe.fine_tuned(j))
        epochs, _ = passes(self.recipe, j)
        tests = self.test * (1 + (epochs // every if every else 0) + 2 * removals)
        risks = min(RISK_ROWS, self.train) * (epochs + 1 + removals) * (schedule.keep == "best")
        scales = min(SCALE_ROWS, self.train) * precision.startswith("uint")
        return tests + risks + scales + removals * min(SCORE_ROWS, self.train)

    def _seconds(self, base: CachedDepth, compute: float) -> float:
        """Seconds of one row that is read from ``base`` and computed on for ``compute`` seconds;
        infinite where the tier asked for has no room."""
        try:
            how = self._feeding(base)
        except BudgetError:
            return math.inf
        machine, nbytes = self.machine, self._row_bytes[base.depth]
        decoded, gathered = how.decoded / self._decode(base), how.gathered / machine.gather
        return machine.seconds(
            compute=compute,
            host=nbytes * (decoded + gathered),
            disk=nbytes * how.read / self._rate(base).ratio / machine.disk_read,
            copy=nbytes * how.copied / machine.copy,
        )

    # ---- where rows lie -------------------------------------------------------------------------

    def tier_of(self, node: CachedDepth) -> tiers.TierChoice:
        """Where the rows are while a problem reads them, as ``tiers.choose_tier`` chooses.

        Raises:
            BudgetError: the tier that was asked for has no room.
        """
        machine = self.machine
        return tiers.choose_tier(
            self.tier,
            f"x_{node.depth}",
            self._unpacked(node),
            packed=node.form != "raw",
            device_free=0 if self._by_ffcv else int(machine.device_memory or 0),
            memory_free=int(machine.memory),
        )

    def _feeding(self, base: CachedDepth) -> Feeding:
        """What is held is filled once with all views, if it is unpacked or copied; of raw rows in
        the page cache only those are touched that are read. Every epoch over packed chunks decodes
        all views, since it wants some rows of each."""
        views, epochs, packed = self._views(base), self.recipe.schedule.epochs, base.form != "raw"
        off_disk = 0.0 if self._in_page_cache(base) else 1.0
        if self._is_jpeg(base):
            return Feeding(1.0, 0.0, 0.0, 1.0)
        tier, once = self.tier_of(base).tier, views / epochs
        if tier == "device":
            return Feeding(once, 0.0, once * off_disk, once)
        if packed and tier == "memory":
            return Feeding(once, max(0.0, 1 - once), 0.0, 1.0)
        if packed:
            return Feeding(views, 0.0, views * off_disk, 1.0)
        once = min(1.0, once)
        return Feeding(once, 1 - once, off_disk, 1.0)

    def _in_page_cache(self, node: CachedDepth) -> bool:
        """Do the files of x_depth stay in the page cache once they are written?"""
        files = self._unpacked(node) / self._rate(node).ratio
        return files <= tiers.CACHE_SHARE * self.machine.memory

    def _is_jpeg(self, node: CachedDepth) -> bool:
        """Is this x_0, decoded from JPEG whenever it is read?"""
        return node.depth == 0 and self.recipe.data.jpeg > 0

    @property
    def _by_ffcv(self) -> bool:
        """ffcv reads raw levels only, in place."""
        return self.loader == "ffcv" or self.recipe.data.jpeg > 0

    # ---- rows -----------------------------------------------------------------------------------

    def _rate(self, node: CachedDepth) -> RowRate:
        return self._rates[node.depth > 0, node.form]

    @cached_property
    def _rates(self) -> dict[tuple[bool, str], RowRate]:
        precision, rate = self.recipe.cache.precision, self.machine.row_rate
        features = {(True, profile): rate(profile, precision) for profile in PROFILES}
        return {(False, "raw"): rate("raw", "uint8"), **features}

    def _decode(self, node: CachedDepth) -> float:
        return self.machine.jpeg if self._is_jpeg(node) else self._rate(node).decode

    def _forward(self, base: int, depth: int) -> float:
        """Seconds of layers base + 1 … depth for one cached row."""
        return self._forwards[depth] - self._forwards[base]

    @cached_property
    def _forwards(self) -> list[float]:
        """Seconds of layers 1 … depth for one cached row, by depth."""
        side = views.cached_size(self.recipe)
        seconds = (
            layer.operations(self.recipe.shape(j - 1, side))
            / self.machine.rates(kind(self.recipe, j)).forward
            for j, layer in enumerate(self.recipe.layers, start=1)
        )
        return list(accumulate(seconds, initial=0.0))

    @cached_property
    def _row_bytes(self) -> list[int]:
        """Bytes of one row before packing, by depth."""
        depths = range(self.layers + 1)
        return [level_geometry(self.recipe, depth, 1).row_bytes for depth in depths]

    @cached_property
    def _shards(self) -> Callable[[int, int], int]:
        """Shards of a level, by its depth and number of rows; the same in every profile."""

        def shards(depth: int, rows: int) -> int:
            return level_geometry(self.recipe, depth, rows).shards

        return cache(shards)

    def _unpacked(self, node: CachedDepth) -> int:
        """Bytes of the training rows that a problem reads, all views."""
        return self._views(node) * self.train * self._row_bytes[node.depth]

    def _views(self, node: CachedDepth) -> int:
        return len(self._cached_views) if node.depth else 1

    @cached_property
    def _cached_views(self) -> tuple[str, ...]:
        return views.train_views(self.recipe)

    def _levels(self, node: CachedDepth) -> list[int]:
        """Rows of every level of x_depth."""
        return [*[self.train] * self._views(node), self.test]
