"""A process for each rival, idle until told: what a library does to its process stays there, and
only one of them works at a time.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from feed_rivals import Rival
from google_crc32c import value as crc32c

PATIENCE = 600.0
"""Seconds without an answer after which a worker is taken to hang."""


class Timed(NamedTuple):
    seconds: float
    rows: int
    nbytes: int

    @property
    def rate(self) -> float:
        """GB/s of rows delivered."""
        return self.nbytes / self.seconds / 1e9


class Worker:
    """A rival in a process of its own, idle until told. Close it, or use it in a with statement."""

    def __init__(self, make: Callable[..., Rival], *arguments: object, **named: object) -> None:
        """``make(*arguments, **named)`` is called there, and is done on return."""
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, make, arguments, named))
        self._process.start()
        theirs.close()
        # At exit, multiprocessing waits for its processes, and this one waits for us.
        atexit.register(self.close)
        self._answer()

    def epoch(self, seed: int) -> Timed:
        """The time is that of the epoch alone, taken there."""
        return self._ask(_timed, seed)

    def digest(self, seed: int) -> int:
        """Sum of the crc32c of all rows: the same for all rivals that deliver every row once."""
        return self._ask(_digest, seed)

    def forget(self) -> None:
        self._ask(_forget, 0)

    def _ask(self, what: Callable[[Rival, int], Any], seed: int) -> Any:
        self._pipe.send((what, seed))
        return self._answer()

    def _answer(self) -> Any:
        with suppress(EOFError):
            if self._pipe.poll(PATIENCE):
                return self._pipe.recv()
        raise RuntimeError(f"a rival failed or hangs: {self._process}")

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        atexit.unregister(self.close)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _serve(pipe: Any, make: Callable[..., Rival], arguments: Any, named: Any) -> None:
    rival = make(*arguments, **named)
    pipe.send(None)
    with suppress(EOFError):  # the other end was closed
        while True:
            what, seed = pipe.recv()
            pipe.send(what(rival, seed))


def _timed(rival: Rival, seed: int) -> Timed:
    rival.prepare(seed)
    begun = time.perf_counter()
    delivered = rival.epoch(seed)
    return Timed(time.perf_counter() - begun, *delivered)


def _digest(rival: Rival, seed: int) -> int:
    sums: list[int] = []

    def look(batch: Any) -> None:
        rows = np.asarray(batch).reshape(len(batch), -1).view(np.uint8)
        sums.append(sum(crc32c(row) for row in rows))

    rival.prepare(seed)
    rival.epoch(seed, look)
    return sum(sums)


def _forget(rival: Rival, _: int) -> None:
    rival.forget()
    gc.collect()  # a map that is in a cycle is a map
