"""Images → x_0: surveyed once, resized, written in a seeded random order of rows.

Row i is the same sample in every level above. Random rows mean that even a sequential read of a
level is a shuffled one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from pipeline.errors import RunConflict, remedy
from pipeline.images import have_images, stamp
from pipeline.levels import geometry_at
from pipeline.line import Line
from pipeline.rundir import DATA
from pipeline.session import READ_THREADS, Session
from pipeline.writing import Content, Shards, write_level
from stages.errors import DataError
from stages.images import SPLITS, Source, check_labels, open_source, pixels, survey
from store.errors import LevelDamaged
from store.fingerprint import fingerprint
from store.layout import LevelKey, geometry
from store.level import Level
from store.order import generator
from store.publish import make_directory, replace, sealed, unseal
from store.verify import Damage

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
        kept = {split: np.array(found["kept"][split], np.int64) for split in SPLITS}
        facts = {k: v for k, v in found.items() if k != "kept"}
        session.run.write(session.run.directory / DATA, facts)
        for split in SPLITS:
            again = (damaged or {}).get(session.key(0, split, "clean"), ())
            _write_split(session, source, split, kept[split], again)


def levels(session: Session) -> dict[str, Level]:
    """x_0 by split."""
    return {split: session.store.open(session.key(0, split, "clean")) for split in SPLITS}


# ---- survey -----------------------------------------------------------------------------------


def _survey(session: Session, source: Source) -> dict[str, Any]:
    """Digest, counts and good samples of a source, remembered while it is unchanged."""
    signature, store = source.signature(), session.store
    memo = store.root / "sources" / f"{fingerprint([session.run.source, signature])[:12]}.json"
    with suppress(FileNotFoundError, LevelDamaged):
        remembered = unseal(memo, store.files)
        if not remembered["broken_count"] or session.skip_broken:
            return remembered
    found = _read_all(session, source) | {
        "signature": signature,
        "stamp": stamp(session.run.source),
    }
    make_directory(memo.parent, store.files)
    replace(memo.parent, memo.name, sealed(found), store.files)
    return found


def _read_all(session: Session, source: Source) -> dict[str, Any]:
    total = sum(source.count(split) for split in SPLITS)
    advice = "Mend or remove them, or pass --skip-broken to leave them out"
    with session.report.task("reading images", total, "images") as tick, remedy(DataError, advice):

        def done(images: int) -> None:
            session.stop.check()
            tick(images)

        result = survey(source, skip_broken=session.skip_broken, tick=done, workers=READ_THREADS)
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


# ---- x_0 --------------------------------------------------------------------------------------


def _write_split(
    session: Session, source: Source, split: str, kept: np.ndarray, damaged: Sequence[Damage]
) -> None:
    """Write x_0 of one split, its rows in a seeded random order."""
    key, data = session.key(0, split, "clean"), session.run.recipe.data
    shuffled = generator("order of rows", key.fingerprint, split).permutation(len(kept))
    samples = kept[shuffled]
    shard_bytes = session.run.recipe.cache.shard_mb << 20
    sample = (data.channels, data.size, data.size)
    shape = geometry_at(session.store, key) or geometry(len(samples), sample, "uint8", shard_bytes)

    def decode(sample: np.int64) -> np.ndarray:
        return pixels(source.image(split, int(sample)), data.size, data.channels)

    def shards(todo: Sequence[int], line: Line) -> Shards:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for shard in todo:
                first, last = shape.shard_range(shard)
                images = np.empty((last - first, *shape.sample), np.uint8)
                for row, image in enumerate(pool.map(decode, samples[first:last])):
                    images[row] = image
                    line.tick(1)
                yield shard, images

    arrays = {"labels": source.labels(split)[samples], "sample_id": samples}
    write_level(session, key, shape, lambda: Content("decoding", shards, arrays=arrays), damaged)
