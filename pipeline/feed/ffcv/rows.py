"""Rows of raw levels, or of a .beton of x_0, gathered by ffcv in the order asked for.

ffcv's epoch thread and its parallel decoders read; what it does not do is done around them: rows
are held to their checksums, a failure of the thread is raised and not waited for, every batch is
memory of its own, and leaving an epoch early ends the thread. docs/ffcv.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.ffcv import beton
from strata.pipeline.feed.ffcv.epoch import Loader, RowsInMemory, alone, cores, epoch_class
from strata.pipeline.run.session import Session
from strata.store.level.checks import Checks
from strata.store.level.level import Level
from strata.store.read.mapped import Mapped


class FfcvRows(AbstractContextManager["FfcvRows"]):
    """Batches of stored rows. Close it, or use it in a with statement."""

    def __init__(self, source: RowsInMemory, workers: int | None = None) -> None:
        """
        Args:
            source: see :meth:`of_levels` and :meth:`of_beton`.
            workers: threads that copy or decode; no more than the cores we may use, the default.
        """
        self._source = source
        self._loader = Loader(source, cores() if workers is None else min(workers, cores()))
        self._epochs: set[Any] = set()
        self._closed = False

    @classmethod
    def of_levels(cls, levels: Sequence[Level], workers: int | None = None) -> FfcvRows:
        """Rows of raw levels (views) of equal geometry, read in place; row r of view v has the
        number v · rows + r. Raises as :class:`Mapped` does."""
        return cls(_Levels(levels), workers)

    @classmethod
    def of_beton(cls, path: Path, level: Level, workers: int | None = None) -> FfcvRows:
        """Rows of x_0 from its .beton. Raises as :func:`beton.read_beton` does."""
        return cls(_Beton(path, level), workers)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the epochs that are under way, and unmap. A batch that was handed out stays valid."""
        self._closed = True
        for epoch in list(self._epochs):
            epoch.stop()
        self._source.close()

    def __len__(self) -> int:
        return self._source.shape[0]

    def batches(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The rows of each part, in exactly the order asked for.

        Args:
            parts: int64 row numbers. ffcv's epochs have batches of one length and a shorter last
                one: wherever lengths change otherwise, another of its epochs begins.

        Returns:
            Arrays (len(part), channel, y, x) of stored elements, in the level's dtype. Each is
            memory of its own, which nobody writes to again.

        Raises:
            IndexError: there is no such row. At once, as the next.
            LevelDamaged: a shard is gone or was cut; later, a row is not the one that was written.
            LoaderError: the same of a .beton; ffcv failed; these rows were closed; a second epoch
                where numba has no threads that are safe for two.
        """
        self._check_open()
        for part in parts:
            if len(part) and not 0 <= part.min() <= part.max() < len(self):
                raise IndexError(f"rows {part.min()}…{part.max()} of {len(self)}")
        self._source.ready()
        return self._runs(parts)

    def _runs(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        for epoch in _epochs(parts):
            yield from self._run(epoch)

    def _run(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        self._check_open()  # again: this runs when its first batch is asked for
        order, length = np.concatenate(parts).astype(np.int64, copy=False), len(parts[0])
        if not length:
            yield self._source.shaped(np.empty((0, *self._source.row), np.uint8))
            return
        with alone(self._loader.num_workers):
            epoch = epoch_class()(self._loader, order, length, self._finished)
            self._epochs.add(epoch)
            try:
                for _ in parts:
                    yield epoch.next_batch()
            finally:
                epoch.stop()
                self._epochs.discard(epoch)

    def _check_open(self) -> None:
        if self._closed:
            raise LoaderError("these rows were closed")

    def _finished(self, rows: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """A batch as it is handed out, every row of it checked once. Runs in ffcv's thread."""
        stored = self._source.shaped(batch)
        self._source.check(rows, stored)
        return stored


def _epochs(parts: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
    """Runs of parts of one length, each with the shorter part that follows it; an empty part is
    alone."""
    begin = 0
    for at, (last, part) in enumerate(pairwise(parts), 1):
        if len(last) != len(parts[begin]) or len(part) > len(last) or not len(part):
            yield parts[begin:at]
            begin = at
    if len(parts):
        yield parts[begin:]


POINTERS = np.dtype([("f0", "<u8")])
"""ffcv's metadata of rows of plain bytes."""


class _Levels:
    """Raw levels. To ffcv a row is so many bytes: numba has no float16, and needs none."""

    def __init__(self, levels: Sequence[Level]) -> None:
        beton.check()  # if it is missing, say so before anything is mapped
        self.geometry = levels[0].geometry
        if self.geometry.profile != "raw":
            raise LoaderError(
                f"ffcv reads raw levels in place; {levels[0].key.label} is packed with "
                f"{self.geometry.profile}. Use --loader native, or 'cache.profile' raw"
            )
        mapped = Mapped(levels)
        self.shape, self.memory = (len(mapped), *self.geometry.stored), mapped.memory
        places = mapped.places(np.arange(len(mapped))) * self.geometry.row_bytes
        self.places = places.astype(np.uint64)
        self.ready, self.check, self.close = mapped.check_sizes, Checks(levels).check, mapped.close
        self.sizes = np.full(len(mapped), self.geometry.row_bytes, np.uint64)
        self.metadata = self.places.view(POINTERS)
        self.rgb, self.row = False, (self.geometry.row_bytes,)

    def shaped(self, batch: np.ndarray) -> np.ndarray:
        return batch.view(self.geometry.dtype).reshape(len(batch), *self.geometry.stored)


class _Beton:
    """x_0 from the .beton that was written from it."""

    def __init__(self, path: Path, level: Level) -> None:
        reader = beton.read_beton(path, level)
        self.path, self.nbytes = path, path.stat().st_size
        self.shape = (len(level), *level.geometry.stored)
        self.checksums, self._seen = reader.metadata["f3"], np.zeros(len(level), bool)
        self.places, self.sizes = beton.places(reader)
        channels, height, width = level.geometry.sample
        self.rgb = channels == 3
        self.row = (height, width, 3) if self.rgb else (level.geometry.row_bytes,)
        self.metadata = reader.metadata if self.rgb else self.places.view(POINTERS)
        self.memory = np.memmap(path, np.uint8, "r").view(np.ndarray)

    def ready(self) -> None:
        if not self.path.exists() or self.path.stat().st_size != self.nbytes:
            raise LoaderError(f"{self.path} is not the file that was opened")

    def shaped(self, batch: np.ndarray) -> np.ndarray:
        if self.rgb:
            return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
        return batch.reshape(len(batch), *self.shape[1:])

    def check(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        """The bytes in the file, because a JPEG may be decoded a little differently elsewhere."""
        for row in numbers[~self._seen[numbers]].tolist():
            begin, size = int(self.places[row]), int(self.sizes[row])
            if crc32c(self.memory[begin : begin + size]) != self.checksums[row]:
                raise LoaderError(
                    f"{self.path}: row {row} is not the one that was written. "
                    "Remove the file, and write it again"
                )
        self._seen[numbers] = True

    def close(self) -> None:
        """The map ends with its last reader."""


def image_file(session: Session, level: Level) -> Path | None:
    """The .beton of x_0 that the session's loader reads; None if it reads the level itself.

    Raises:
        LoaderError: ffcv cannot be had, or the recipe wants JPEG and the loader cannot read it.
    """
    quality = session.run.recipe.data.jpeg
    if session.loader != "ffcv":
        if quality:
            raise LoaderError(
                f"'data.jpeg' is {quality}: its images are read by ffcv. Use --loader ffcv"
            )
        return None
    beton.check()
    mode = f"jpeg{quality}" if quality else "raw"
    path = level.directory.with_name(f"{level.key.name}.{mode}.beton")
    try:
        beton.read_beton(path, level)
    except LoaderError as error:  # it is only a copy, so that there is nothing to lose
        if path.exists():
            session.report.say(f"{error}. It is written again")
        with session.report.task(f"writing {path.name}", len(level), "images") as tick:

            def done(rows: int) -> None:
                session.stop.check()
                tick(rows)

            jpeg: dict[str, Any] = {"mode": "jpeg", "quality": quality} if quality else {}
            beton.write_images(path, level, tick=done, **jpeg)
    return path
