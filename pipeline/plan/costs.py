"""What a recipe's levels and problems cost on a machine: seconds and bytes.

Reading, decoding, computing and writing overlap, so each step takes as long as its longest part
(``machine.Machine.seconds``). Arithmetic only: no torch, no data, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

from strata.pipeline.errors import BudgetError
from strata.pipeline.plan import memory
from strata.pipeline.plan.choose import X0, CachedDepth, Costs
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
Fed = tuple[float, float, float, float]
"""How often a row is decoded, gathered, read from its file, and copied to the device."""
ONCE: Fed = (1.0, 0.0, 1.0, 1.0)


def operations(recipe: Recipe, problem: ProblemSpec) -> int:
    """Multiply-adds of a forward pass of a problem for one crop."""
    layer, auxiliary = problem
    inputs = recipe.shape(layer.index - 1, recipe.augment.crop)
    return layer.operations(inputs) + auxiliary.operations(layer.output(inputs))


def passes(recipe: Recipe, j: int) -> tuple[int, float]:
    """How often problem j goes through the training set, and how many of its first epochs that is
    worth in multiply-adds: fine-tuning after filters were removed takes fewer."""
    epochs = recipe.schedule.epochs
    if not recipe.compress:
        return epochs, float(epochs)
    whole = operations(recipe, recipe.problems[j - 1])
    left = [operations(recipe, problem) / whole for problem in recipe.fine_tuned(j)]
    tuned = recipe.compress.epochs
    return epochs + tuned * len(left), epochs + tuned * sum(left)


def kind(recipe: Recipe, j: int) -> str:
    """What decides about the rate of layer j and its auxiliary classifier, whatever the recipe."""
    layer, auxiliary = recipe.problems[j - 1]
    output = layer.output(recipe.shape(j - 1, recipe.augment.crop))
    places = "x".join(map(str, output[:-1] if layer.features_last else output[1:]))
    c = f"k {auxiliary.k} of {auxiliary.width}" + " at half of it" * auxiliary.half_resolution
    if auxiliary.hidden:
        c = f"hidden {' '.join(map(str, auxiliary.hidden))}"
    if auxiliary.ahead:
        c += f" above layers {' '.join(str(one.index) for one in auxiliary.ahead)}"
    c += f" in {auxiliary.patches} parts a side" * (auxiliary.patches > 1)
    c += " and similarity" * (auxiliary.similarity > 0) + " and context" * (auxiliary.context > 0)
    return f"{layer.convolved_channels} to {layer.width} at {places}{layer.remark}, {c}"


def level_geometry(recipe: Recipe, depth: int, rows: int, profile: str = "raw") -> Geometry:
    """Shape and shards of a level of x_depth with ``rows`` rows."""
    shard_bytes, data = recipe.cache.shard_mb << 20, recipe.data
    if depth == 0:
        return geometry(rows, data.sample(data.size), data.dtype, shard_bytes)
    shape = recipe.shape(depth, views.cached_size(recipe))
    last = recipe.layers[depth - 1].features_last
    return geometry(rows, shape, recipe.cache.precision, shard_bytes, profile, features_last=last)


@dataclass(frozen=True)
class RecipeCosts:
    """The costs of a recipe on a machine."""

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

    @cached_property
    def table(self) -> Costs:
        """Everything that can be done, in seconds and bytes, to choose from."""
        layers, forms = len(self.recipe.layers), self.forms
        nodes = [X0, *(CachedDepth(depth, form) for depth in range(1, layers) for form in forms)]
        writes = [(base, node) for base in nodes for node in nodes if base.depth < node.depth]
        solves = [(base, j) for base in nodes for j in range(base.depth + 1, layers + 1)]
        return Costs(
            layers,
            {node: self.nbytes(node) for node in nodes},
            {(base, node): self.write(base, node) for base, node in writes},
            {(base, j): self.solve(base, j) for base, j in solves},
            self.problems,
        )

    @property
    def forms(self) -> tuple[str, ...]:
        """How features may be stored: as the recipe says, or with ``auto`` in every way that can be
        read; not at all where draws are fresh."""
        profile = self.recipe.cache.profile
        if views.mode(self.recipe) == "fresh":
            return ()
        every = ("raw",) if self._by_ffcv else PROFILES
        return every if profile == "auto" else (profile,)

    def nbytes(self, node: CachedDepth) -> int:
        """Bytes on disk of all levels of x_depth."""
        rows = self._views(node) * self.train + self.test
        return math.ceil(rows * self._row_bytes(node) / self._rate(node).ratio)

    def write(self, base: CachedDepth, node: CachedDepth) -> float:
        """Seconds of computing all levels of a depth from a level below, and storing them."""
        rows = [*[self.train] * self._views(node), self.test]
        return sum(self.write_level(base, node, n) for n in rows)

    def write_level(self, base: CachedDepth, node: CachedDepth, rows: int) -> float:
        """Seconds of one level of ``rows`` rows. The last shard is published when nothing is left
        to compute: of a level of one shard, nothing overlaps."""
        machine, rate, shards = self.machine, self._rate(node), self._level(node.depth, rows).shards
        above, (host, disk, copy) = self._row_bytes(node), self._reading(base)
        compute, host = self.forward(base.depth, node.depth), host + above / rate.encode
        copy += above / machine.copy
        computing = rows * machine.seconds(compute=compute, host=host, disk=disk, copy=copy)
        nbytes = rows * above / rate.ratio
        publishing = nbytes / machine.disk_write + shards * machine.publish_shard
        last = min(computing, publishing) / shards
        return max(computing, publishing) + last + machine.publish_level

    def solve(self, base: CachedDepth, j: int) -> float:
        """Seconds of one problem at layer j that computes x_{j-1} from ``base``; of a layer that
        is given, or frozen along with one below, none."""
        return self.problem(base, j) if self.recipe.has_problem(j) else 0.0

    def problem(self, base: CachedDepth, j: int, *, swept: bool = False) -> float:
        """Seconds of problem j, as of :meth:`solve`; where all layers are given, also of J + 1, a
        classifier of x_J. ``swept``: its risk is found at the end, as that of a variant is."""
        epochs, step, look, rows = self._problems[j - 1]
        rows += min(RISK_ROWS, self.train) * swept
        below = self.forward(base.depth, j - 1) + self._beside(base, j)
        looking = rows * self._row(base, below + look)
        return self.epoch(base, below + step) * epochs + looking

    def _beside(self, base: CachedDepth, j: int) -> float:
        """Seconds of a row of the earlier features that problem j sees beside x_{j-1}: read as they
        are cached, or computed from the images where x_{j-1} is."""
        if (depth := self.recipe.context_of(j)) is None:
            return 0.0
        node = CachedDepth(depth, base.form) if base.depth >= depth > 0 else X0
        return self._row(node, self.forward(node.depth, depth))

    def step(self, j: int) -> float:
        """Seconds of training on one row in problem j, on average."""
        return self._problems[j - 1][1]

    def epoch(self, base: CachedDepth, compute: float = 0.0) -> float:
        """Seconds of an epoch of one problem.

        Args:
            compute: seconds for one row, beyond reading it from ``base``.
        """
        batch = self.recipe.schedule.batch
        rows = batch * batch_count(self.train, batch, drop_last=True) or self.train
        return rows * self._row(base, compute)

    def forward(self, base: int, depth: int) -> float:
        """Seconds of layers base + 1 … depth for one cached row."""
        return self._forwards[depth] - self._forwards[base]

    def tier_of(self, node: CachedDepth) -> memory.TierChoice:
        """Where the rows are while a problem reads them, as ``memory.choose_tier`` chooses.

        Raises:
            BudgetError: the tier that was asked for has no room.
        """
        machine = self.machine
        return memory.choose_tier(
            self.tier,
            f"x_{node.depth}",
            self._unpacked(node),
            packed=node.form != "raw",
            device_free=0 if self._by_ffcv else int(machine.device_memory or 0),
            memory_free=int(machine.memory),
        )

    # ---- problems -------------------------------------------------------------------------------

    @cached_property
    def _problems(self) -> list[tuple[int, float, float, int]]:
        """Epochs of every problem, seconds of a row in them on average, and in evaluation, and rows
        that are evaluated; where all layers are given, also of a classifier of x_J."""
        found: list[tuple[int, float, float, int]] = []
        for j, problem in enumerate(self.recipe.problems, start=1):
            work, rates = operations(self.recipe, problem), self.machine.rates(kind(self.recipe, j))
            epochs, worth = passes(self.recipe, j)
            step, rows = 3 * work / rates.train * worth / epochs, self._rows_evaluated(j, epochs)
            found.append((epochs, step, work / rates.forward, rows))
        if self.recipe.given == (j := len(self.recipe.layers)):  # a classifier of x_J
            inputs = self.recipe.shape(j, self.recipe.augment.crop)
            work = self.recipe.auxiliaries[-1].operations(inputs)
            rates, epochs = self.machine.rates(kind(self.recipe, j)), self.recipe.schedule.epochs
            rows = self._rows_evaluated(j, epochs)
            found.append((epochs, 3 * work / rates.train, work / rates.forward, rows))
        return found

    def _rows_evaluated(self, j: int, epochs: int) -> int:
        """Rows that are read without training on them: test images after epochs and at the end, the
        risk that picks the best iterate, and those that scales are chosen on, or filters."""
        schedule, precision = self.recipe.schedule, self.recipe.cache.precision
        every, removals = schedule.test_every, len(self.recipe.fine_tuned(j))
        tests = self.test * (1 + (epochs // every if every else 0) + 2 * removals)
        risks = min(RISK_ROWS, self.train) * (epochs + 1 + removals) * (schedule.keep == "best")
        scales = min(SCALE_ROWS, self.train) * precision.startswith("uint")
        return tests + risks + scales + removals * min(SCORE_ROWS, self.train)

    @cached_property
    def _forwards(self) -> list[float]:
        """Seconds of layers 1 … depth for one cached row, by depth."""
        recipe, side, seconds = self.recipe, views.cached_size(self.recipe), [0.0]
        for j, layer in enumerate(recipe.layers, start=1):
            work, rates = layer.operations(recipe.shape(j - 1, side)), self.machine.rates
            seconds.append(seconds[-1] + work / rates(kind(recipe, j)).forward)
        return seconds

    # ---- rows -----------------------------------------------------------------------------------

    def _row(self, base: CachedDepth, compute: float) -> float:
        """Seconds of one row that is read from ``base`` and computed on for ``compute`` seconds;
        infinite where the tier asked for has no room."""
        try:
            host, disk, copy = self._reading(base, self._fed(base))
        except BudgetError:
            return math.inf
        return self.machine.seconds(compute=compute, host=host, disk=disk, copy=copy)

    def _fed(self, base: CachedDepth) -> Fed:
        """How often an epoch decodes a row that it reads, gathers it, reads it from its files, and
        copies it to the device, on average over the epochs.

        What is held is filled once with all views, if it is unpacked or copied; of raw rows in the
        page cache only those are touched that are read. Every epoch over packed chunks decodes all
        views, since it wants some rows of each.
        """
        count, packed = self._views(base), base.form != "raw"
        if self._rate(base).profile == "jpeg":
            return 1.0, 0.0, 0.0, 1.0
        tier, once = self.tier_of(base).tier, count / self.recipe.schedule.epochs
        if tier == "device":
            return once, 0.0, once, once
        if packed and tier == "memory":
            return once, max(0.0, 1 - once), 0.0, 1.0
        if packed:
            return count, 0.0, count, 1.0
        once = min(1.0, once)
        return once, 1 - once, 1.0, 1.0

    def _reading(self, base: CachedDepth, fed: Fed = ONCE) -> tuple[float, float, float]:
        """Seconds that the host, the disk and copying take for one row of ``base``. What stays in
        the page cache once it is written is not read from the disk."""
        machine, rate, nbytes = self.machine, self._rate(base), self._row_bytes(base)
        decoded, gathered, read, copied = fed
        in_page_cache = self._unpacked(base) / rate.ratio <= memory.CACHE_SHARE * machine.memory
        host = decoded / rate.decode + gathered / machine.gather
        disk = 0.0 if in_page_cache else read / rate.ratio / machine.disk_read
        return nbytes * host, nbytes * disk, nbytes * copied / machine.copy

    @property
    def _by_ffcv(self) -> bool:
        """ffcv reads raw levels only, in place."""
        return self.loader == "ffcv" or self.recipe.data.jpeg > 0

    def _rate(self, node: CachedDepth) -> RowRate:
        """Rates of rows as they are stored; of images that are decoded from JPEG whenever they are
        read, of the profile ``jpeg``."""
        precision = self.recipe.cache.precision if node.depth else "uint8"
        rate = self.machine.row_rate(node.form, precision)
        jpeg = node.depth == 0 and self.recipe.data.jpeg
        return replace(rate, profile="jpeg", decode=self.machine.jpeg) if jpeg else rate

    @cached_property
    def _level(self) -> Callable[[int, int], Geometry]:
        """Shape and shards of a level, by its depth and number of rows."""
        return cache(partial(level_geometry, self.recipe))

    def _row_bytes(self, node: CachedDepth) -> int:
        """Bytes of one row before packing."""
        return self._level(node.depth, 1).row_bytes

    def _unpacked(self, node: CachedDepth) -> int:
        """Bytes of the training rows that a problem reads, all views."""
        return self._views(node) * self.train * self._row_bytes(node)

    def _views(self, node: CachedDepth) -> int:
        return len(views.train_views(self.recipe)) if node.depth else 1
