"""What a recipe costs and what is left to do. Pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from strata.pipeline.errors import BudgetError
from strata.pipeline.plan.costs import level_geometry, operations, passes
from strata.pipeline.plan.memory import named_device, peak
from strata.pipeline.progress import size
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe
from strata.stages.network.spec import Shape
from strata.store.level.layout import LevelKey, geometry
from strata.store.read.order import batch_count


@dataclass(frozen=True)
class Inventory:
    """What exists of a run, as far as deciding what to do next is concerned."""

    images: bool
    """x_0 is complete."""
    solved: int
    """Number of layers, from the first, that are solved and current."""
    written: frozenset[int]
    """Depths j ≥ 1 whose every level is complete and current."""
    given: int = 0
    """Number of layers, from the first, that are given: they need no solving."""


@dataclass(frozen=True)
class Step:
    """One thing to do: read ``images``, ``solve`` layer j, ``take`` it as given, ``write`` x_j."""

    kind: str
    j: int

    def __str__(self) -> str:
        names = {"images": "read images into x_0", "solve": f"solve layer {self.j}"}
        names["take"] = f"take layer {self.j} as given"
        return names.get(self.kind, f"write x_{self.j}")


def named(steps: Sequence[Step]) -> list[str]:
    """Steps as people and JSON have them; layers that are taken as given are one."""
    taken = [step.j for step in steps if step.kind == "take"]
    lines = [str(step) for step in steps if step.kind != "take" or step.j == taken[0]]
    if len(taken) > 1:
        found = f"take layers {taken[0]} … {taken[-1]} as given"
        lines[lines.index(str(Step("take", taken[0])))] = found
    return lines


def steps(
    have: Inventory,
    *,
    solve: int = 0,
    write: int = 0,
    cached: Collection[int] | None = None,
) -> tuple[Step, ...]:
    """What is missing, in order, to have layers 1 … ``solve`` solved and x_``write`` complete.

    Solving layer j needs x_{j-1}, from its level or computed from the nearest one below; a layer
    that is solved or given needs nothing. Writing x_j needs layer j.

    Args:
        cached: depths that are written so that the next problem can read them; None: all.
    """
    complete = {0, *(j for j in have.written if j <= have.solved)}
    todo = [] if have.images or not (solve or write) else [Step("images", 0)]
    for j in range(have.solved + 1, max(solve, write) + 1):
        if j <= have.given:
            todo.append(Step("take", j))
            continue
        if j - 1 not in complete and (cached is None or j - 1 in cached):
            todo.append(Step("write", j - 1))
        todo.append(Step("solve", j))
    if write not in complete and Step("write", write) not in todo:
        todo.append(Step("write", write))
    return tuple(todo)


def steps_below(
    have: Inventory, j: int, *, cached: Collection[int] | None = None
) -> tuple[Step, ...]:
    """What is missing before layer j can be solved, whether it is solved already or not."""
    before = replace(have, solved=min(have.solved, j - 1))
    return steps(before, solve=j, cached=cached)[:-1]


def skipped(have: Inventory, *, solve: int = 0, write: int = 0) -> list[str]:
    """Lines for people about what is there already of what :func:`steps` was asked for."""
    there = range(1 + have.given, min(have.solved, solve or write) + 1)
    lines = [f"layer {j}: solved already" for j in there]
    complete = write in have.written and write <= have.solved
    return lines + [f"x_{write}: complete already"] * complete


@dataclass(frozen=True)
class DepthPlan:
    """What x_depth and the layer that makes it cost. Fields have the names of `plan --json`."""

    depth: int
    shape: Shape
    """Shape of one row that is cached: the canvas in canvas mode, else the crop."""
    levels: dict[str, int]
    """Bytes on disk by level: ``train.v0``, ``test``, …"""
    bytes: int
    """Bytes on disk of all levels."""
    bytes_one_view: int
    """Bytes of the training images at crop size, one view: for comparing recipes."""
    parameters: int
    auxiliary_parameters: int
    steps: int
    """SGD steps to solve the layer, fine-tuning included; 0 for x_0 and for what is given."""
    operations: float
    """Multiply-adds to solve the layer: forward and backward, all epochs, without those below."""
    operations_below: float
    """Multiply-adds of the layers below, forward, all epochs: what reading x_{j-1} saves."""
    memory_bytes: int | None
    """Peak bytes of tensors while the layer is solved, with the recipe's micro-batches; 0 for
    x_0. In float32, where the recipe leaves the dtype to the device. None: not known."""


@dataclass(frozen=True)
class Plan:
    """A whole run: x_0 … x_J. ``run`` writes up to x_{J-1}; x_J only when asked for."""

    depths: tuple[DepthPlan, ...]
    precision: str
    images: int
    """Number of images in the training set."""
    tests: int
    given: int = 0
    """Number of layers that are given: of their levels, only the last is read."""

    @property
    def written(self) -> tuple[DepthPlan, ...]:
        """Depths of the levels that ``run`` writes: x_0, and all that training reads; where all
        layers are given, x_J."""
        first = max(1, self.given)
        return self.depths[0], *self.depths[first : max(len(self.depths) - 1, self.given + 1)]

    @property
    def total(self) -> int:
        """Bytes on disk if every level that training reads is kept."""
        return sum(d.bytes for d in self.written)

    @property
    def peak(self) -> int:
        """Bytes on disk if a level goes once the next but one is needed: x_0 and two neighbours."""
        pairs = pairwise([0, *(d.bytes for d in self.written[1:])])
        return self.depths[0].bytes + max(map(sum, pairs), default=0)

    @property
    def operations(self) -> float:
        """Multiply-adds of the whole run, where every problem computes the layers below it."""
        return sum(d.operations + d.operations_below for d in self.depths)

    @property
    def ceiling(self) -> float:
        """By how much a cache that costs nothing would divide the operations of one run."""
        trained = sum(d.operations for d in self.depths)
        return self.operations / trained if trained else 1.0

    def as_json(self) -> dict[str, Any]:
        return {
            "total_bytes": self.total,
            "peak_bytes": self.peak,
            "ceiling": self.ceiling,
            "depths": [asdict(d) for d in self.depths],
        }


def make_plan(recipe: Recipe, data: dict[str, Any] | None = None) -> Plan:
    """The cost of a recipe.

    Args:
        data: a run's record of its images; None: as many as the recipe expects.
    """
    counts = data or {"train": recipe.data.train, "test": recipe.data.test}
    depths = (_depth(recipe, j, counts) for j in range(len(recipe.layers) + 1))
    counted = counts["train"], counts["test"], recipe.given
    return Plan(tuple(depths), recipe.cache.precision, *counted)


def _depth(recipe: Recipe, j: int, counts: dict[str, Any]) -> DepthPlan:
    train, one = counts["train"], level_geometry(recipe, j, counts["train"])
    levels = {
        LevelKey(j, "", split, view).name: level_geometry(recipe, j, counts[split]).nbytes
        for split, view in augmentation.levels_at(recipe, j)
    }
    on_disk = sum(levels.values())
    if j == 0:
        view = one.rows * one.row_bytes
        return DepthPlan(0, one.sample, levels, on_disk, view, 0, 0, 0, 0.0, 0.0, 0)
    layer, auxiliary = recipe.layers[j - 1], recipe.auxiliaries[j - 1]
    crop = recipe.shape(j, recipe.augment.crop)
    epochs, worth = passes(recipe, j) if recipe.has_problem(j) else (0, 0.0)
    frozen = sum(
        below.operations(recipe.shape(i, recipe.augment.crop))
        for i, below in enumerate(recipe.layers[: j - 1])
    )
    return DepthPlan(
        j,
        one.sample,
        levels,
        on_disk,
        train * geometry(train, crop, recipe.cache.precision, 1 << 26).row_bytes,
        layer.parameters,
        auxiliary.parameters * (j > recipe.given),
        epochs * max(1, batch_count(train, recipe.schedule.batch, drop_last=True)),
        3.0 * operations(recipe, recipe.problems[j - 1]) * worth * train,
        float(frozen * epochs * train),
        peak(recipe, j, named_device(recipe), recipe.schedule.accumulate),
    )


def check_budget(plan: Plan, budget: int | None) -> bool:
    """Can the run stay within a disk budget, and must it remove levels on the way?

    Returns:
        True if levels must be removed once they are no longer needed.

    Raises:
        BudgetError: even so it does not fit; gives both numbers and what to change.
    """
    if budget is None or plan.total <= budget:
        return False
    if plan.peak <= budget:
        return True
    largest = max(plan.written[1:] or plan.depths, key=lambda d: d.bytes)
    shape = "×".join(map(str, largest.shape))
    raise BudgetError(
        f"the run needs {size(plan.peak)} of disk at its peak ({size(plan.total)} with every "
        f"level kept); --disk-budget is {size(budget)}. Most of it is x_{largest.depth}, "
        f"{size(largest.bytes)}: "
        f"{len(largest.levels)} levels of {shape} in {plan.precision}. Lower "
        "'network.width' or 'augment.views' (0 caches no training features), or raise the budget"
    )
