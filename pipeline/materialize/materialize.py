"""Write x_j: every level of it that is missing, from the nearest complete level below.

A line of four parts that work at the same time: rows are read ahead, this thread computes and
encodes them, and finished shards are hashed and published while the next ones are made.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.feed.buffers import Ring, host_memory
from strata.pipeline.feed.features import Features, features, level_draws, naming_rows, nearest
from strata.pipeline.materialize.cluster import tasks
from strata.pipeline.materialize.level import ComputeLock, ShardRows, locked_writer, write_level
from strata.pipeline.materialize.timing import Timing
from strata.pipeline.recipe import augmentation
from strata.pipeline.run import device, levels, outcome, record
from strata.pipeline.run.rundir import FEATURES
from strata.pipeline.run.session import Session
from strata.stages.memory import watched
from strata.store.errors import DiskFull
from strata.store.level.layout import Geometry, LevelKey
from strata.store.read.rows import Rows
from strata.store.write.mandate import Mandate
from strata.store.write.verify import Damage
from strata.store.write.writer import PUBLISHERS, LevelWriter

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
    record.write(session.run.layer_directory(j) / FEATURES, body)


class FeatureShards:
    """The rows of a level of x_j."""

    work = "forward pass"

    def __init__(self, session: Session, key: LevelKey, shape: Geometry, source: Features) -> None:
        self.session, self.key, self.shape, self.source = session, key, shape, source
        self.view = "clean" if source.base == 0 else key.view
        """View of the level that is read."""
        self._ids = session.images()[key.split].array("sample_id")
        samples = int(self._ids.max()) + 1
        self._draws = level_draws(session.run.recipe, session.run.seed, key.view, samples)

    def shards(self, todo: Sequence[int], timing: Timing, lock: ComputeLock) -> ShardRows:
        """Stored elements of each shard; see ``level.ShardSource``. Their memory is used again once
        they are published."""
        shape, session, block = self.shape, self.session, self.session.run.recipe.cache.block
        blocks = [
            [np.arange(at, min(last, at + block)) for at in range(first, last, block)]
            for first, last in map(shape.shard_range, todo)
        ]
        memory = host_memory(session.device)
        ring = Ring(shape.shard_rows * shape.row_bytes, PUBLISHERS + 1, memory)
        with self.source.delivery([self.view], once=True) as delivery:
            every = [part for parts in blocks for part in parts]
            rows = Rows.of(np.concatenate([*every, np.arange(0)]))
            coming = timing.reading(delivery.batches(rows, [len(part) for part in every]))
            for shard, parts in zip(todo, blocks, strict=True):
                first, last = shape.shard_range(shard)
                whole = ring.take()[: (last - first) * shape.row_bytes]
                out = whole.view(shape.dtype).reshape(-1, *shape.stored)
                del whole
                here = chain([next(coming)], coming)
                with lock:
                    for part, stored in zip(parts, here, strict=False):
                        target = out[part[0] - first : part[-1] + 1 - first]
                        self._fill(target, part, stored, timing)
                        del target
                    device.finish(session.device)
                yield shard, out
                del out

    def _fill(self, out: np.ndarray, part: np.ndarray, stored: Tensor, timing: Timing) -> None:
        """Compute one block of a shard; on a GPU only begin to. Of the first block, which is as
        large as any, tensors are counted."""
        draws, layers = self._draws.of(self._ids[part]), self.source.layers
        with naming_rows(self.key.label, self.key.split, part, self._ids):
            if timing.peak_bytes:
                x = self.source.encoded(stored, draws)
            else:
                frozen = [weight for layer in layers for weight in layer.layer.parameters()]
                with watched(self.session.device, frozen) as peak:
                    x = self.source.encoded(stored, draws)
                timing.peak_bytes = peak.nbytes
        torch.from_numpy(out).copy_(x, non_blocking=True)
        timing.tick(len(part))
