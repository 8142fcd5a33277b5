"""The command `verify`: every file of a store and of a run is checked; what is damaged is mended by
computing it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strata.pipeline.commands import lifecycle
from strata.pipeline.commands.lifecycle import Answer
from strata.pipeline.commands.storage import level_state
from strata.pipeline.errors import ClusterError, NotThereYet
from strata.pipeline.interrupt import Interruptions, patience
from strata.pipeline.materialize.cluster import cluster
from strata.pipeline.materialize.cluster.submit import in_order
from strata.pipeline.options import Options
from strata.pipeline.progress import Reporter, Tick, size
from strata.pipeline.run import levels, probe_results, rundir, sweep_results
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.record import DATA, FEATURES, RUN
from strata.pipeline.run.rundir import BASELINE, NETWORK, TRANSFER, Run
from strata.pipeline.run.stores import StoreAddress
from strata.store.errors import LevelDamaged
from strata.store.feature_store import Store
from strata.store.fingerprint import sha256
from strata.store.level.layout import LevelKey, lock_path
from strata.store.level.level import COMMIT, SHARDS, commit_of
from strata.store.write.contents import beside_levels
from strata.store.write.unfinished import HASH_THREADS
from strata.store.write.verify import (
    Damage,
    check_level,
    check_shard,
    forget_damage,
    level_directories,
    put_back,
)

if TYPE_CHECKING:
    from strata.pipeline.run.session import Session

MB = 10**6
NO_VALUES = "its commit could not be read, so there is nothing to compare with"
SAME_VALUES = "the same values as before"
OTHER_VALUES = (
    "with OTHER values than before, for example of another device: levels above are stale"
)


@dataclass(frozen=True)
class Findings:
    """What a verification found."""

    levels: int
    """Levels looked at."""
    nbytes: int
    """Bytes of their shards."""
    partial: tuple[Path, ...]
    """Directories of levels without a commit: not done yet, and no damage."""
    damaged: tuple[Damage, ...]
    """In the store."""
    run: tuple[tuple[Path, str], ...]
    """Damaged files of the run, and what is wrong with them."""
    strange: tuple[tuple[Path, str], ...] = ()
    """Files in the store that do not belong there, and why."""

    @property
    def all(self) -> list[tuple[Path, str]]:
        """Every damaged file, and what is wrong with it."""
        return [*((damage.path, damage.what) for damage in self.damaged), *self.run]


def verify(options: Options) -> Answer:
    """Check the store and the run, and with ``--repair`` mend them and check again."""
    found, report, reads = lifecycle.find(options), lifecycle.reporting(options), not options.repair
    how: dict[str, Any] = {"deep": options.deep, "layer": options.layer}
    with cluster.crew(options, report, Interruptions(), reads=reads) as crew:
        checked = check(found, **how, report=report, crew=crew)
    mended = []
    if options.repair and checked.all:
        found.existing()
    if options.repair and found.run and (checked.all or checked.partial):
        with lifecycle.at_work(found, options) as session:
            mended = repair(session, checked)
        checked = check(lifecycle.find(options), **how)
    value = {
        "levels": checked.levels,
        "bytes": checked.nbytes,
        "partial": [f"{path.parent.name}/{path.name}" for path in checked.partial],
        "damaged": [{"path": str(path), "what": what} for path, what in checked.all],
        "mended": mended,
        "strange": [{"path": str(path), "what": what} for path, what in checked.strange],
    }
    count = len(checked.all)
    depth = "every byte" if options.deep else "sizes and small files; --deep reads every byte"
    what = "damage was found" if count else "all is as it was written"
    lines = [*mended, *(f"damaged: {path}: {what}" for path, what in checked.all)]
    lines += [f"not finished: {path}" for path in checked.partial]
    lines += [f"does not belong here: {path}: {what}" for path, what in checked.strange]
    lines += [f"{checked.levels} levels, {size(checked.nbytes)} ({depth}): {what}"]
    said = "1 file is damaged" if count == 1 else f"{count} files are damaged"
    return Answer(value, tuple(lines), LevelDamaged(said) if count else None)


def check(
    overview: Overview,
    *,
    deep: bool,
    layer: int | None = None,
    report: Reporter | None = None,
    crew: cluster.Workers | None = None,
) -> Findings:
    """Check every level of the store, and the records and weights of the run.

    Args:
        deep: every byte of every shard, not only its size; and what lies beside the levels.
        layer: only x_layer, and only that layer's weights.
        crew: workers that hash the shards of a ``deep`` check; None: this process.

    Raises:
        ClusterError: there are no workers, or they do not see the store.
        LayerRange: the network has no such layer.
    """
    if layer:
        overview.check_layer(layer)
    store, run = overview.store, overview.run
    found = level_directories(store.root, store.files)
    if layer is not None:
        found = [d for d in found if d.parent.name.startswith(f"x_{layer}-")]
    states = {directory: level_state(directory, store.files)[0] for directory in found}
    nbytes = sum(state.nbytes for state in states.values())
    damaged: dict[Path, Damage] = {}  # by path, since levels of one x_depth share intent.json
    if deep and crew is not None:
        crew.begin()
    with (report or Reporter()).task("hashing", nbytes // MB if deep else 0, "MB") as tick:
        for directory in found:
            held = store.files.share(directory / COMMIT)  # so that no removal looks like damage
            begun = deep and states[directory].state in ("partial", "absent")
            wrong = check_level(store.root, directory, deep=begun, files=store.files)
            whole = states[directory].state == "complete" and not any(d.belongs for d in wrong)
            if deep and held and whole:
                wrong += _hashed(store, directory, wrong, crew, tick)
            for damage in wrong:
                damaged[damage.path] = damaged.pop(damage.path, damage)
    beside, strange = ([], ()) if layer or not deep else beside_levels(store.root, store.files)
    unfinished = tuple(d for d, s in states.items() if s.state in ("partial", "absent"))
    places = (f"layer_{layer}", f"sweep_{layer}/*") if layer else ()
    of_run = tuple(run.damaged(*places)) if run else ()
    in_store = (*damaged.values(), *beside)
    return Findings(len(found), nbytes, unfinished, in_store, of_run, strange)


def _hashed(
    store: Store, directory: Path, wrong: Sequence[Damage], crew: cluster.Workers | None, tick: Tick
) -> Iterator[Damage]:
    """The damaged shards among those of the right size, by their hashes."""
    data, bad = store.files.read(directory / COMMIT), {damage.shard for damage in wrong}
    shards = commit_of(directory, store.files)[SHARDS]
    task = partial(hashing, StoreAddress.of(store), directory.absolute(), sha256(data))
    todo = [shard for shard in range(len(shards)) if shard not in bad]
    for shard, damage in zip(todo, in_order(crew, task, todo, HASH_THREADS), strict=True):
        tick(int(shards.sizes[shard]) // MB)
        if damage:
            yield replace(damage, path=directory / shards[shard]["key"], level=directory)


@contextmanager
def hashing(
    store: StoreAddress, directory: Path, commit: str
) -> Iterator[Callable[[int], Damage | None]]:
    """The task that checks the shards of a level by their hashes. Raises ClusterError: the commit
    that is here has another sha256 than the one that the command sees."""
    files = store.files
    found = ""
    with suppress(OSError):
        found = sha256(files.read(directory / COMMIT))
    if found != commit:
        raise ClusterError(f"{directory} is, here, not the level that the command sees")
    shards = commit_of(directory, files)[SHARDS]
    yield lambda shard: check_shard(directory, shards[shard], deep=True, files=files)


def repair(session: Session, findings: Findings) -> list[str]:
    """Mend what this run can make again: layers by solving them, or from the variant that they were
    taken from; levels by forgetting the damaged shards and writing what is missing, also of levels
    that are not finished, as an interrupted repair leaves them. From below upwards, because each
    depth is made from the one below. Damage of other runs' levels is left.

    Returns:
        One line for everything that was mended.
    """
    from strata.pipeline.materialize.images import ensure_images
    from strata.pipeline.run.weights import restore_initial
    from strata.pipeline.study.sweep import keep
    from strata.pipeline.train.algorithm import make
    from strata.pipeline.train.evaluation import evaluate

    run, store = session.run, session.store
    now = set(run.damaged())  # another process may have had the run since we looked
    findings = replace(findings, run=tuple(one for one in findings.run if one in now))
    aside = put_back(store.root, findings.damaged, store.files)
    lines = [
        f"moved {d.path} to {'quarantine' if d.path in aside else 'where it belongs'}"
        for d in findings.damaged
        if d.belongs
    ]
    for path in (d.path for d in findings.damaged if d.path.parent.name == "sources"):
        store.remove_file(path)
        lines.append(f"removed {path}, which is written again when it is needed")
    variants = {j: sweep_results.taken_from(run, j) for j in range(1, run.layers + 1)}
    again = _forget(run, findings.run)
    rundir.keep_network(run.directory, run.recipe)
    restore_initial(run, session.report, download=session.options.download)
    if run.data() is None:
        ensure_images(session)
    where = {d.level for d in findings.damaged} | set(findings.partial)
    where |= {d.belongs.directory(store.root) for d in findings.damaged if d.belongs}
    for depth in range(run.layers + 1):
        if depth in again:
            one = variants[depth]
            keep(session, depth, one) if one else make(session, solve=depth)
        lines += _mend_depth(session, depth, where)
    for network in probe_results.networks(run):
        own = replace(session, run=network)
        for depth in range(network.solved() + 1):
            lines += _mend_depth(own, depth, where)
    if run.evaluation() is None:
        with suppress(NotThereYet):
            evaluate(run, store)
    levels.refer_to(run, store)  # writes a note that is damaged again, if it is this run's
    return lines + [f"{_mended(path)} {path}" for path, _ in findings.run]


def _mended(path: Path) -> str:
    """What became of a damaged file of the run."""
    if path.parent.parent.name.startswith("sweep_"):
        return "removed with its variant, for `sweep` or `final` to solve again:"
    if path.parent.parent.name == BASELINE:
        return "removed, for `baseline` to train again:"
    of_probe = {NETWORK, TRANSFER} & set(path.parts) or "probe_" in path.parent.parent.name
    return "removed, for `probe` to make again:" if of_probe else "mended"


def _forget(run: Run, damaged: Sequence[tuple[Path, str]]) -> set[int]:
    """Remove damaged files of a run, so that what makes them finds them missing; returns the layers
    that must be solved again."""
    layers = set()
    for path, _ in damaged:
        number = path.parent.name.removeprefix("layer_")
        rests = run.directory in (path.parent, path.parent.parent)
        if not rests and path.name not in (RUN, DATA):  # nothing of the run rests on what is deeper
            shutil.rmtree(path.parent, ignore_errors=True)
        elif rests and number.isdigit() and path.name != FEATURES:
            layers.add(int(number))
        else:
            path.unlink(missing_ok=True)
    for j in layers:
        run.forget_layer(j)
    return layers


def _mend_depth(session: Session, depth: int, where: Collection[Path]) -> list[str]:
    """Forget what is damaged of x_depth, in those of the run's levels that lie in one of the
    directories, and write what is missing of them."""
    from strata.pipeline.materialize.images import ensure_images
    from strata.pipeline.materialize.materialize import write

    store, before, damaged = session.store, {}, {}
    waiting = patience(session.stop, session.report)
    keys = [k for k in levels.all_at(session.run, depth) if k.directory(store.root) in where]
    for key in keys:
        was, directory = _content_root(store, key), key.directory(store.root)
        lock = lock_path(store.root, depth, key.fingerprint)
        with store.files.lock(lock, key.label, waiting):
            damage = forget_damage(store.root, directory, store.files, waiting)
            names = [str(d.path).removeprefix(f"{directory}/") for d in damage]
        if not store.files.exists(directory / COMMIT):
            before[key], damaged[key] = was, names
    if depth == 0 and before:
        ensure_images(session)
    elif before:
        write(session, list(before))
    lines = []
    for key, was in before.items():
        names = ", ".join(damaged[key]) or "what was missing"
        values = OTHER_VALUES if was != _content_root(store, key) else SAME_VALUES
        lines.append(f"mended {key.label}: {names} ({values if was else NO_VALUES})")
    return lines


def _content_root(store: Store, key: LevelKey) -> str | None:
    try:
        return store.state(key).content_root
    except LevelDamaged:
        return None
