"""Memory of a training step, how many rows go through it at a time to fit ``--gpu-memory``, and
where the rows of some levels are held while a problem reads them.

The peak of solving a layer is that of the layer, its auxiliary classifier, their gradients and
moments, and the activations of one micro-batch (stages/network/footprint.py). Of these the
micro-batch is what can be chosen: gradients are summed over micro-batches, so a step is the same
but for batch norm, whose statistics are those of the rows that go through together.

Rows are held in one of three tiers; the order of an epoch does not depend on which:

    device   all of them, as stored, in the memory of the GPU: gathered there
    memory   the page cache (raw), or decoded once into RAM (packed): gathered by threads
    disk     read when they are wanted (raw), or decoded chunk by chunk into a pool (packed)

Arithmetic only; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from strata.pipeline.errors import BudgetError
from strata.pipeline.progress import size
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.recipe.tables import Schedule
from strata.stages.network import footprint
from strata.stages.network.blocks import AnyLayer
from strata.stages.network.spec import AuxiliarySpec

TIERS = ("auto", "device", "memory", "disk")
DEVICE_SHARE = 0.6
"""Share of the GPU's free memory that rows may take; the rest is for the problem."""
CACHE_SHARE = 0.7
"""Share of the free memory that raw rows may take: page cache, which the kernel can take back."""
MEMORY_SHARE = 0.5
"""Share of the free memory that decoded rows may take, which the kernel cannot take back."""


@dataclass(frozen=True)
class Device:
    """The device that computes, as far as memory is concerned."""

    compute: str
    """dtype of the convolutions."""
    cuda: bool


def named_device(recipe: Recipe) -> Device:
    """The device to plan for before one is chosen: a recipe that leaves the dtype open takes most
    in float32."""
    precision = recipe.schedule.precision
    return Device("float32" if precision == "auto" else precision, cuda=False)


def peak(
    recipe: Recipe, j: int, device: Device, accumulate: int, base: int | None = None
) -> int | None:
    """Peak bytes of tensors while layer j is solved, or applied where it is given. None where it
    is not known of a block.

    Args:
        accumulate: micro-batches per step.
        base: depth of the levels that x_{j-1} is computed from, which a divided step does in its
            middle; None: x_{j-1} itself is read.
    """
    if j <= recipe.given:
        return computing(recipe, j - 1, j, device)
    (layer, auxiliary), schedule = recipe.problems[j - 1], recipe.schedule
    step = peak_together(recipe, j, device, accumulate, [(layer, auxiliary, schedule)])
    below = recipe.layers[j - 1 if base is None else base : j - 1]
    if step is None or accumulate == 1 or not below:
        return step
    made = computing(recipe, j - 1 - len(below), j - 1, device)
    if made is None:
        return None
    held = footprint.held(layer, auxiliary, **_held(schedule, device))
    straight = schedule.goes_straight(device.compute)
    gradients = footprint.gradients(layer, auxiliary, straight=straight)
    frozen = footprint.FLOAT * sum(other.parameters for other in below)
    return max(step + frozen, held + gradients + made)


def computing(recipe: Recipe, base: int, depth: int, device: Device) -> int | None:
    """Peak bytes of tensors while x_depth is computed from x_base by frozen layers. None where it
    is not known of a block."""
    return footprint.applying(
        recipe.layers[base:depth],
        recipe.shape(base, augmentation.cached_size(recipe)),
        block=recipe.cache.block,
        compute=device.compute,
        precision=recipe.cache.precision,
        images=base == 0,
    )


