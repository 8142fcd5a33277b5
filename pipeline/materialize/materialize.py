"""Write x_j: every level of it that is missing, from the nearest complete level below.

A line of four parts that work at the same time: rows are read ahead, this thread computes and
encodes them, and finished shards are hashed and published while the next ones are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from strata.pipeline.errors import ClusterError
from strata.pipeline.feed.buffers import Ring, host_memory
from strata.pipeline.feed.features import Features, features, level_draws, naming_rows, nearest
from strata.pipeline.materialize.level import (
    RunAddress,
    ShardRows,
    locked_writer,
    publishing,
    write_level,
)
from strata.pipeline.materialize.timing import Done, Timing
from strata.pipeline.recipe import augmentation
from strata.pipeline.run import device as devices
from strata.pipeline.run import levels, outcome, record
from strata.pipeline.run.rundir import FEATURES, Run
from strata.pipeline.run.session import Session
from strata.stages.memory import watched
from strata.store.errors import DiskFull
from strata.store.level.layout import Geometry, LevelKey
from strata.store.read.rows import Rows
from strata.store.write.writer import PUBLISHERS

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


def write(session: Session, keys: Sequence[LevelKey]) -> None:
    """Write what is missing of levels of one x_j, and keep a record of them."""
    if not keys:
        return
    written, depth, crew = {}, keys[0].depth, session.crew
    base = nearest(session, depth - 1, keys[0].split, clean=keys[0].view == "clean")
    for key in keys:
        with locked_writer(session, key, session.geometry(depth, key.split)) as writer:
            if writer is None:
                continue
            # The level below is looked for again: only now it is known to stay.
            source = features(session, depth, key.split, clean=key.view == "clean")
            rows = FeatureShards(session, key, writer.geometry, source)
            below = levels.parent_of(rows.level.key, rows.level.content_root)
            weights = _layer_digests(session.run, source.base, depth)
            made_from = source.base, below, weights, crew.device if crew else "cpu"
            address = RunAddress.of(session)
            task = partial(feature_shards, address, key, writer.geometry, *made_from)
            scales = source.layers[-1].stored.tensors().items()
            images = session.images()[key.split]
            arrays = {name: images.array(name) for name in ("label", "sample_id")}
            arrays |= {name: t.cpu().numpy() for name, t in scales}
            commit = {"parent": below, "arrays": arrays, "tool": devices.versions()}
            written[key.name] = write_level(session, writer, rows, task, **commit)
            del source, rows  # its layers, before those of the next level are read
    if written:
        _record(session, keys, written, base)


@contextmanager
def feature_shards(
    address: RunAddress,
    key: LevelKey,
    shape: Geometry,
    depth: int,
    base: dict[str, Any],
    weights: tuple[str, ...],
    device: str,
) -> Iterator[Callable[[int], Done]]:
    """The task of workers that publish shards of a level of x_j.

    Args:
        depth, base: of the level to read: its depth, and what a commit says of it.
        weights: digests of the layers in between, lowest first.
        device: as the command was told.

    Raises:
        ClusterError: layers or level below are not those that the command knows.
    """
    from strata.pipeline.materialize.cluster.worker import this_worker

    (run, writer), chosen = address.begun(key, shape), this_worker().device(device)
    if _layer_digests(run, depth, key.depth) != weights:
        raise ClusterError(f"the layers in {address.run} have, here, other weights")
    devices.check(run.compute, chosen)
    session = Session(run, address.store.open(), chosen)
    source = features(session, key.depth, key.split, base=depth, clean=key.view == "clean")
    rows = FeatureShards(session, key, shape, source)
    if levels.parent_of(rows.level.key, rows.level.content_root) != base:
        label = rows.level.key.label
        raise ClusterError(f"{label} has, here, other values than the command knows")
    yield publishing(writer, rows)


def _layer_digests(run: Run, base: int, depth: int) -> tuple[str, ...]:
    """Digests of the weights of the layers between x_base and x_depth, lowest first."""
    records = (run.layer(j) for j in range(base + 1, depth + 1))
    return tuple(record["weights"] for record in records if record is not None)


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
        self._view = "clean" if source.base == 0 else key.view
        self.level = source.levels[self._view]
        """The level that is read."""
        self._ids = session.images()[key.split].array("sample_id")
        samples = int(self._ids.max()) + 1
        self._draws = level_draws(session.run.recipe, session.run.seed, key.view, samples)

    def shards(self, todo: Sequence[int], timing: Timing) -> ShardRows:
        """Stored elements of each shard; see ``level.ShardSource``. Their memory is used again once
        they are published."""
        shape, session, block = self.shape, self.session, self.session.run.recipe.cache.block
        blocks = [
            [np.arange(at, min(last, at + block)) for at in range(first, last, block)]
            for first, last in map(shape.shard_range, todo)
        ]
        memory = host_memory(session.device)
        ring = Ring(shape.shard_rows * shape.row_bytes, PUBLISHERS + 1, memory)
        with self.source.delivery([self._view], once=True) as delivery:
            every = [part for parts in blocks for part in parts]
            rows = Rows.of(np.concatenate([*every, np.arange(0)]))
            coming = timing.reading(delivery.batches(rows, [len(part) for part in every]))
            for shard, parts in zip(todo, blocks, strict=True):
                first, last = shape.shard_range(shard)
                whole = ring.take()[: (last - first) * shape.row_bytes]
                out = whole.view(shape.dtype).reshape(-1, *shape.lying)
                out = np.moveaxis(out, -1, shape.axis)
                del whole
                here = chain([next(coming)], coming)
                with timing.computing():
                    for part, stored in zip(parts, here, strict=False):
                        naming = naming_rows(self.key.label, self.key.split, part, self._ids)
                        with naming, self._counting(timing):
                            draws = self._draws.of(self._ids[part])
                            x = self.source.values(stored, draws, encode=True)
                        target = out[part[0] - first : part[-1] + 1 - first]
                        torch.from_numpy(target).copy_(x, non_blocking=True)
                        timing.tick(len(part))
                        del target, x
                    devices.finish(session.device)
                yield shard, out
                del out

    @contextmanager
    def _counting(self, timing: Timing) -> Iterator[None]:
        """Count the tensors of the first block, which is as large as any."""
        if timing.peak_bytes:
            yield
            return
        frozen = [weight for layer in self.source.layers for weight in layer.layer.parameters()]
        with watched(self.session.device, frozen) as peak:
            yield
        timing.peak_bytes = peak.nbytes
