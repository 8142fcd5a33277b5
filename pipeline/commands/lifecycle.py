"""What a command that computes does: find the run, decide what is missing, and do only that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strata.pipeline.errors import NotThereYet
from strata.pipeline.materialize.cluster import cluster
from strata.pipeline.plan import plan
from strata.pipeline.plan.caching import Caching, caching, known_machine
from strata.pipeline.plan.machine import Machine
from strata.pipeline.progress import Reporter, reporter
from strata.pipeline.run import overview
from strata.pipeline.run import ranks as launch
from strata.pipeline.run.levels import refer_to
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.stores import check_loader

if TYPE_CHECKING:
    from strata.pipeline.interrupt import Interruptions
    from strata.pipeline.run.session import Session
    from strata.stages.solve.ranks import Ranks

Options = Mapping[str, Any]
"""Flags of the command line, by name."""


@dataclass(frozen=True)
class Answer:
    """The result of a command."""

    value: Any
    """For machines, as JSON."""
    shown: tuple[Any, ...]
    """For people: tables and lines."""
    error: Exception | None = None
    """Raised once the rest was said."""


def find(options: Options) -> Overview:
    """The run that a command's flags speak of."""
    return overview.find(
        recipe=options["recipe"],
        directory=options["run_dir"],
        store=options["store"],
        seed=options["seed"],
        read_cache=options.get("read_cache"),
    )


def reporting(options: Options) -> Reporter:
    return reporter(quiet=options["as_json"])


@dataclass(frozen=True)
class Missing:
    """What a command has to do."""

    found: Overview
    steps: list[str]
    caching: Caching


def missing(options: Options, **goal: int) -> Missing:
    """The run, and the steps it still needs; says what is there already."""
    cluster.check(options)
    found = find(options)
    found.check_layer(max(goal.values()))
    costs = plan.make_plan(found.recipe, found.data())
    how = caching(found.recipe, costs, options)
    have = found.inventory()
    for line in (*plan.skipped(have, **goal), *how.said):
        reporting(options).say(line)
    todo = plan.steps(have, cached=how.depths, **goal)
    return Missing(found, [str(step) for step in todo], how)


def perform(options: Options, **goal: int) -> tuple[Overview, list[str]]:
    """Do what is missing, and say what that was. Where nothing is, torch is not even imported."""
    if not launch.together():
        return _perform(options, goal, None)
    with launch.ranks(options["device"]) as ranks:
        quiet = options["as_json"] or not ranks.leads
        return _perform({**options, "as_json": quiet}, goal, ranks)


def _perform(
    options: Options, goal: Mapping[str, int], ranks: Ranks | None
) -> tuple[Overview, list[str]]:
    asked = missing(options, **goal)
    found, todo = asked.found, asked.steps
    if ranks:
        ranks.wait()  # all have seen the same, before the leader changes it
    if todo or (found.run and options["data"] not in (None, found.run.source)):
        from strata.pipeline.train.algorithm import make

        how = asked.caching
        with at_work(found, options, how.profiles, ranks) as session:
            done = make(session, evict=how.evict, cached=how.depths, **goal)
            todo = [str(step) for step in done]
    elif found.run:
        refer_to(found.run, found.store)
    return found, todo


def _rates(options: Options) -> Machine | None:
    """Of the machine, where they are known: to say what to expect."""
    try:
        return known_machine({"machine": None, **options})
    except NotThereYet:
        return None  # another machine's; who needs them is told so


@contextmanager
def at_work(
    found: Overview,
    options: Options,
    profiles: Mapping[int, str] | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Session]:
    """A session that has the run to itself; Ctrl-C stops it between two batches or shards.

    Another process that works on the same run is waited for.

    Args:
        profiles: how x_depth is stored, where the recipe leaves that open.
        ranks: who has the run together; None: this process alone.

    Raises:
        OptionRange: torchrun has started several processes, and ``ranks`` is None.
    """
    from strata.pipeline.interrupt import interruptions
    from strata.pipeline.run.session import patience
    from strata.store.files.lock import hold

    check_loader(found.store, options["loader"])
    if ranks is None:
        launch.refuse_ranks()
    with interruptions(passed_on=launch.together()) as stop:
        if ranks and not ranks.leads:
            ranks.wait()  # until the leader has the run
            yield _opened(find(options), options, stop, profiles=profiles or {}, ranks=ranks)
            return
        with cluster.crew(options, reporting(options), stop) as crew:
            rest = {"profiles": profiles or {}, "ranks": ranks, "crew": crew}
            session = _opened(found, options, stop, **rest)
            lock = session.run.directory / "LOCK"
            with hold(lock, f"the run {session.run.directory}", patience(session)):
                session.run.tidy()
                session.ranks.wait()
                yield session


def _opened(found: Overview, options: Options, stop: Interruptions, **rest: Any) -> Session:
    from strata.pipeline.run.session import open_session

    return open_session(
        found,
        seed=options["seed"],
        device_name=options["device"],
        source=options["data"],
        report=reporting(options),
        stop=stop,
        data_root=options["data_root"],
        download=options["download"],
        skip_broken=options["skip_broken"],
        tier=options["tier"],
        loader=options["loader"],
        rates=_rates(options),
        gpu_memory=options["gpu_memory"],
        memory_budget=options["memory_budget"],
        **rest,
    )
