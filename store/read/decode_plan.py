"""When an epoch decodes which chunk, and where its rows lie until they are taken. Pure arithmetic.

The order of an epoch is known beforehand, so everything else is, too. Chunks are decoded in the
order in which they are first wanted, each once, and their wanted rows are laid one after another on
a tape. The tape goes round on a ring of places: a place is written again once the row that it held,
and every row before that on the tape, has been taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class DecodePlan:
    """The plan of one epoch. Arrays are by chunk in the order of decoding, or as they say."""

    def __init__(
        self, stripes: Sequence[np.ndarray], chunk_of: np.ndarray, chunk_rows: int, room: int = 0
    ) -> None:
        """
        Args:
            stripes: numbers of the rows that are taken together, in the order of taking.
            chunk_of: int64, the chunk of every row of all stripes, one after another.
            chunk_rows: rows of a whole chunk.
            room: places beyond those that must be there, so that decoding can be early.
        """
        lengths = [len(stripe) for stripe in stripes]
        self.numbers = np.concatenate(stripes)
        self.ends = np.cumsum(lengths)
        """Per stripe, rows up to its last."""
        stripe_of = np.repeat(np.arange(len(stripes)), lengths)

        rows = np.lexsort((self.numbers, chunk_of))  # by chunk, and there by number
        groups = np.flatnonzero(np.diff(chunk_of[rows], prepend=-1))
        firsts = np.minimum.reduceat(rows, groups)
        sequence = np.argsort(firsts, kind="stable")
        self.chunks = chunk_of[rows][groups][sequence]
        """The chunks, in the order in which they are first wanted."""
        sizes = np.diff(np.append(groups, len(rows)))
        self.sizes = sizes[sequence]
        """Wanted rows of each."""
        self.decoded = np.cumsum(self.sizes)
        """Wanted rows of it and of all before it."""
        self.wanted = np.searchsorted(
            stripe_of[firsts[sequence]], np.arange(len(stripes)), side="right"
        )
        """Per stripe, how many chunks must be decoded before it is taken."""
        lasts = np.maximum.reduceat(stripe_of[rows], groups)[sequence]
        self._lay_out(np.maximum.accumulate(lasts), chunk_rows, room)
        self.members = [rows[a : a + n] for a, n in zip(groups[sequence], self.sizes, strict=True)]
        """Which rows of the epoch are each chunk's, by number."""
        apart = np.diff(self.numbers[rows], prepend=-1) != 1
        apart[groups] = False
        gaps = np.add.reduceat(apart, groups)[sequence]
        self.whole = (self.sizes == chunk_rows) & (gaps == 0)
        """Are its wanted rows all of a whole chunk, each once?"""
        self.place = np.empty(len(rows), np.int64)
        """Per row of the epoch, its place."""
        ranks = np.arange(len(rows)) - np.repeat(groups, sizes)
        begins = np.empty(len(groups), np.int64)
        begins[sequence] = self.begins
        self.place[rows] = np.repeat(begins, sizes) + ranks

    def _lay_out(self, done: np.ndarray, chunk_rows: int, room: int) -> None:
        """How many places, which are each chunk's, and when they are free.

        Args:
            done: the stripe with which a chunk and all before it have been taken.
        """
        decoded = np.concatenate([[0], self.decoded])
        taken = np.concatenate([[0], self.ends[:-1]])
        ahead = decoded[self.wanted] - taken
        self.lead = int(ahead.max(initial=0)) + room
        """By how many rows decoding may be ahead of taking."""
        oldest = np.searchsorted(done, np.arange(len(self.ends)))  # chunk with rows to be taken
        span = decoded[np.maximum(self.wanted, oldest)] - decoded[oldest]
        # No chunk lies over the end of the ring, which may cost one on either side.
        self.places = int(span.max(initial=0)) + room + 2 * chunk_rows
        """Rows that have a place at once, at most."""
        tape = _tape(self.sizes, self.places)
        self.begins = tape % self.places
        """Place of a chunk's first row; the others follow it."""
        freed = np.searchsorted(tape, tape + self.sizes - self.places)
        self.after = np.where(freed > 0, done[freed - 1] + 1, 0)
        """How many stripes must be taken before a chunk is decoded."""


def _tape(sizes: np.ndarray, places: int) -> np.ndarray:
    """Where each chunk begins on a tape, none of them across a multiple of ``places``."""
    begins = np.cumsum(sizes) - sizes
    lap = places
    while True:
        ends = begins + sizes
        over = int(np.searchsorted(ends, lap, side="right"))
        if over == len(sizes):
            return begins
        begins[over:] += max(0, lap - int(begins[over]))
        lap += places
