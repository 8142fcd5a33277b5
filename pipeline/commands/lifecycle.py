"""What a command that computes does: find the run, decide what is missing, and do only that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from strata.pipeline.curves import Show, curve_of, shown_in
from strata.pipeline.interrupt import Interruptions, patience
from strata.pipeline.materialize.cluster import cluster
from strata.pipeline.options import Options
from strata.pipeline.plan import plan
from strata.pipeline.plan.caching import Caching, caching
from strata.pipeline.progress import Reporter, reporter
from strata.pipeline.run import ranks as launch
from strata.pipeline.run.levels import refer_to
from strata.pipeline.run.overview import Overview, find
from strata.pipeline.run.record import CURVE
from strata.pipeline.run.rundir import LOCK, PLACES
from strata.pipeline.run.stores import check_loader
from strata.store.files.lock import Waiting, hold

if TYPE_CHECKING:
    from strata.pipeline.run.session import Session
    from strata.stages.solve.ranks import Ranks


@dataclass(frozen=True)
class Answer:
    """The result of a command."""

    value: Any
    """For machines, as JSON."""
    shown: tuple[Any, ...]
    """For people: tables and lines."""
    error: Exception | None = None
    """Raised once the rest was said."""
    left_out: Sequence[str] = ()
    """Neighbours that cannot be read, and why: told in one warning."""


def done_answer(found: Overview, done: list[str]) -> Answer:
    """The answer of a command that did what was missing."""
    value = {"run": str(found.directory), "store": str(found.store.root), "done": done}
    text = f"done: {', '.join(done)}" if done else "nothing to do: everything is there"
    return Answer(value, (text,))


def reporting(options: Options) -> Reporter:
    """Where a command says how far it is."""
    return reporter(quiet=options.as_json)


def names_other_images(options: Options, found: Overview) -> bool:
    """Does ``--data`` name other images than the run was made with?"""
    return bool(found.run) and options.data not in (None, found.run.source)


def missing(
    found: Overview, options: Options, **goal: int
) -> tuple[tuple[plan.Step, ...], Caching]:
    """The steps that a run still needs, and what these cache; says what is there already.

    Args:
        goal: ``solve`` or ``write``, as of :func:`plan.steps`.
    """
    cluster.check(options)
    found.check_layer(max(goal.values()))
    how = caching(found.recipe, plan.make_plan(found.recipe, found.data()), options)
    have = found.inventory()
    for line in (*plan.skipped(have, **goal), *how.said):
        reporting(options).say(line)
    return plan.steps(have, cached=how.depths, **goal), how


def perform(found: Overview, options: Options, **goal: int) -> tuple[Overview, list[str]]:
    """Do what is missing: the run as it then is, and what was done. Where nothing is missing, torch
    is not even imported. Args: as of :func:`missing`."""
    done: list[str] = []
    with launch.ranks(options.device) if launch.together() else nullcontext() as ranks:
        if ranks and not ranks.leads:
            options = replace(options, as_json=True)
        todo, how = missing(found, options, **goal)
        if ranks:
            ranks.wait()  # all have seen the same, before the leader changes it
        if todo or names_other_images(options, found):
            from strata.pipeline.train.algorithm import make

            with at_work(found, options, how.profiles, ranks) as session:
                # Decided again, since another process may have had the run meanwhile.
                steps = make(session, plan.steps, evict=how.evict, cached=how.depths, **goal)
                done = plan.named(steps)
                found = found.again(options)
        elif found.run:
            refer_to(found.run, found.store)
            with curves(found, options):  # of what is there
                pass
    return found, done


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
    from strata.pipeline.run.session import open_session

    check_loader(found.store, options.loader)
    if ranks is None:
        launch.refuse_ranks()
    follows, report = ranks is not None and not ranks.leads, reporting(options)
    with Interruptions(passed_on=launch.together()) as stop:
        if ranks and follows:
            ranks.wait()  # until the leader has the run
            found = find(options)
        with nullcontext() if follows else cluster.crew(options, report, stop) as crew:
            how: Any = {"profiles": profiles or {}, "ranks": ranks, "crew": crew}
            if follows:
                yield open_session(found, options, report=report, stop=stop, **how)
                return
            with locked(found, patience(stop, report)):
                found = found.again(options)
                with curves(found, options) as how["curves"]:
                    session = open_session(found, options, report=report, stop=stop, **how)
                    session.run.tidy()
                    session.ranks.wait()
                    yield session


@contextmanager
def curves(found: Overview, options: Options) -> Iterator[Show]:
    """What shows curves under ``--log-dir``; those that are there are shown at once."""
    where = options.log_dir if launch.leads() else None
    with shown_in(where, found.directory) as show:
        for place in PLACES if where else ():
            paths = found.directory.glob(f"{place}/{CURVE}")
            for path in sorted(paths, key=lambda path: (len(str(path)), path)):
                show(path.parent, curve_of(path))
        yield show


@contextmanager
def locked(found: Overview, waiting: Waiting = None) -> Iterator[None]:
    """Have the run's directory to ourselves for the block; it goes if nothing else is in it then.

    Raises:
        LevelBusy: another process works on the run and ``waiting`` is None; says who.
    """
    lock = found.directory / LOCK
    with hold(lock, f"the run {found.directory}", waiting):
        try:
            yield
        finally:
            with suppress(OSError):  # the next one has come already
                if {path.name for path in found.directory.iterdir()} == {LOCK}:
                    lock.unlink()
                    found.directory.rmdir()
