"""What every step of a run shares: the run, the store, the device, how to report and stop."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from strata.pipeline.curves import Show
from strata.pipeline.errors import NotThereYet
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.options import Options
from strata.pipeline.plan import hardware, memory
from strata.pipeline.plan.caching import known_machine
from strata.pipeline.plan.costs import level_geometry
from strata.pipeline.plan.machine import Machine
from strata.pipeline.progress import Reporter, size
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import device, levels, record, rundir, weights
from strata.pipeline.run import ranks as launch
from strata.pipeline.run.device import ReadOptions
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.rundir import RUN, Run
from strata.pipeline.run.stores import default_profile
from strata.stages.data.images import SPLITS
from strata.stages.solve.ranks import Ranks
from strata.store.feature_store import Store
from strata.store.level.layout import Geometry, LevelKey
from strata.store.level.level import Level

READ_THREADS = 2
"""Threads that decode images."""


@dataclass(frozen=True)
class Session:
    """A run at work."""

    run: Run
    store: Store
    device: torch.device
    report: Reporter = field(default_factory=Reporter)
    stop: Interruptions = field(default_factory=Interruptions)
    options: Options = field(default_factory=Options)
    """What the command was told."""
    rates: Machine | None = None
    """Rates of this machine, for expectations; None: not known."""
    profiles: Mapping[int, str] = field(default_factory=dict)
    """How x_depth is stored, where the recipe leaves that open; raw where nothing is said."""
    ranks: Ranks = field(default_factory=Ranks)
    """Processes that solve layers together."""
    curves: Show = lambda place, curve: None
    """Shows the curve of a problem after every epoch."""
    crew: Any = None
    """Workers that levels are written with (pipeline/materialize/cluster/cluster.py, a room above);
    None: this process alone."""

    @cached_property
    def compute(self) -> torch.dtype:
        return device.dtype(self.run.compute)

    @cached_property
    def read_options(self) -> ReadOptions:
        """How rows are read: on the device with what the largest problem leaves of
        ``--gpu-memory``, in the host's memory with this rank's part; by as many threads as
        `calibrate` has found to be enough here, or a few."""
        told, on_device = self.options, self.options.gpu_memory
        if on_device is not None:
            peaks = memory.peaks(self.run.recipe, self.room, self.run.accumulate)
            on_device = max(0, on_device - max(peaks))
        ranks, on_host = launch.number("LOCAL_WORLD_SIZE"), told.memory_budget
        if ranks > 1:
            on_host = (on_host or device.available_memory()) // ranks
        here = self.rates and self.rates.hardware == hardware.described()
        threads = (self.rates.gatherers if self.rates and here else 0) or device.GATHERERS
        room = {"device_bytes": on_device, "memory_bytes": on_host}
        return ReadOptions(self.device, told.tier, told.loader, threads, **room)

    @cached_property
    def room(self) -> memory.Device:
        """The device, for arithmetic of memory."""
        return memory.Device(self.run.compute, self.device.type == "cuda")

    def key(self, depth: int, split: str, view: str) -> LevelKey:
        """The level of this run's lineage; the layers up to ``depth`` must be solved."""
        return LevelKey(depth, self.run.nodes()[depth].fingerprint, split, view)

    def images(self) -> dict[str, Level]:
        """x_0 by split."""
        return {split: self.store.open(self.key(0, split, "clean")) for split in SPLITS}

    def geometry(self, j: int, split: str) -> Geometry:
        """Rows, shape and shards of a level of x_j that is to be written."""
        recipe, data = self.run.recipe, self.run.data()
        assert data is not None
        profile = recipe.cache.profile
        if profile == "auto" or self.store.remote:  # as the levels there are, or what was chosen
            there = levels.profile_at(self.run, self.store, j) or self.profiles.get(j)
            profile = there or default_profile(self.store, self.run)
        return level_geometry(recipe, j, data[split], profile)


def open_session(
    overview: Overview,
    options: Options,
    *,
    report: Reporter,
    ranks: Ranks | None = None,
    **rest: Any,
) -> Session:
    """Take up the run that a command speaks of, or make it; a new one divides its steps so that
    they fit into ``--gpu-memory``, and keeps to that.

    Args:
        ranks: who solves layers together; None: this process alone.
        rest: fields of :class:`Session` that no option sets.

    Raises:
        DeviceError: the device, or the recipe's precision on it, is not to be had.
        BudgetError: a step does not fit into ``--gpu-memory``; gives both numbers.
    """
    chosen, cap, run = device.pick(options.device), options.gpu_memory, overview.run
    if run is None:
        told = overview.recipe, options.seed, report
        recipe, states = weights.begin_with(*told, download=options.download)
        facts = _facts_of_new_run(recipe, chosen, cap, report)
        weights.keep_initial(overview.directory, states)
        who = overview.directory, overview.name, overview.text
        run = rundir.create(*who, options.seed, options.data, facts, recipe)
    else:
        # Before they were read (a damaged record is one, too: verify mends it), where the recipe
        # says they are.
        read = (run.directory / rundir.DATA).exists()
        wanted = options.data or (run.source if read else overview.recipe.data.source)
        if wanted != run.source:
            run = replace(run, facts={**run.facts, "source": wanted})  # checked when they are read
            record.write(run.directory / RUN, run.facts)
    device.check(run.compute, chosen)
    if cap is not None:
        there = memory.Device(run.compute, chosen.type == "cuda")
        memory.check(run.recipe, there, run.accumulate, cap)
        if chosen.type == "cuda":  # more is refused by the allocator, as if it were full
            _, whole = torch.cuda.mem_get_info(chosen)
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / whole), chosen)
    if chosen.type == "cpu":
        hardware.keep_freed_memory()
    with suppress(NotThereYet):  # another machine's: who needs them is told so
        rest["rates"] = known_machine(options)
    rest |= {"options": options, "ranks": ranks or Ranks()}
    return Session(run, overview.store, chosen, report, **rest)


def _facts_of_new_run(
    recipe: Recipe, chosen: torch.device, cap: int | None, report: Reporter
) -> dict[str, Any]:
    """Dtype, device and versions; and how many micro-batches steps are divided into to fit ``cap``
    bytes."""
    compute, reason = device.compute_dtype(recipe.schedule.precision, chosen)
    report.say(f"convolutions in {compute}: {reason}")
    facts = {"compute": compute, **device.facts(chosen)}
    if cap is not None:
        there = memory.Device(compute, chosen.type == "cuda")
        facts["accumulate"] = accumulate = memory.fit(recipe, there, cap)
        for line in memory.divided_layers(recipe, accumulate):
            report.say(f"to fit into {size(cap)}, {line}; batch norm sees no more than these")
    return facts
