"""Write x_j: every level of it that is missing, from the nearest complete level below.

A line of four parts that work at the same time: rows are read ahead, this thread computes and
encodes them, and finished shards are hashed and published while the next ones are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import device, ingest, levels, outcome, stores, views
from pipeline.line import Line
from pipeline.ring import Ring
from pipeline.rundir import FEATURES
from pipeline.session import Session
from pipeline.source import Features, features, level_draws, naming_rows, nearest
from pipeline.transfer import host_memory
from pipeline.views import Draws
from pipeline.writing import Content, Shards, write_level
from stages.memory import watched
from store.errors import DiskFull
from store.layout import Geometry, LevelKey, geometry
from store.verify import Damage
from store.writer import PUBLISHERS

SPARE_BYTES = 64 << 20
"""Kept free beyond what a level needs, for records and checkpoints."""


def level_geometry(session: Session, j: int, split: str) -> Geometry:
    """Rows, shape and shards of a level of x_j that is to be written."""
    recipe, data = session.run.recipe, session.run.data()
    assert data is not None
    sample = recipe.shape(j, views.cached_size(recipe))
    return geometry(
        data[split],
        sample,
        recipe.cache.precision,
        recipe.cache.shard_mb << 20,
        _profile(session, j),
    )


def _profile(session: Session, j: int) -> str:
    """The recipe's; where that is left open, that of the levels there are, or what was chosen."""
    run, store = session.run, session.store
    if run.recipe.cache.profile != "auto" and not store.remote:
        return run.recipe.cache.profile
    there = levels.profile_at(run, store, j) or session.profiles.get(j)
    return there or stores.default_profile(store, run)


def materialize(session: Session, j: int, *, clean: bool = False) -> None:
    """Write what is missing of x_j.

    Args:
        clean: of the levels of the un-augmented images alone.

    Raises:
        DiskFull: before writing anything if it cannot fit; later, with every finished shard kept.
        NotFinite: a feature does not fit the stored precision.
        KeyboardInterrupt: somebody asked to stop; finished shards are kept.
    """
    if views.mode(session.run.recipe) == "fresh" and not clean:
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
        shape = shape or level_geometry(session, key.depth, key.split)
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
    needed += sum(level_geometry(session, j, key.split).nbytes for key in missing)
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
    view = "clean" if source.base == 0 else key.view
    base = source.levels[view]
    shards = partial(_shards, session, key, shape, source, view)
    parent = levels.parent_of(base.key, base.content_root)
    arrays = {name: t.cpu().numpy() for name, t in source.layers[-1].stored.tensors().items()}
    return Content("forward pass", shards, parent, arrays, device.versions())


def _shards(
    session: Session,
    key: LevelKey,
    shape: Geometry,
    source: Features,
    view: str,
    todo: Sequence[int],
    line: Line,
) -> Shards:
    """Stored elements of each shard. Their memory is used again once they are published."""
    ids = ingest.levels(session)[key.split].array("sample_id")
    draws = level_draws(session.run.recipe, session.run.seed, key.view, int(ids.max()) + 1)
    blocks = [_blocks(shape, shard, session.run.recipe.cache.block) for shard in todo]
    memory = host_memory(session.device)
    ring = Ring(shape.shard_rows * shape.row_bytes, PUBLISHERS + 1, memory)
    with source.delivery([view], once=True) as delivery:
        coming = line.reading(delivery.batches([part for parts in blocks for part in parts]))
        for shard, parts in zip(todo, blocks, strict=True):
            first, last = shape.shard_range(shard)
            whole = ring.take()[: (last - first) * shape.row_bytes]
            out = whole.view(shape.dtype).reshape(-1, *shape.stored)
            del whole
            for part, stored in zip(parts, coming, strict=False):
                with naming_rows(key.label, key.split, part, ids):
                    x = _encoded(session, source, stored, draws.of(ids[part]), line)
                rows = torch.from_numpy(out[part[0] - first : part[-1] + 1 - first])
                rows.copy_(x, non_blocking=True)
                line.tick(len(part))
            device.finish(session.device)
            yield shard, out
            del out, rows


def _encoded(
    session: Session, source: Features, stored: Tensor, draws: Draws, line: Line
) -> Tensor:
    """One block of a level; of the first, which is as large as any, tensors are counted."""
    if line.peak_bytes:
        return source.encoded(stored, draws)
    frozen = [p for layer in source.layers for p in layer.layer.parameters()]
    with watched(session.device, frozen) as peak:
        x = source.encoded(stored, draws)
    line.peak_bytes = peak.nbytes
    return x


def _blocks(shape: Geometry, shard: int, block: int) -> list[np.ndarray]:
    first, last = shape.shard_range(shard)
    return [np.arange(at, min(last, at + block)) for at in range(first, last, block)]


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
