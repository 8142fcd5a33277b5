"""Write x_j: every level of it that is missing, from the nearest complete level below.

A line of four parts that work at the same time: rows are read ahead, this thread computes and
encodes them, and finished shards are hashed and published while the next ones are made.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from strata.pipeline.feed.features import features, nearest
from strata.pipeline.materialize.cluster import tasks
from strata.pipeline.materialize.forward import FeatureShards
from strata.pipeline.materialize.level import locked_writer, write_level
from strata.pipeline.recipe import augmentation
from strata.pipeline.run import device, levels, outcome
from strata.pipeline.run.rundir import FEATURES
from strata.pipeline.run.session import Session
from strata.store.errors import DiskFull
from strata.store.level.layout import LevelKey
from strata.store.write.mandate import Mandate
from strata.store.write.verify import Damage
from strata.store.write.writer import LevelWriter

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
    if not keys:
        return
    written, depth = {}, keys[0].depth
    base = nearest(session, depth - 1, keys[0].split, clean=keys[0].view == "clean")
    for key in keys:
        begun = time.monotonic()
        shape = levels.geometry_at(session.store, key) or session.geometry(depth, key.split)
        with locked_writer(session, key, shape, (damaged or {}).get(key, ())) as writer:
            if writer is not None:
                written[key.name] = _write(session, writer, begun)
    if written:
        _record(session, keys, written, base)


def _write(session: Session, writer: LevelWriter, begun: float) -> dict[str, Any]:
    """Write a level that is locked and begun, from the nearest level below, which is only now known
    to stay."""
    key = writer.key
    source = features(session, key.depth, key.split, clean=key.view == "clean")
    rows = FeatureShards(session, key, writer.geometry, source)
    base = source.levels[rows.view]
    return write_level(
        session,
        writer,
        rows,
        tasks.features(session, base, Mandate.of(writer)) if session.crew else None,
        begun,
        parent=levels.parent_of(base.key, base.content_root),
        arrays={n: t.cpu().numpy() for n, t in source.layers[-1].stored.tensors().items()},
        tool=device.versions(),
    )


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
