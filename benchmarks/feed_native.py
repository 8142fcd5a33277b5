"""The native feed as one of the rivals: stored rows in random order, with their labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from feed_rivals import Counter, Delivered, Look, Rival, Threaded

from pipeline import delivery
from pipeline.feed import LevelFeed
from store.opening import open_level
from store.packed import Chunks


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
            loader: ``ffcv`` reads the same shards in place through ffcv's epoch thread.
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
            counter.add(x)
        return counter.total

    def forget(self) -> None:
        if self.feed is not None and not self.outgrown:
            self.feed.close()
            self.feed = None


class DecodeOnly(Threaded):
    """The limit of packed levels: every chunk decoded in file order and checked against its
    checksum, nothing mixed and nothing gathered."""

    def __init__(self, directory: Path, threads: int) -> None:
        self.chunks = Chunks([open_level(directory)], mapped=True)
        super().__init__(threads, self.chunks.empty().shape, np.uint8)
        self.parts = list(range(len(self.chunks)))

    def read(self, part: int, buffer: np.ndarray) -> np.ndarray:
        self.chunks.decode(part, buffer)
        first, end = self.chunks.rows(part)
        return buffer[: end - first]