def peak_together(
    recipe: Recipe,
    j: int,
    device: Device,
    accumulate: int,
    problems: Sequence[tuple[AnyLayer | None, AuxiliarySpec, Schedule]],
) -> int | None:
    """Peak bytes of tensors while problems on x_{j-1} are solved together: the weights, moments
    and best iterate of all, and the step of the largest. None where it is not known of a block.

    Args:
        problems: of each the layer, if any, the classifier, and how it is solved.
    """
    held, largest, batch = 0, 0, recipe.schedule.batch
    micro = -(-batch // accumulate)
    rows = batch if len(problems) > 1 else micro  # whole, it goes from one to the next
    for layer, auxiliary, schedule in problems:
        step = footprint.solving(  # with one moment; AdamW's other is held, too
            layer,
            auxiliary,
            recipe.shape(j - 1, recipe.augment.crop),
            batch=rows + micro * (schedule.mixup > 0),  # mixtures are rows beside it
            micro=micro,
            divided=accumulate > 1,
            compute=device.compute,
            straight=schedule.goes_straight(device.compute),
            at_once=device.cuda and schedule.moments == 1,  # AdamW's update is one kernel
        )
        if step is None:
            return None
        largest = max(largest, step - footprint.held(layer, auxiliary))
        held += footprint.held(layer, auxiliary, **_held(schedule, device))
    return held + largest


def _held(schedule: Schedule, device: Device) -> dict[str, Any]:
    """What is held beside the weights; the best iterate of a GPU is in the host's memory."""
    keep_best = schedule.keep == "best" and not device.cuda
    return {"keep_best": keep_best, "moments": schedule.moments}


def peaks(recipe: Recipe, device: Device, accumulate: Sequence[int]) -> list[int]:
    """The bytes of :func:`peak` for every layer. Raises BudgetError if they are not known of one.

    Args:
        accumulate: micro-batches per step of every layer.
    """
    found = list[int]()
    for j, count in enumerate(accumulate, start=1):
        if (needed := peak(recipe, j, device, count)) is None:
            raise BudgetError(
                f"--gpu-memory: it is not known how much memory solving layer {j} takes "
                f"({getattr(recipe.layers[j - 1], 'name', '')}). Leave it out"
            )
        found.append(needed)
    return found


def fit(recipe: Recipe, device: Device, cap: int) -> tuple[int, ...]:
    """Micro-batches per step of every layer: the recipe's, or the fewest that fit.

    Raises:
        BudgetError: a layer does not fit even with one row at a time; gives both numbers.
    """
    batch, found = recipe.schedule.batch, [recipe.schedule.accumulate] * len(recipe.layers)
    while max(needed := peaks(recipe, device, found)) > cap:
        for j in (j for j, nbytes in enumerate(needed) if nbytes > cap):
            if j < recipe.given:
                raise BudgetError(
                    f"applying layer {j + 1} to {recipe.cache.block} rows needs {size(needed[j])} "
                    f"of device memory; --gpu-memory is {size(cap)}. Lower 'cache.block', or raise "
                    "it"
                )
            if found[j] >= batch:
                raise BudgetError(
                    f"solving layer {j + 1} needs {size(needed[j])} of device memory with one row "
                    f"at a time; --gpu-memory is {size(cap)}. Lower 'network.width', or raise it"
                )
            found[j] = min(batch, 2 * found[j])
    return tuple(found)


def check(recipe: Recipe, device: Device, accumulate: Sequence[int], cap: int) -> None:
    """Refuse a run that was made with larger micro-batches than fit.

    Raises:
        BudgetError: gives both numbers.
    """
    fit(recipe, device, cap)
    for j, needed in enumerate(peaks(recipe, device, accumulate), start=1):
        if needed > cap:
            rows = -(-recipe.schedule.batch // accumulate[j - 1])
            raise BudgetError(
                f"this run solves layer {j} with {rows} rows at a time, which needs {size(needed)} "
                f"of device memory; --gpu-memory is {size(cap)}. Start another run with --run"
            )


def divided_layers(recipe: Recipe, accumulate: Sequence[int]) -> list[str]:
    """Lines for people: the layers whose steps are divided further than the recipe says."""
    return [
        f"layer {j}: {-(-recipe.schedule.batch // count)} of {recipe.schedule.batch} rows at a time"
        for j, count in enumerate(accumulate, start=1)
        if count != recipe.schedule.accumulate
    ]


# ---- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TierChoice:
    """A tier, and the reason for it."""

    tier: str
    reason: str


def choose_tier(
    asked: str, what: str, nbytes: int, *, packed: bool, device_free: int, memory_free: int
) -> TierChoice:
    """Choose a tier by bytes.

    Args:
        asked: ``auto`` or a tier.
        what: name of what is to be read, for messages: ``x_1``.
        packed: its rows are compressed on disk.
        nbytes: bytes of its rows, uncompressed.
        device_free: bytes free on the GPU; 0 without one.
        memory_free: bytes of RAM that can be used.

    Raises:
        BudgetError: the tier asked for has no room; gives both numbers.
    """
    kind, room = "unpacked" if packed else "raw", ""
    rooms = {
        "device": (DEVICE_SHARE, device_free, "GPU memory"),
        "memory": (MEMORY_SHARE if packed else CACHE_SHARE, memory_free, "memory"),
    }
    for tier, (share, free, name) in rooms.items():
        room = f"{what} {kind} is {size(nbytes)}, {size(free)} of {name} are free"
        if nbytes <= share * free and asked in ("auto", tier):
            return TierChoice(tier, room)
        if asked == tier:
            raise BudgetError(
                f"--tier {tier}: {room}, of which {100 * share:.0f} % may be used. Use --tier auto"
            )
    how = "chunks are decoded as they are wanted" if packed else "rows are read as they are wanted"
    why = "--tier disk" if asked == "disk" else room
    return TierChoice("disk", f"{why}: {how}")
