"""Rows of packed levels, between the decoding of their chunk and the batch that they go into.

The order of an epoch is known beforehand, so everything else is, too: a chunk is decoded once,
before the first batch that wants one of its rows; its wanted rows get places in the pool, and each
place is free again when its row has gone into a batch. Chunks are decoded as early as places allow,
in the order in which they are first wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Condition

import numpy as np

from store.checks import Checks
from store.level import Level
from store.memory import aligned
from store.order import POOL_BYTES
from store.packed import Chunks
from store.rows import Reading, Rows, TakenRows, Task

MOST_BYTES = 3 * POOL_BYTES
"""Of places: a window of at most twice POOL_BYTES, the batches under way, and some room."""
AHEAD_BYTES = 32 << 20
"""Of places beyond those that must be there, so that chunks are decoded before the last moment."""


class Schedule:
    """Which chunks an epoch decodes, when at the latest, and into which places. Pure arithmetic."""

    def __init__(self, stripes: Sequence[np.ndarray], chunk_of: np.ndarray) -> None:
        """
        Args:
            stripes: numbers of the rows that are taken together, in the order of taking.
            chunk_of: int64, the chunk of every row of all stripes, one after another.
        """
        lengths = np.array([len(stripe) for stripe in stripes], np.int64)
        self.ends = np.cumsum(lengths)
        stripe_of = np.repeat(np.arange(len(stripes)), lengths)
        by_chunk = np.argsort(chunk_of, kind="stable")
        chunks, begins = np.unique(chunk_of[by_chunk], return_index=True)
        edges = np.append(begins, len(chunk_of))
        sequence = np.argsort(by_chunk[begins], kind="stable")
        self.chunks = chunks[sequence]
        """Chunks in the order of decoding."""
        self.members = [by_chunk[edges[k] : edges[k + 1]] for k in sequence.tolist()]
        """Per chunk, which rows of the epoch it holds, ascending."""
        firsts = np.array([stripe_of[m[0]] for m in self.members], np.int64)
        self.wanted = np.searchsorted(firsts, np.arange(len(stripes)), side="right")
        """Per stripe, how many chunks must be decoded before it is taken."""
        self.sizes = np.array([len(m) for m in self.members], np.int64)

    @property
    def places(self) -> int:
        """Rows that must have a place at once, at most, if every chunk is decoded at the latest."""
        decoded = np.concatenate([[0], np.cumsum(self.sizes)])[self.wanted]
        return int((decoded - np.concatenate([[0], self.ends[:-1]])).max(initial=0))


class Pool(Rows):
    """Packed levels of equal geometry, and memory for their decoded rows."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self.levels, self.chunks, self.checks = tuple(levels), Chunks(levels), Checks(levels)
        self.geometry = self.chunks.geometry
        self._spare = np.empty((0, self.geometry.row_bytes), np.uint8)

    def ready(self) -> None:
        self.chunks.check_sizes()

    def begin(self, stripes: Sequence[np.ndarray]) -> Reading:
        """As of :class:`Rows`. Where an order wants more places than there may be, because it was
        made for other chunks, every row costs a chunk."""
        schedule = Schedule(stripes, self.chunks.of(np.concatenate(stripes)))
        if schedule.places * self.geometry.row_bytes > MOST_BYTES:
            return TakenRows(self.levels).begin(stripes)
        return Decoding(self, stripes, schedule)

    def take(self, numbers: np.ndarray, out: np.ndarray) -> None:
        TakenRows(self.levels).take(numbers, out)

    def close(self) -> None:
        self.chunks.close()

    def lend(self, places: int) -> np.ndarray:
        """Memory of at least so many rows. It is kept from one epoch to the next: new memory costs
        more than what is done with it."""
        spare, self._spare = self._spare, self._spare[:0]
        if len(spare) >= places:
            return spare
        return aligned(places * spare.shape[1]).reshape(places, -1)

    def take_back(self, memory: np.ndarray) -> None:
        self._spare = memory


