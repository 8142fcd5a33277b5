"""Rows of raw levels, or of a .beton of x_0, gathered by ffcv in the order asked for.

ffcv's epoch thread and its parallel decoders read; what it does not do is done around them: rows
are held to their checksums, a failure of the thread is raised and not waited for, every batch is
memory of its own, and leaving an epoch early ends the thread. docs/ffcv.md has the reasons.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.ffcv import beton
from strata.pipeline.feed.ffcv.epoch import Loader, alone, epoch_class
from strata.pipeline.feed.ffcv.write import write_images
from strata.pipeline.run.session import Session
from strata.store.level.level import Level
from strata.store.read.mapped import MappedRows
from strata.store.read.rows import Rows

POINTERS = np.dtype([("f0", "<u8")])
"""ffcv's metadata of rows of plain bytes."""


class FfcvRows(AbstractContextManager["FfcvRows"]):
    """Batches of stored rows. Close it, or use it in a with statement."""

    _loader: Loader

    def __init__(self, levels: Sequence[Level]) -> None:
        self._levels, self._geometry = tuple(levels), levels[0].geometry
        self._epochs: set[Any] = set()
        self._closed = False

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the epochs that are under way, and unmap. A batch that was handed out stays valid."""
        self._closed = True
        for epoch in list(self._epochs):
            epoch.stop()

    def batches(self, rows: Rows, lengths: Sequence[int]) -> Iterator[np.ndarray]:
        """The rows asked for, in exactly this order, as batches of these lengths.

        ffcv's epochs have batches of one length and a shorter last one: wherever lengths change
        otherwise, another of its epochs begins.

        Returns:
            Arrays (length, channel, y, x) of stored elements, in the level's dtype. Each is memory
            of its own, which nobody writes to again.

        Raises:
            IndexError: there is no such row. At once, as the next.
            LevelDamaged: a shard is gone or was cut; later, a row is not the one that was written.
            LoaderError: the same of a .beton; ffcv failed; these rows were closed; a second epoch
                where numba has no threads that are safe for two.
        """
        self._check_open()
        for asked, there in ((rows.view, len(self._levels)), (rows.row, self._geometry.rows)):
            if len(asked) and not 0 <= asked.min() <= asked.max() < there:
                raise IndexError(f"rows or views {asked.min()}…{asked.max()} of {there}")
        self._ready()
        return self._runs(rows, lengths)

    def _runs(self, rows: Rows, lengths: Sequence[int]) -> Iterator[np.ndarray]:
        end = 0
        for run in _epochs(lengths):
            begin, end = end, end + sum(run)
            yield from self._run(rows[begin:end], run)

    def _run(self, rows: Rows, lengths: Sequence[int]) -> Iterator[np.ndarray]:
        self._check_open()  # again: this runs when its first batch is asked for
        loader, length = self._loader, lengths[0]
        if not length:
            yield self._shaped(np.empty((0, *loader.row), np.uint8))
            return

        def finished(number: int, batch: np.ndarray) -> np.ndarray:
            """A batch as it is handed out, every row of it checked once. Runs in ffcv's thread."""
            stored = self._shaped(batch)
            self._check(rows[number * length :][: len(batch)], stored)
            return stored

        with alone(loader.num_workers):
            order = rows.view * self._geometry.rows + rows.row
            epoch = epoch_class()(loader, order, length, finished)
            self._epochs.add(epoch)
            try:
                for _ in lengths:
                    yield epoch.next_batch()
            finally:
                epoch.stop()
                self._epochs.discard(epoch)

    def _check_open(self) -> None:
        if self._closed:
            raise LoaderError("these rows were closed")

    @abstractmethod
    def _ready(self) -> None:
        """Called before an epoch. Raises if the files are not those that were opened."""

    @abstractmethod
    def _shaped(self, batch: np.ndarray) -> np.ndarray:
        """A batch as ffcv read it, to (n, channel, y, x) of stored elements, C-contiguous."""

    @abstractmethod
    def _check(self, rows: Rows, stored: np.ndarray) -> None:
        """Raises if these are not the rows that were written; looks at every row once."""


