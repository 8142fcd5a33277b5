"""Write x_j: every level of it that is missing, from the nearest complete level below.

A line of four parts that work at the same time: rows are read ahead, this thread computes and
encodes them, and finished shards are hashed and published while the next ones are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from strata.pipeline.feed.features import features, nearest
from strata.pipeline.materialize.cluster import tasks
from strata.pipeline.materialize.forward import Computed
from strata.pipeline.materialize.level import Content, write_level
from strata.pipeline.recipe import augmentation
from strata.pipeline.run import device, levels, outcome
from strata.pipeline.run.rundir import FEATURES
from strata.pipeline.run.session import Session
from strata.store.errors import DiskFull
from strata.store.level.layout import Geometry, LevelKey
from strata.store.write.verify import Damage

SPARE_BYTES = 64 << 20
"""Kept free beyond what a level needs, for records and checkpoints."""


def materialize(session: Session, j: int, *, clean: bool = False) -> None:
    """Write what is missing of x_j.

    Args:
        clean: of the levels of the un-augmented images alone.

    Raises:
        DiskFull: before writing anything if it cannot fit; later, with every finished shard kept.
        NotFinite: a feature does not fit the stored precision.
        KeyboardInterrupt: somebody asked to stop; finished shards are kept.
    """
    if augmentation.mode(session.run.recipe) == "fresh" and not clean:
        session.report.say(f"x_{j}: fresh draws are not cached; only the test images are written")
    missing = levels.missing_at(session.run, session.store, j, clean=clean)
    _check_space(session, j, missing)
    write(session, missing)


def write(
    session: Session,
    keys: Sequence[LevelKey],
    damaged: Mapping[LevelKey, Sequence[Damage]] | None = None,
) -> None:
    """Write levels of one x_j, and keep a record of them.

    Args:
        damaged: of levels that are committed, the files to write again.
    """
    written, base = {}, _base(session, keys[0]) if keys else 0
    for key in keys:
        shape = levels.geometry_at(session.store, key)
        shape = shape or session.geometry(key.depth, key.split)
        content = partial(_content, session, key, shape)
        if done := write_level(session, key, shape, content, (damaged or {}).get(key, ())):
            written[key.name] = done
    if written:
        _record(session, keys, written, base)


def _base(session: Session, key: LevelKey) -> int:
    """Depth of what a level is computed from."""
    return nearest(session, key.depth - 1, key.split, clean=key.view == "clean")


def _check_space(session: Session, j: int, missing: list[LevelKey]) -> None:
    needed = -sum(session.store.state(key).nbytes for key in missing)
    needed += sum(session.geometry(j, key.split).nbytes for key in missing)
    free = session.store.free_bytes()
    if missing and free is not None and needed + SPARE_BYTES > free:
        error = DiskFull(f"x_{j} in {session.store.root}", needed + SPARE_BYTES, free)
        error.add_note(
            "Make space, choose another --store, or lower 'cache.precision' or 'augment.views'"
        )
        raise error


def _content(session: Session, key: LevelKey, shape: Geometry) -> Content:
    """What goes into a level of x_j, computed from the nearest level below."""
    source = features(session, key.depth, key.split, clean=key.view == "clean")
    computed = Computed.of(session, key, shape, source)
    base = source.levels[computed.view]
    parent = levels.parent_of(base.key, base.content_root)
    arrays = {name: t.cpu().numpy() for name, t in source.layers[-1].stored.tensors().items()}
    told = partial(tasks.features, session, base)
    return Content("forward pass", computed.shards, parent, arrays, device.versions(), told)


def _record(
    session: Session, keys: Sequence[LevelKey], written: dict[str, dict[str, Any]], base: int
) -> None:
    """Keep which x_j was written, with bytes and seconds, beside its levels written before."""
    j = keys[0].depth
    done = [key for key in keys if key.name in written]
    measured = outcome.figures(
        sum(level["seconds"] for level in written.values()),
        sum(level["bytes"] for level in written.values()),
        max(level["peak_bytes"] for level in written.values()),
    )
    expected = outcome.of_writing(session, done, base)
    whole = all(level["whole"] for level in written.values())
    fingerprint = session.run.nodes()[j].fingerprint
    before = session.run.features(j)
    known = before["levels"] if before and before["fingerprint"] == fingerprint else {}
    body = {
        "fingerprint": fingerprint,
        "levels": {**known, **written},
        "outcome": outcome.kept(session, expected, measured, whole=whole),
    }
    session.run.write(session.run.layer_directory(j) / FEATURES, body)
