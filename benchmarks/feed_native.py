"""The native feed as one of the rivals: stored rows in random order, with their labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from feed_rivals import Counter, Delivered, Look, Rival, Threaded

import checkout  # noqa: F401
from strata.pipeline.feed import delivery
from strata.pipeline.feed.level_feed import LevelFeed
from strata.store.feature_store import open_level
from strata.store.read.mapped import MappedRows
from strata.store.read.packed import Chunks
from strata.store.read.rows import Rows


class Native(Rival):
    """``feed(level, stored=True)``. What it hands out is its own until it is let go."""

    def __init__(
        self,
        directory: Path,
        batch: int,
        threads: int,
        *,
        tier: str = "auto",
        loader: str = "native",
        outgrown: bool = False,
    ) -> None:
        """
        Args:
            threads: that gather, the one that asks for batches among them.
            loader: ``ffcv`` reads the same shards in place with ffcv's compiled code.
            outgrown: read as if the level had no room in memory: nothing is mapped, so that there
                is nothing to forget.
        """
        self.directory, self.outgrown = directory, outgrown
        if outgrown:
            delivery.CACHE_SHARE = 0.0
        self.options = {"batch": batch, "tier": tier, "loader": loader, "stored": True}
        self.options["threads"] = max(1, threads - 1) if loader == "native" else threads
        self.feed: LevelFeed | None = None

    def prepare(self, seed: int) -> None:
        if self.feed is None:
            level = open_level(self.directory)
            labels = np.arange(len(level))
            self.feed = LevelFeed(level, labels=labels, **self.options)  # type: ignore[arg-type]

    def epoch(self, seed: int, look: Look | None = None) -> Delivered:
        assert self.feed is not None
        counter = Counter(look)
        for x, _ in self.feed.epoch(seed):
            counter.add(x.movedim(1, -1))  # as it lies
        return counter.total

    def forget(self) -> None:
        if self.feed is not None and not self.outgrown:
            self.feed.close()
            self.feed = None


class TakeInPlace(Threaded):
    """The limit of raw levels: np.take from the shards of the level, mapped one after another, so
    from the same pages as the feed. A copy of the rows in another file may lie better, or worse.

    The order is drawn and each batch of it sorted before the clock starts. Whoever hands a batch
    out while the next is gathered needs more than one buffer per thread, and the more there are,
    the fewer stay in the cache: ``each`` makes the limit comparable.
    """

    def __init__(self, directory: Path, batch: int, threads: int, each: int = 1) -> None:
        self.mapped, self.batch = MappedRows([open_level(directory)]), batch
        self.rows = self.mapped.memory.reshape(-1, self.mapped.geometry.row_bytes)
        shape = (batch, self.mapped.geometry.row_bytes)
        super().__init__(threads, shape, np.uint8, each)

    def prepare(self, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(self.mapped.geometry.rows)
        begins = range(0, len(order), self.batch)
        parts = [Rows.of(np.sort(order[at : at + self.batch])) for at in begins]
        self.parts = [self.mapped.places(part) for part in parts]

    def read(self, part: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        out = buffer[: len(part)]
        np.take(self.rows, part, axis=0, out=out, mode="clip")
        return out


class DecodeOnly(Threaded):
    """The limit of packed levels: every chunk decoded in file order and checked against its
    checksum, nothing mixed and nothing gathered."""

    def __init__(self, directory: Path, threads: int) -> None:
        self.chunks = Chunks([open_level(directory)], mapped=True)
        shape = self.chunks.geometry
        super().__init__(threads, (shape.chunk_rows, shape.row_bytes), np.uint8)
        self.parts = list(range(self.chunks.count))

    def read(self, part: int, buffer: np.ndarray) -> np.ndarray:
        self.chunks.decode(0, part, buffer)
        shape = self.chunks.geometry
        return buffer[: shape.rows - part * shape.chunk_rows]
