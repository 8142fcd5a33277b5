"""Packed levels: rows between the decoding of their chunk and the batch that they go into.

The order of an epoch is known beforehand, so everything else is, too. Its chunks fall into windows:
those of one have all been taken before any of the next but one is wanted. Memory holds two windows.
While the rows of one are taken, the next is decoded, every chunk once and in the order in which
they are first wanted; then the two change places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import Condition

import numpy as np

from strata.store.level.level import Checks, Level
from strata.store.memory import aligned
from strata.store.read.order import POOL_BYTES
from strata.store.read.packed import Chunks
from strata.store.read.rows import Rows, RowSource, TakenRows

MOST_BYTES = 4 * POOL_BYTES
"""Most bytes of decoded rows: two windows, which together have at most three times POOL_BYTES, and
some room."""
ROOM_BYTES = 16 << 20
"""Bytes of a window, at least, so that chunks are decoded before the last moment."""
FETCHED_AHEAD = 32
"""Chunks that a disk is asked for before they are decoded: about 1 MiB each, before packing."""


class Pool(RowSource):
    """Packed levels of equal geometry, and memory for their decoded rows."""

    def __init__(self, levels: Sequence[Level], *, mapped: bool = False) -> None:
        """
        Args:
            mapped: the packed bytes stay in the page cache, and are read there.
        """
        self.levels, self.checks = tuple(levels), Checks(levels)
        self.chunks = Chunks(levels, mapped=mapped)
        self.geometry, self._one_by_one = self.chunks.geometry, TakenRows(levels)
        self.spare = np.empty((0, self.geometry.row_bytes), np.uint8)
        """Memory of the epoch before: new memory costs more than what is done with it."""

    def begin(self, rows: Rows, lengths: Sequence[int]) -> Decoding | None:
        """Begin an epoch.

        Args:
            rows: what will be taken, in this order.
            lengths: how many of them are taken together, stripe after stripe.

        Returns:
            What decodes them. None where this order wants more places than there may be, because it
            was made for other chunks: then every row costs a chunk.
        """
        row_bytes = self.geometry.row_bytes
        room = max(1, ROOM_BYTES // row_bytes)
        plan = DecodePlan(rows, lengths, self.geometry.chunk_rows, room)
        if plan.places * row_bytes > MOST_BYTES:
            return None
        memory, self.spare = self.spare, self.spare[:0]
        if len(memory) < plan.places:
            memory = aligned(plan.places * row_bytes).reshape(-1, row_bytes)
        return Decoding(self, plan, memory)

    def take(self, rows: Rows, out: np.ndarray) -> None:
        self._one_by_one.take(rows, out)

    def close(self) -> None:
        self.chunks.close()


class DecodePlan:
    """When an epoch decodes which chunk, and where its rows lie until they are taken. Arrays are by
    chunk in the order of decoding, or as they say."""

    def __init__(self, rows: Rows, lengths: Sequence[int], chunk_rows: int, room: int) -> None:
        """
        Args:
            chunk_rows: rows of a whole chunk.
            room: rows of a window, at least, but of the last.
        """
        self.ends = np.cumsum(lengths)
        """Per stripe, rows up to its last."""
        stripe_of = np.repeat(np.arange(len(lengths)), lengths)
        order = np.lexsort((rows.row, rows.view))
        ordered = rows[order]
        view, chunk = ordered.view, ordered.row // chunk_rows
        groups = np.flatnonzero(np.diff(view, prepend=-1) | np.diff(chunk, prepend=-1))
        firsts = np.minimum.reduceat(order, groups)
        sequence = np.argsort(firsts, kind="stable")
        self.chunks = np.stack([view, chunk], axis=1)[groups][sequence]
        """View and number of each: int64 (chunks, 2)."""
        sizes = np.diff(np.append(groups, len(order)))
        self.decoded = np.cumsum(sizes[sequence])
        """Wanted rows of it and of all before it."""
        first = stripe_of[firsts[sequence]]
        self.wanted = np.searchsorted(first, np.arange(len(lengths)), side="right")
        """Per stripe, how many chunks must be decoded before it is taken."""
        last = np.maximum.reduceat(stripe_of[order], groups)[sequence]
        self._lay_out(first, np.maximum.accumulate(last), sizes[sequence], room)
        places = zip(groups[sequence].tolist(), sizes[sequence].tolist(), strict=True)
        self.rows = [ordered[begin : begin + size] for begin, size in places]
        """The wanted rows of each, ascending: they lie one after another."""
        begins = np.empty(len(groups), np.int64)
        begins[sequence] = self.begins
        self.place = np.empty(len(order), np.int64)
        """Per row of the epoch, its place."""
        self.place[order] = np.repeat(begins - groups, sizes) + np.arange(len(order))

    def _lay_out(self, first: np.ndarray, done: np.ndarray, sizes: np.ndarray, room: int) -> None:
        """How many places, which are each chunk's, and when they are free.

        Args:
            first: the stripe that wants a chunk first.
            done: the stripe with which a chunk and all before it have been taken.
            sizes: wanted rows of each.
        """
        before = self.decoded - sizes
        edges, starts = np.flatnonzero(first[1:] >= done[:-1]) + 1, [0]
        while True:  # a window ends where nothing of it is wanted later, and has some size
            full = np.searchsorted(self.decoded, before[starts[-1]] + room) + 1
            full = max(full, np.searchsorted(first, first[starts[-1]], side="right"))
            if (edge := np.searchsorted(edges, full)) == len(edges):
                break
            starts.append(int(edges[edge]))
        chunks = np.diff([*starts, len(first)])
        rows = np.add.reduceat(sizes, starts)
        half = int(rows[::2].max())
        self.places = half + int(rows[1::2].max(initial=0))
        """Rows that have a place at once, at most."""
        odd = np.arange(len(starts)) % 2
        self.begins = before + np.repeat(half * odd - before[starts], chunks)
        """Place of a chunk's first row; the others follow it."""
        free = done[np.array(starts[1:], int) - 1] + 1
        self.after = np.repeat([0, 0, *free][: len(starts)], chunks)
        """How many stripes must be taken before a chunk is decoded."""
        taken = np.concatenate([[0], self.ends[:-1]])
        ahead = np.concatenate([[0], self.decoded])[self.wanted] - taken
        self.until = taken + int(ahead.max()) + room
        """Per stripe, rows that may be decoded before it is taken."""