def _epochs(lengths: Sequence[int]) -> Iterator[Sequence[int]]:
    """Runs of equal lengths, each with the shorter one that follows it; a 0 is alone."""
    begin = 0
    for at, (last, length) in enumerate(pairwise(lengths), 1):
        if last != lengths[begin] or length > last or not length:
            yield lengths[begin:at]
            begin = at
    if len(lengths):
        yield lengths[begin:]


class FfcvLevels(FfcvRows):
    """Raw levels (views) of equal geometry, read in place. To ffcv a row is so many bytes: numba
    has no float16, and needs none."""

    def __init__(self, levels: Sequence[Level], workers: int | None = None) -> None:
        """Raises as :class:`MappedRows` does; LoaderError: no ffcv, or a packed level."""
        beton.check()  # if it is missing, say so before anything is mapped
        super().__init__(levels)
        shape = self._geometry
        if shape.profile != "raw":
            raise LoaderError(
                f"ffcv reads raw levels in place; {levels[0].key.label} is packed with "
                f"{shape.profile}. Use --loader native, or 'cache.profile' raw"
            )
        self._mapped = mapped = MappedRows(levels)
        every = Rows(*np.divmod(np.arange(len(levels) * shape.rows), shape.rows))
        places = (mapped.places(every) * shape.row_bytes).astype(np.uint64)
        sizes, row = np.full(len(places), shape.row_bytes, np.uint64), (shape.row_bytes,)
        self._loader = Loader(mapped.memory, places, sizes, places.view(POINTERS), row, workers)

    def close(self) -> None:
        super().close()
        self._mapped.close()

    def _ready(self) -> None:
        self._mapped.ready()

    def _shaped(self, batch: np.ndarray) -> np.ndarray:
        return batch.view(self._geometry.dtype).reshape(len(batch), *self._geometry.stored)

    def _check(self, rows: Rows, stored: np.ndarray) -> None:
        self._mapped.checks.check(rows.view, rows.row, stored)


class FfcvBeton(FfcvRows):
    """x_0 from the .beton that was written from it. The map ends with its last reader."""

    def __init__(self, path: Path, level: Level, workers: int | None = None) -> None:
        """Raises as :func:`beton.read_beton` does."""
        super().__init__([level])
        reader = beton.read_beton(path, level)
        self._path, self._nbytes = path, path.stat().st_size
        self._checksums, self._seen = reader.metadata["f3"], np.zeros(len(level), bool)
        self._places, self._sizes = beton.places(reader)
        self._memory = np.memmap(path, np.uint8, "r").view(np.ndarray)
        channels, height, width = level.geometry.sample
        metadata, row = self._places.view(POINTERS), (level.geometry.row_bytes,)
        if channels == 3:
            metadata, row = reader.metadata, (height, width, 3)
        self._loader = Loader(self._memory, self._places, self._sizes, metadata, row, workers)

    def _ready(self) -> None:
        if not self._path.exists() or self._path.stat().st_size != self._nbytes:
            raise LoaderError(f"{self._path} is not the file that was opened")

    def _shaped(self, batch: np.ndarray) -> np.ndarray:
        if len(self._loader.row) == 3:
            return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
        return batch.reshape(len(batch), *self._geometry.stored)

    def _check(self, rows: Rows, stored: np.ndarray) -> None:
        """The bytes in the file, because a JPEG may be decoded a little differently elsewhere."""
        for row in rows.row[~self._seen[rows.row]].tolist():
            begin, size = int(self._places[row]), int(self._sizes[row])
            if crc32c(self._memory[begin : begin + size]) != self._checksums[row]:
                raise LoaderError(
                    f"{self._path}: row {row} is not the one that was written. "
                    "Remove the file, and write it again"
                )
        self._seen[rows.row] = True


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

            write_images(path, level, quality, done)
    return path