class Decoding:
    """One epoch from a pool: the tasks that decode, and the taking of rows.

    Tasks must be begun in the order in which they are handed out, and may run at the same time:
    each waits only for earlier ones.
    """

    def __init__(self, pool: Pool, stripes: Sequence[np.ndarray], schedule: Schedule) -> None:
        self._pool, self._numbers, self._schedule = pool, np.concatenate(stripes), schedule
        room = AHEAD_BYTES // pool.geometry.row_bytes
        self._memory = pool.lend(schedule.places + min(room, len(self._numbers)))
        self._places = np.empty(len(self._numbers), np.int64)
        self._free = list(range(len(self._memory)))
        self._handed_out, self._ended = 0, 0
        self._quiet = Condition()
        self._decoded = _Prefix([1] * len(self._schedule.chunks))
        self._taken = _Prefix([len(stripe) for stripe in stripes])

    def before(self, stripe: int) -> list[Task]:
        """What must be begun before the rows of a stripe are taken: the chunks it needs."""
        self._recover(stripe)
        count = int(self._schedule.wanted[stripe]) - self._handed_out
        return [self._hand_out(stripe) for _ in range(count)]

    def after(self, stripe: int) -> list[Task]:
        """What may be begun after it: chunks wanted later, as far as there are places."""
        tasks, sizes = [], self._schedule.sizes
        while self._handed_out < len(sizes) and sizes[self._handed_out] <= len(self._free):
            tasks.append(self._hand_out(stripe))
        return tasks

    def take(self, stripe: int, part: slice, out: np.ndarray) -> None:
        """Copy some rows of a stripe: uint8 (n, bytes of a row).

        Raises:
            LevelDamaged: a chunk or a row is not what was written.
        """
        self._decoded.wait(int(self._schedule.wanted[stripe]))
        where = self._places[self._rows(stripe)][part]
        np.take(self._memory, where, axis=0, out=out, mode="clip")
        self._taken.advance(stripe, len(where))

    def end(self) -> None:
        for prefix in (self._decoded, self._taken):
            prefix.fail(Left())

    def close(self) -> None:
        """Wait until no task writes to the memory any more, and give it back."""
        with self._quiet:
            self._quiet.wait_for(lambda: self._ended == self._handed_out)
        self._pool.take_back(self._memory)

    # ---- inside ---------------------------------------------------------------------------------

    def _rows(self, stripe: int) -> slice:
        ends = self._schedule.ends
        return slice(int(ends[stripe - 1]) if stripe else 0, int(ends[stripe]))

    def _recover(self, stripe: int) -> None:
        """Places of the stripe before this one are free once it has been taken."""
        if stripe:
            self._free += self._places[self._rows(stripe - 1)].tolist()

    def _hand_out(self, stripe: int) -> Task:
        k, self._handed_out = self._handed_out, self._handed_out + 1
        members = self._schedule.members[k]
        at = len(self._free) - len(members)
        self._places[members] = self._free[at:]
        del self._free[at:]
        self._pool.chunks.fetch(int(self._schedule.chunks[k]))
        return partial(self._decode, k, stripe)

    def _decode(self, k: int, stripe: int) -> None:
        """Decode the k-th chunk into places that the stripes before ``stripe`` have left."""
        try:
            chunks, members = self._pool.chunks, self._schedule.members[k]
            rows = chunks.empty()
            chunk = int(self._schedule.chunks[k])
            chunks.decode(chunk, rows)
            numbers = self._numbers[members]
            wanted = rows[numbers - chunks.rows(chunk)[0]]
            self._pool.checks.check(numbers, wanted)
            self._taken.wait(stripe)
            self._memory[self._places[members]] = wanted
            self._decoded.advance(k, 1)
        except BaseException as error:
            self._decoded.fail(error)
        with self._quiet:
            self._ended += 1
            self._quiet.notify_all()


class Left(Exception):
    """The epoch was left; nobody waits for this task any more."""


class _Prefix:
    """How many of some pieces of work, from the first on without a gap, are done."""

    def __init__(self, parts: list[int]) -> None:
        self._left, self._done = parts, 0
        self._changed, self._failed = Condition(), None

    def advance(self, piece: int, parts: int) -> None:
        """Some parts of a piece are done."""
        with self._changed:
            self._left[piece] -= parts
            while self._done < len(self._left) and not self._left[self._done]:
                self._done += 1
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        """Until the first ``count`` are done. Raises what one of them has failed with."""
        with self._changed:
            while self._done < count and self._failed is None:
                self._changed.wait()
            if self._done < count and self._failed is not None:
                raise self._failed

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._failed = self._failed or error
            self._changed.notify_all()
