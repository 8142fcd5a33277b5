"""Rows of raw levels, or of a .beton of x_0, as ffcv's compiled code copies or decodes them.

It is called by the threads of our reader, each of which does a part of a batch, and only there: of
ffcv's own threads, memory and orders nothing is used. docs/ffcv.md has the reasons.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from google_crc32c import value as crc32c

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.ffcv import beton
from strata.pipeline.feed.ffcv.beton import ffcv
from strata.pipeline.feed.ffcv.write import write_images
from strata.pipeline.run.session import Session
from strata.store.level.level import Level
from strata.store.read.mapped import MappedRows
from strata.store.read.rows import Rows, RowSource


@cache
def _compiled(rgb: bool) -> Callable[..., object]:
    """ffcv's code for images or for plain bytes: of the numbers of rows (int64), memory to fill,
    ffcv's record of every row, and what :class:`FfcvRows` makes of the memory to read. It holds
    no data, so all readers of the process share it: numba takes a second to compile it. It does
    not hold the interpreter's lock, and starts no threads."""
    parts = ffcv()
    parts.Compiler.num_threads = 1  # several abort the process where two epochs are under way
    decoders, manager = parts.decoders, parts.OSCacheManager
    decoder = decoders.SimpleRGBImageDecoder() if rgb else decoders.NDArrayDecoder()
    decoder.accept_globals(None, manager.compile_reader(manager.__new__(manager)))
    return parts.Compiler.compile(decoder.generate_code())


class FfcvRows(RowSource):
    """Rows that ffcv reads from memory."""

    def __init__(
        self,
        levels: Sequence[Level],
        memory: np.ndarray,
        places: np.ndarray,
        sizes: np.ndarray,
        records: np.ndarray,
        *,
        rgb: bool = False,
    ) -> None:
        """
        Args:
            memory: uint8, read-only: all that can be read.
            places: uint64, where each row begins in memory: one view after another.
            sizes: uint64, how many bytes each has.
            records: what ffcv knows of each: its place, or of colour images more.
            rgb: colour images, raw or JPEG as the records say; otherwise plain bytes.
        """
        self.levels, self.geometry, self._rgb = tuple(levels), levels[0].geometry, rgb
        order = np.argsort(places, kind="stable")  # ffcv looks a size up by its place
        self._state = memory, places[order], sizes[order]
        self._records, self._decode = records, _compiled(rgb)

    def take(self, rows: Rows, out: np.ndarray) -> None:
        """Copy rows, as :meth:`RowSource.take`. Raises IndexError: there is no such row;
        LoaderError: ffcv failed, or a row of a .beton is not the one that was written."""
        for asked, there in ((rows.view, len(self.levels)), (rows.row, self.geometry.rows)):
            if len(asked) and not 0 <= asked.min() <= asked.max() < there:
                raise IndexError(f"rows or views {asked.min()}…{asked.max()} of {there}")
        found = out.reshape(len(rows), *self.geometry.lying) if self._rgb else out
        numbers = rows.view * self.geometry.rows + rows.row
        try:
            self._decode(numbers, found, self._records, self._state)
        except Exception as error:  # what is compiled from source can fail in any way
            raise LoaderError(f"ffcv failed ({type(error).__name__}: {error})") from error
        self.check(rows, out)

    @abstractmethod
    def check(self, rows: Rows, stored: np.ndarray) -> None:
        """Raises if these are not the rows that were written; looks at every row once."""


class FfcvLevels(FfcvRows):
    """Raw levels (views) of equal geometry, read in place. To ffcv a row is so many bytes: numba
    has no float16, and needs none."""

    def __init__(self, levels: Sequence[Level]) -> None:
        """Raises as :class:`MappedRows` does; LoaderError: no ffcv, or a packed level."""
        ffcv()  # if it is missing, say so before anything is mapped
        shape = levels[0].geometry
        if shape.profile != "raw":
            raise LoaderError(
                f"ffcv reads raw levels in place; {levels[0].key.label} is packed with "
                f"{shape.profile}. Use --loader native, or 'cache.profile' raw"
            )
        self._mapped = mapped = MappedRows(levels)
        every = Rows(*np.divmod(np.arange(len(levels) * shape.rows), shape.rows))
        places = (mapped.places(every) * shape.row_bytes).astype(np.uint64)
        sizes = np.full(len(places), shape.row_bytes, np.uint64)
        super().__init__(levels, mapped.memory, places, sizes, places)

    def check(self, rows: Rows, stored: np.ndarray) -> None:
        self._mapped.checks.check(rows.view, rows.row, stored)

    def close(self) -> None:
        self._mapped.close()


class FfcvBeton(FfcvRows):
    """x_0 from the .beton that was written from it. The map ends with its last reader."""

    def __init__(self, path: Path, level: Level) -> None:
        """Raises as :func:`beton.read_beton` does."""
        reader = beton.read_beton(path, level)
        self._path, self._nbytes = path, path.stat().st_size
        self._checksums, self._seen = reader.metadata["f3"], np.zeros(len(level), bool)
        self._places, self._sizes = beton.places(reader)
        self._memory = np.memmap(path, np.uint8, "r").view(np.ndarray)
        rgb = level.geometry.sample[0] == 3
        records = reader.metadata["f0"] if rgb else self._places
        super().__init__([level], self._memory, self._places, self._sizes, records, rgb=rgb)

    def ready(self) -> None:
        if not self._path.exists() or self._path.stat().st_size != self._nbytes:
            raise LoaderError(f"{self._path} is not the file that was opened")

    def check(self, rows: Rows, stored: np.ndarray) -> None:
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
        LoaderError: ffcv cannot be had, or x_0 is no images, or the recipe wants JPEG and the
            loader cannot read it.
    """
    quality = session.run.recipe.data.jpeg
    if session.options.loader != "ffcv":
        if quality:
            raise LoaderError(
                f"'data.jpeg' is {quality}: its images are read by ffcv. Use --loader ffcv"
            )
        return None
    ffcv()
    shape = level.geometry
    if not (shape.is_map and shape.precision == "uint8"):
        raise LoaderError(
            f"ffcv reads images; {level.key.label} is ({', '.join(shape.axes)}) of "
            f"{shape.precision}. Use --loader native"
        )
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
