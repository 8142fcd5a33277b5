"""Check every file of a store and of a run, and mend what is damaged by computing it again."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strata.pipeline.commands.storage import level_state
from strata.pipeline.progress import Reporter, Tick
from strata.pipeline.run import levels, network_record, probe_results, sweep_results
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.probe_results import NETWORK, TRANSFER
from strata.pipeline.run.rundir import BASELINE, DATA, FEATURES, RUN, Run
from strata.store.errors import LevelDamaged
from strata.store.feature_store import Store
from strata.store.level.layout import LevelKey
from strata.store.level.level import COMMIT
from strata.store.write.verify import Damage, Hashing, check_level, level_directories, put_back

if TYPE_CHECKING:
    from strata.pipeline.materialize.cluster.cluster import Workers
    from strata.pipeline.run.session import Session

MB = 10**6


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

    @property
    def count(self) -> int:
        return len(self.damaged) + len(self.run)

    def directories(self, root: Path) -> set[Path]:
        """Of the levels that are damaged, not finished, or not where they belong."""
        belong = {d.belongs.directory(root) for d in self.damaged if d.belongs}
        return {d.level for d in self.damaged} | belong | set(self.partial)

    @property
    def error(self) -> LevelDamaged | None:
        """What to end a verification with."""
        if not self.count:
            return None
        return LevelDamaged(
            "1 file is damaged" if self.count == 1 else f"{self.count} files are damaged"
        )

    def as_json(self) -> dict[str, Any]:
        files = [(d.path, d.what) for d in self.damaged] + list(self.run)
        return {
            "levels": self.levels,
            "bytes": self.nbytes,
            "partial": [f"{path.parent.name}/{path.name}" for path in self.partial],
            "damaged": [{"path": str(path), "what": what} for path, what in files],
        }


def verify(
    overview: Overview,
    *,
    deep: bool,
    layer: int | None = None,
    report: Reporter | None = None,
    crew: Workers | None = None,
) -> Findings:
    """Check every level of the store, and the records and weights of the run.

    Args:
        deep: every byte of every shard, not only its size.
        layer: only x_layer, and only that layer's weights.
        crew: workers that hash the shards of a ``deep`` check; None: this process.

    Raises:
        ClusterError: there are no workers, or they do not see the store.
        LayerRange: the network has no such layer.
    """
    if layer:
        overview.check_layer(layer)
    root, files, run = overview.store.root, overview.store.files, overview.run
    found = [d for d in level_directories(root, files) if layer is None or _depth(d) == layer]
    states = {directory: level_state(directory, files)[0] for directory in found}
    nbytes = sum(state.nbytes for state in states.values())
    damaged: list[Damage] = []
    if deep and crew is not None:
        crew.begin()
    with (report or Reporter()).task("hashing", nbytes // MB if deep else 0, "MB") as tick:
        how: Any = {"deep": deep, "files": files, "tick": lambda done: tick(done // MB)}
        how["hashing"] = _hashing(crew if deep else None, overview.store, tick)
        for directory in found:
            damaged += check_level(root, directory, **how)
    partial = [d for d, s in states.items() if s.state in ("partial", "absent")]
    return Findings(
        len(found), nbytes, tuple(partial), _once(damaged), _run_damage(run, layer) if run else ()
    )


def _hashing(crew: Workers | None, store: Store, tick: Tick) -> Hashing | None:
    """Workers, where there are any."""
    if crew is None:
        return None
    from strata.pipeline.materialize.cluster.checks import hashing

    return hashing(crew, store, lambda done: tick(done // MB))


def _depth(directory: Path) -> int:
    return int(directory.parent.name.removeprefix("x_").partition("-")[0])


def _once(damaged: Sequence[Damage]) -> tuple[Damage, ...]:
    """Levels of one x_depth share ``intent.json``: name it once."""
    return tuple({damage.path: damage for damage in reversed(damaged)}.values())[::-1]


def _run_damage(run: Run, layer: int | None) -> tuple[tuple[Path, str], ...]:
    layers = range(1, run.layers + 1) if layer is None else [layer]
    found = list(run.damaged_records()) if layer is None else []
    for j in layers:
        found += [*run.damaged_files(j), *sweep_results.damaged(run, j)]
    if layer is None:
        found += sweep_results.damaged(run, run.layers + 1)
    for inside in probe_results.replicas(run) if layer is None else ():
        found += inside.damaged_records()
        found += [damage for j in layers for damage in inside.damaged_files(j)]
    return tuple(found)


# ---- repair -------------------------------------------------------------------------------------


def repair(session: Session, findings: Findings) -> list[str]:
    """Mend what this run can make again: layers by solving them, or from the variant that they were
    taken from; levels by computing the damaged shards, and those of levels that are not finished,
    as an interrupted repair leaves them. From below upwards, because each depth is made from the
    one below. Damage of other runs' levels is left.

    Returns:
        One line for everything that was mended.
    """
    from strata.pipeline.materialize.images import ensure_images
    from strata.pipeline.study.keep import keep
    from strata.pipeline.train.algorithm import make
    from strata.pipeline.train.evaluation import evaluate

    run, store = session.run, session.store
    aside = put_back(store.root, findings.damaged, store.files)
    lines = [
        f"moved {d.path} to {'quarantine' if d.path in aside else 'where it belongs'}"
        for d in findings.damaged
        if d.belongs
    ]
    variants = {j: sweep_results.taken_from(run, j) for j in range(1, run.layers + 1)}
    again = _forget(run, findings.run)
    network_record.keep(run.directory, run.recipe)
    if run.data() is None:
        ensure_images(session)
    for depth in range(run.layers + 1):
        if depth in again:
            one = variants[depth]
            keep(session, depth, one) if one else make(session, solve=depth)
        lines += _mend_depth(session, depth, findings.directories(store.root))
    for network in probe_results.networks(run):
        own = dataclasses.replace(session, run=network.run)
        for depth in range(network.solved + 1):
            lines += _mend_depth(own, depth, findings.directories(store.root))
    if run.evaluation() is None and run.solved():
        evaluate(run, store)
    return lines + [f"{_mended(path)} {path}" for path, _ in findings.run]


def _mended(path: Path) -> str:
    if path.parent.parent.name.startswith("sweep_"):
        return "removed with its variant, for `sweep` or `final` to solve again:"
    if path.parent.parent.name == BASELINE:
        return "removed, for `baseline` to train again:"
    of_probe = {NETWORK, TRANSFER} & set(path.parts) or "probe_" in path.parent.parent.name
    return "removed, for `probe` to make again:" if of_probe else "mended"


def _forget(run: Run, damaged: Sequence[tuple[Path, str]]) -> list[int]:
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
    return sorted(layers)


def _mend_depth(session: Session, depth: int, where: Collection[Path]) -> list[str]:
    """Write again what is damaged or missing of x_depth, in those of the run's levels that lie in
    one of the directories."""
    from strata.pipeline.materialize.images import ensure_images
    from strata.pipeline.materialize.materialize import write

    store, lines = session.store, []
    keys = [k for k in levels.all_at(session.run, depth) if k.directory(store.root) in where]
    how: Any = {"deep": True, "files": store.files}
    damaged = {key: check_level(store.root, key.directory(store.root), **how) for key in keys}
    roots = {key: _root(store, key) for key in keys if damaged[key] or not _committed(store, key)}
    if not roots:
        return []
    if depth == 0:
        ensure_images(session, damaged)
    else:
        write(session, list(roots), damaged)
    for key, root in roots.items():
        names = ", ".join(damage.path.name for damage in damaged[key]) or "what was missing"
        lines.append(f"mended {key.label}: {names} ({_compared(root, _root(store, key))})")
    return lines


def _committed(store: Store, key: LevelKey) -> bool:
    return store.files.exists(key.directory(store.root) / COMMIT)


def _compared(before: str | None, after: str | None) -> str:
    if before is None:
        return "its commit was lost, so there is nothing to compare with"
    if before == after:
        return "the same values as before"
    return "with OTHER values than before, for example of another device: levels above are stale"


def _root(store: Store, key: LevelKey) -> str | None:
    try:
        return store.state(key).content_root
    except LevelDamaged:
        return None
