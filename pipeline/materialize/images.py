"""Images → x_0: surveyed once, resized, written in a seeded random order of rows.

Row i is the same sample in every level above. Random rows mean that even a sequential read of a
level is a shuffled one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strata.pipeline.errors import RunConflict, remedy
from strata.pipeline.materialize.cluster import tasks
from strata.pipeline.materialize.cluster.checks import examined
from strata.pipeline.materialize.level import ComputeLock, ShardRows, locked_writer, write_level
from strata.pipeline.materialize.timing import Timing
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import record
from strata.pipeline.run.levels import geometry_at, have_images, stamp
from strata.pipeline.run.rundir import DATA
from strata.pipeline.run.session import READ_THREADS, Session
from strata.stages.data.images import (
    SPLITS,
    Source,
    check_labels,
    examine,
    open_source,
    pixels,
    spans,
    survey,
)
from strata.stages.errors import DataError
from strata.store.errors import LevelDamaged
from strata.store.files.publish import make_directory, replace, sealed, unseal
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import Geometry, LevelKey, geometry
from strata.store.parallel import map_in_threads
from strata.store.read.order import generator
from strata.store.write.mandate import Mandate
from strata.store.write.verify import Damage

NAMED_BROKEN = 20
"""Broken images kept by name in data.json; all are counted."""


def ensure_images(
    session: Session, damaged: Mapping[LevelKey, Sequence[Damage]] | None = None
) -> None:
    """Make x_0 complete, or find that it is.

    Args:
        damaged: files of committed levels to write again.

    Raises:
        DataError: the images or labels cannot be used; names the first that is at fault.
        RunConflict: the images are not those that the run was made from.
    """
    known = session.run.data()
    if not damaged and have_images(session.run, session.store):
        return
    with open_source(
        session.run.source, root=session.data_root, download=session.download
    ) as source:
        check_labels(source, session.run.recipe.data.classes)
        found = _survey(session, source)
        if known is not None and found["digest"] != known["digest"]:
            raise RunConflict(
                f"the images of {session.run.source} are not those {session.run.directory} was "
                f"made from (digest {known['digest'][:12]}, now {found['digest'][:12]}). Restore "
                "them, or choose another directory with --run"
            )
        facts = {k: v for k, v in found.items() if k != "kept"}
        record.write(session.run.directory / DATA, facts)
        for split in SPLITS:
            again = (damaged or {}).get(session.key(0, split, "clean"), ())
            _write_split(session, source, split, found, again)


def _survey(session: Session, source: Source) -> dict[str, Any]:
    """Digest, counts and good samples of a source, remembered while it is unchanged."""
    signature, store = source.signature(), session.store
    memo = _memo(session, signature)
    with suppress(FileNotFoundError, LevelDamaged):
        remembered = unseal(memo, store.files)
        if not remembered["broken_count"] or session.skip_broken:
            return remembered
    found = _read_all(session, source, signature) | {
        "signature": signature,
        "stamp": stamp(session.run.source),
    }
    make_directory(memo.parent, store.files)
    replace(memo.parent, memo.name, sealed(found), store.files)
    return found


def _memo(session: Session, signature: str) -> Path:
    """The file that remembers a survey."""
    name = fingerprint([session.run.source, signature])[:12]
    return session.store.root / "sources" / f"{name}.json"


def _read_all(session: Session, source: Source, signature: str) -> dict[str, Any]:
    total = sum(source.count(split) for split in SPLITS)
    if session.crew is not None:
        session.crew.begin()
        task = tasks.SurveyTask(tasks.RunAddress.of(session), signature)
        findings = examined(session.crew, source, task)
    else:
        findings = map_in_threads(
            lambda span: examine(source, *span), spans(source), READ_THREADS, waiting=READ_THREADS
        )
    advice = "Mend or remove them, or pass --skip-broken to leave them out"
    with session.report.task("reading images", total, "images") as tick, remedy(DataError, advice):

        def done(images: int) -> None:
            session.stop.check()
            tick(images)

        skip = session.skip_broken
        result = survey(source, skip_broken=skip, tick=done, examined=findings)
    if result.broken:
        session.report.say(
            f"left out {len(result.broken)} broken images, the first: {result.broken[0].name}"
        )
    return {
        "source": session.run.source,
        "digest": result.digest,
        "classes": list(source.classes),
        "train": len(result.kept["train"]),
        "test": len(result.kept["test"]),
        "kept": {split: result.kept[split].tolist() for split in SPLITS},
        "broken": [f"{b.name}: {b.reason}" for b in result.broken[:NAMED_BROKEN]],
        "broken_count": len(result.broken),
    }


@dataclass(frozen=True)
class ImageShards:
    """The rows of x_0 of one split, in a seeded random order, decoded from their source."""

    recipe: Recipe
    source: Source
    split: str
    samples: np.ndarray
    """int64 (rows,): the sample of every row."""
    shape: Geometry
    threads: int = READ_THREADS
    work = "decoding"

    def shards(self, todo: Sequence[int], timing: Timing, lock: ComputeLock) -> ShardRows:
        """uint8 images of each shard; see ``level.ShardSource``."""
        with ThreadPoolExecutor(self.threads) as pool:
            for shard in todo:
                first, last = self.shape.shard_range(shard)
                images = np.empty((last - first, *self.shape.sample), np.uint8)
                with lock:
                    for row, image in enumerate(pool.map(self._pixels, self.samples[first:last])):
                        images[row] = image
                        timing.tick(1)
                yield shard, images

    def _pixels(self, sample: np.int64) -> np.ndarray:
        data = self.recipe.data
        return pixels(self.source.image(self.split, int(sample)), data.size, data.channels)


def order_of_rows(key: LevelKey, found: Mapping[str, Any]) -> np.ndarray:
    """The sample of every row of x_0: int64 (rows,).

    Args:
        found: what a survey found.
    """
    kept = np.array(found["kept"][key.split], np.int64)
    shuffled = generator("order of rows", key.fingerprint, key.split).permutation(len(kept))
    return kept[shuffled]


def _write_split(
    session: Session,
    source: Source,
    split: str,
    found: Mapping[str, Any],
    damaged: Sequence[Damage],
) -> None:
    """Write x_0 of one split."""
    key, data = session.key(0, split, "clean"), session.run.recipe.data
    samples = order_of_rows(key, found)
    shard_bytes = session.run.recipe.cache.shard_mb << 20
    sample = (data.channels, data.size, data.size)
    shape = geometry_at(session.store, key) or geometry(len(samples), sample, "uint8", shard_bytes)
    rows = ImageShards(session.run.recipe, source, split, samples, shape)
    arrays = {"labels": source.labels(split)[samples], "sample_id": samples}
    begun = time.monotonic()
    with locked_writer(session, key, shape, damaged) as writer:
        if writer is None:
            return
        memo, task = _memo(session, found["signature"]).absolute(), None
        if session.crew is not None:
            address, mandate = tasks.RunAddress.of(session), Mandate.of(writer)
            task = tasks.ImagesTask(address, mandate, memo, found["digest"])
        write_level(session, writer, rows, task, begun, parent=None, arrays=arrays)
