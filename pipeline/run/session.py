"""What every step of a run shares: the run, the store, the device, how to report and stop."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from strata.pipeline.errors import NotThereYet
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.options import Options
from strata.pipeline.plan import hardware, memory
from strata.pipeline.plan.caching import known_machine
from strata.pipeline.plan.costs import level_geometry
from strata.pipeline.plan.machine import Machine
from strata.pipeline.progress import Reporter, size
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import device, levels, rundir
from strata.pipeline.run import ranks as launch
from strata.pipeline.run.device import ReadOptions
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.rundir import Run
from strata.pipeline.run.stores import default_profile
from strata.stages.data.images import SPLITS
from strata.stages.solve.ranks import Ranks
from strata.store.feature_store import Store
from strata.store.level.layout import Geometry, LevelKey
from strata.store.level.level import Level

READ_THREADS = 2
"""Threads that decode images."""
TOLD = (
    *("data_root", "download", "skip_broken", "tier", "loader"),
    *("gpu_memory", "memory_budget"),
)
"""Fields of a session that are options of the command line."""


@dataclass(frozen=True)
class Session:
    """A run at work."""

    run: Run
    store: Store
    device: torch.device
    report: Reporter = field(default_factory=Reporter)
    stop: Interruptions = field(default_factory=Interruptions)
    data_root: Path = Path("data")
    """Where torchvision's data sets lie."""
    download: bool = False
    skip_broken: bool = False
    tier: str = "auto"
    """Where rows are held while a problem reads them; see pipeline/plan/tiers.py."""
    loader: str = "native"
    """``native`` or ``ffcv``."""
    rates: Machine | None = None
    """Rates of this machine, for expectations; None: not known."""
    profiles: Mapping[int, str] = field(default_factory=dict)
    """How x_depth is stored, where the recipe leaves that open; raw where nothing is said."""
    gpu_memory: int | None = None
    """Most bytes of tensors on the device; None: what it has."""
    memory_budget: int | None = None
    """Most bytes of the host's memory for levels; None: what is free."""
    ranks: Ranks = field(default_factory=Ranks)
    """Processes that solve layers together."""
    crew: Any = None
    """Workers that levels are written with (pipeline/materialize/cluster/cluster.py, a room above);
    None: this process alone."""

    @cached_property
    def compute(self) -> torch.dtype:
        return device.dtype(self.run.compute)

    @cached_property
    def read_options(self) -> ReadOptions:
        """How rows are read."""
        return ReadOptions(
            self.device,
            self.tier,
            self.loader,
            device_bytes=self._device_bytes_for_rows(),
            memory_bytes=self._memory_bytes_for_rows(),
        )

    @cached_property
    def room(self) -> memory.Device:
        """The device, for arithmetic of memory."""
        return memory.Device(self.run.compute, self.device.type == "cuda")

    def _device_bytes_for_rows(self) -> int | None:
        """What the largest problem leaves of ``gpu_memory``."""
        if self.gpu_memory is None:
            return None
        peak = memory.largest_peak(self.run.recipe, self.room, self.run.accumulate)
        return max(0, self.gpu_memory - peak)

    def _memory_bytes_for_rows(self) -> int | None:
        """This rank's part of the memory budget, or of the machine's memory."""
        ranks = launch.number("LOCAL_WORLD_SIZE")
        if ranks == 1:
            return self.memory_budget
        return (self.memory_budget or device.available_memory()) // ranks

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
        facts = _facts_of_new_run(overview.recipe, chosen, cap, report)
        who = overview.directory, overview.name, overview.text
        run = rundir.create(*who, options.seed, options.data, facts, overview.recipe)
    elif (wanted := options.data or _known_source(overview, run)) != run.source:
        run = rundir.with_source(run, wanted)
    device.check(run.compute, chosen)
    if cap is not None:
        there = memory.Device(run.compute, chosen.type == "cuda")
        memory.check(run.recipe, there, run.accumulate, cap)
        device.limit_memory(chosen, cap)
    if chosen.type == "cpu":
        hardware.keep_freed_memory()
    with suppress(NotThereYet):  # another machine's: who needs them is told so
        rest["rates"] = known_machine(options)
    rest |= {name: getattr(options, name) for name in TOLD}
    return Session(run, overview.store, chosen, report, ranks=ranks or Ranks(), **rest)


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


def _known_source(overview: Overview, run: Run) -> str:
    """Where the run's images were read from; before they were, where the recipe says they are."""
    read = (run.directory / rundir.DATA).exists()  # a damaged record is one, too: verify mends it
    return run.source if read else overview.recipe.data.source