class Decoding:
    """One epoch from a pool: the tasks that decode, and the taking of rows.

    Tasks must be begun in the order in which they are handed out, and may run at the same time:
    each waits only for earlier ones. They never raise.
    """

    def __init__(self, pool: Pool, plan: DecodePlan, memory: np.ndarray) -> None:
        self._pool, self._plan, self._memory = pool, plan, memory
        self._changed, self._failed = Condition(), None
        self._is_decoded, self._decoded = np.zeros(len(plan.rows), bool), 0
        self._to_take, self._taken = np.diff(plan.ends, prepend=0).tolist(), 0
        self._asked, self._handed_out, self._ended = 0, 0, 0

    def tasks(self, stripe: int) -> list[Callable[[], None]]:
        """What must be begun before a stripe is taken: decode its chunks, and some that are wanted
        later, as many rows as were taken, if there are places."""
        plan, begin, end = self._plan, self._handed_out, int(self._plan.wanted[stripe])
        end = max(begin, end)
        while end < len(plan.rows) and (
            plan.decoded[end] <= plan.until[stripe] and plan.after[end] <= stripe
        ):
            end += 1
        until = max(self._asked, end - 1 + FETCHED_AHEAD)
        for view, chunk in plan.chunks[self._asked : until].tolist():
            self._pool.chunks.fetch(view, chunk)  # the disk begins with it
        self._asked, self._handed_out = until, end
        return [partial(self._decode, k) for k in range(begin, end)]

    def take(self, stripe: int, part: slice, out: np.ndarray) -> None:
        """Copy some rows of the epoch, which are of one stripe: uint8 (n, bytes of a row).

        Raises:
            LevelDamaged: a chunk or a row is not what was written.
        """
        plan = self._plan
        self._wait(lambda: self._decoded >= plan.wanted[stripe])
        where = plan.place[part]
        self._memory.take(where, axis=0, out=out, mode="clip")
        with self._changed:
            self._to_take[stripe] -= len(where)
            while self._taken < len(self._to_take) and not self._to_take[self._taken]:
                self._taken += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let go whoever waits, and give the memory back when no task writes to it any more."""
        with self._changed:
            self._failed = self._failed or RuntimeError("the epoch was left")
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended == self._handed_out)
        self._pool.spare = self._memory

    def _decode(self, k: int) -> None:
        """Decode the k-th chunk into its places."""
        plan, error = self._plan, None
        try:
            self._wait(lambda: self._taken >= plan.after[k])
            rows, begin = plan.rows[k], int(plan.begins[k])
            places = self._memory[begin : begin + len(rows)]
            self._pool.chunks.decode_some(int(rows.view[0]), rows.row, places)
            self._pool.checks.check(rows.view, rows.row, places)
        except BaseException as caught:
            error = caught
        with self._changed:
            self._ended += 1
            self._failed = self._failed or error
            self._is_decoded[k] = error is None
            while self._decoded < len(plan.rows) and self._is_decoded[self._decoded]:
                self._decoded += 1
            self._changed.notify_all()

    def _wait(self, reached: Callable[[], bool]) -> None:
        """Until some work is done. Raises what other work has failed with."""
        if not reached():
            with self._changed:
                self._changed.wait_for(lambda: self._failed or reached())
            if not reached() and self._failed is not None:
                raise self._failed.with_traceback(None)  # of whoever failed, not of who waited
