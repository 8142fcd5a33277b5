"""Write x_j: every level of it that is missing, from the nearest complete level below.

Shard by shard, so memory is bounded by one shard and a killed process loses one shard.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from pipeline import device, ingest, levels, views
from pipeline.progress import Tick, duration, size
from pipeline.rundir import FEATURES
from pipeline.session import Session
from pipeline.source import Features, features, level_draws, naming_rows
from pipeline.views import Draws
from store.errors import DiskFull
from store.layout import Geometry, LevelKey, geometry
from store.writer import LevelWriter

SPARE_BYTES = 64 << 20
"""Kept free beyond what a level needs, for records and checkpoints."""


def level_geometry(session: Session, j: int, split: str) -> Geometry:
    """Rows, shape and shards of a level of x_j."""
    recipe, data = session.run.recipe, session.run.data()
    assert data is not None
    sample = recipe.shape(j, views.cached_size(recipe))
    return geometry(data[split], sample, recipe.cache.precision, recipe.cache.shard_mb << 20)


def materialize(session: Session, j: int) -> None:
    """Write what is missing of x_j.

    Raises:
        DiskFull: before writing anything if it cannot fit; later, with every finished shard kept.
        NotFinite: a feature does not fit the stored precision.
        KeyboardInterrupt: somebody asked to stop; finished shards are kept.
    """
    if views.mode(session.run.recipe) == "fresh":
        session.report.say(f"x_{j}: fresh draws are not cached; only the test images are written")
    missing = levels.missing_at(session.run, session.store, j)
    for key in missing:
        if levels.state_of(session.store, key).state == "stale":
            session.store.remove_level(key)
    _check_space(session, j, missing)
    written = {}
    for key in missing:
        written[key.name] = _write_level(session, key)
    _record(session, j, written)


def _check_space(session: Session, j: int, missing: list[LevelKey]) -> None:
    needed = -sum(session.store.state(key).nbytes for key in missing)
    needed += sum(level_geometry(session, j, key.split).nbytes for key in missing)
    free = session.store.free_bytes()
    if missing and needed + SPARE_BYTES > free:
        error = DiskFull(f"x_{j} in {session.store.root}", needed + SPARE_BYTES, free)
        error.add_note(
            "Make space, choose another --store, or lower 'cache.precision' or 'augment.views'"
        )
        raise error


def _write_level(session: Session, key: LevelKey) -> dict[str, float]:
    """Compute and publish the missing shards of one level, then commit it."""
    begun = time.monotonic()
    shape = level_geometry(session, key.depth, key.split)
    source = features(session, key.depth, key.split)
    images = ingest.levels(session)[key.split]
    ids = images.array("sample_id")
    draws = level_draws(session.run.recipe, session.run.seed, key.view, int(ids.max()) + 1)
    writer = session.store.writer(key, shape, session.run.nodes()[key.depth].intent)
    base = source.levels["clean" if source.base == 0 else key.view]
    parent = levels.parent_of(base.key, base.content_root)
    with writer.locked():
        todo = writer.missing()
        rows = sum(b - a for a, b in map(shape.shard_range, todo))
        with session.report.task(f"writing {key.label}", rows, "images") as tick:
            nbytes = sum(_write_shard(session, writer, source, s, ids, draws, tick) for s in todo)
        arrays = {n: t.cpu().numpy() for n, t in source.layers[-1].stored.tensors().items()}
        level = writer.commit(parent, arrays, tool=device.versions())
    seconds = time.monotonic() - begun
    session.report.say(
        f"wrote {key.label}: {len(level):,} rows, {size(shape.nbytes)}, {duration(seconds)}, "
        f"{rows / seconds:,.0f} images/s, {size(nbytes / seconds)}/s"
    )
    return {"rows": len(level), "bytes": shape.nbytes, "seconds": seconds}


def _write_shard(
    session: Session,
    writer: LevelWriter,
    source: Features,
    shard: int,
    ids: np.ndarray,
    draws: Draws,
    tick: Tick,
) -> int:
    session.stop.check()
    first, last = writer.geometry.shard_range(shard)
    block = session.run.recipe.cache.block
    out = np.empty((last - first, *writer.geometry.stored), writer.geometry.dtype)
    for begin in range(first, last, block):
        rows = np.arange(begin, min(last, begin + block))
        with naming_rows(writer.key.label, writer.key.split, rows, ids):
            x = source.compute_from(source.read(rows, writer.key.view), draws.of(ids[rows]))
        stored = source.layers[-1].stored.encode(x)
        torch.from_numpy(out)[begin - first : rows[-1] + 1 - first] = stored.cpu()
        tick(len(rows))
    return writer.put(shard, out)


def _record(session: Session, j: int, written: dict[str, dict[str, float]]) -> None:
    """Keep which x_j was written, with bytes and seconds, beside its levels written before."""
    fingerprint = session.run.nodes()[j].fingerprint
    before = session.run.features(j)
    known = before["levels"] if before and before["fingerprint"] == fingerprint else {}
    if written:
        body = {"fingerprint": fingerprint, "levels": {**known, **written}}
        session.run.write(session.run.layer_directory(j) / FEATURES, body)
