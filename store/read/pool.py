"""Packed levels: rows between the decoding of their chunk and the batch that they go into."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Condition

import numpy as np

from strata.store.level.checks import Checks
from strata.store.level.level import Level
from strata.store.memory import aligned
from strata.store.read.decode_plan import DecodePlan
from strata.store.read.order import POOL_BYTES
from strata.store.read.packed import Chunks
from strata.store.read.rows import Reading, ReadTask, Rows, TakenRows

MOST_BYTES = 4 * POOL_BYTES
"""Most bytes of decoded rows: two windows, which together have at most three times POOL_BYTES, and
some room."""
ROOM_BYTES = 16 << 20
"""Bytes beyond those that must be there, so that chunks are decoded before the last moment."""
FETCHED_AHEAD = 32
"""Chunks that a disk is asked for before they are decoded: about 1 MiB each, before packing."""


class Pool(Rows):
    """Packed levels of equal geometry, and memory for their decoded rows."""

    def __init__(self, levels: Sequence[Level], *, mapped: bool = False) -> None:
        """
        Args:
            mapped: the packed bytes stay in the page cache, and are read there.
        """
        self.levels, self.checks = tuple(levels), Checks(levels)
        self.chunks = Chunks(levels, mapped=mapped)
        self.geometry = self.chunks.geometry
        self._spare = np.empty((0, self.geometry.row_bytes), np.uint8)

    def begin(self, stripes: Sequence[np.ndarray]) -> Reading:
        """Begin an epoch, as :meth:`Rows.begin` does. Where an order wants more places than there
        may be, because it was made for other chunks, every row costs a chunk."""
        room = max(1, ROOM_BYTES // self.geometry.row_bytes)
        chunk_of = self.chunks.of(np.concatenate(stripes))
        schedule = DecodePlan(stripes, chunk_of, self.geometry.chunk_rows, room)
        if schedule.places * self.geometry.row_bytes > MOST_BYTES:
            return TakenRows(self.levels).begin(stripes)
        return Decoding(self, schedule)

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


class Decoding(Reading):
    """One epoch from a pool: the tasks that decode, and the taking of rows.

    Tasks must be begun in the order in which they are handed out, and may run at the same time:
    each waits only for earlier ones.
    """

    def __init__(self, pool: Pool, schedule: DecodePlan) -> None:
        self._pool, self._schedule = pool, schedule
        self._memory = pool.lend(schedule.places)
        self._decoded = _Prefix([1] * len(schedule.chunks))
        self._taken = _Prefix(np.diff(schedule.ends, prepend=0).tolist())
        self._asked, self._handed_out, self._ended = 0, 0, 0
        self._quiet = Condition()

    def before(self, stripe: int) -> list[ReadTask]:
        """Decode the chunks that a stripe needs."""
        count = int(self._schedule.wanted[stripe]) - self._handed_out
        return [self._hand_out() for _ in range(count)]

    def after(self, stripe: int) -> list[ReadTask]:
        """Decode chunks wanted later: as many rows as were taken, if there are places."""
        schedule, tasks = self._schedule, []
        until = schedule.ends[stripe] + schedule.lead
        while (
            self._handed_out < len(schedule.chunks)
            and schedule.decoded[self._handed_out] <= until
            and schedule.after[self._handed_out] <= stripe
        ):
            tasks.append(self._hand_out())
        return tasks

    def take(self, stripe: int, part: slice, out: np.ndarray) -> None:
        """Copy some rows of a stripe: uint8 (n, bytes of a row).

        Raises:
            LevelDamaged: a chunk or a row is not what was written.
        """
        self._decoded.wait(int(self._schedule.wanted[stripe]))
        begin = int(self._schedule.ends[stripe - 1]) if stripe else 0
        where = self._schedule.place[begin : int(self._schedule.ends[stripe])][part]
        self._memory.take(where, axis=0, out=out, mode="clip")
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

    def _hand_out(self) -> ReadTask:
        k, self._handed_out = self._handed_out, self._handed_out + 1
        until = k + FETCHED_AHEAD
        for chunk in self._schedule.chunks[self._asked : until].tolist():
            self._pool.chunks.fetch(chunk)  # the disk begins with it
        self._asked = until
        return partial(self._decode, k)

    def _decode(self, k: int) -> None:
        """Decode the k-th chunk into its places."""
        try:
            schedule, chunks = self._schedule, self._pool.chunks
            chunk, begin = int(schedule.chunks[k]), int(schedule.begins[k])
            numbers = schedule.numbers[schedule.members[k]]
            self._taken.wait(int(schedule.after[k]))
            places = self._memory[begin : begin + len(numbers)]
            if schedule.whole[k]:
                chunks.decode(chunk, places)
            else:
                chunks.decode_some(chunk, numbers, places)
            self._pool.checks.check(numbers, places)
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
        if self._done >= count:
            return
        with self._changed:
            while self._done < count and self._failed is None:
                self._changed.wait()
            if self._done < count and self._failed is not None:
                raise self._failed.with_traceback(None)  # of whoever failed, not of who waited

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._failed = self._failed or error
            self._changed.notify_all()
