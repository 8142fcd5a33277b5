"""Ctrl-C and SIGTERM are honoured between two batches or two shards, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruptions:
    """Whether somebody asked us to stop."""

    def __init__(self, *, passed_on: bool = False) -> None:
        """
        Args:
            passed_on: a second signal may be the first one once more.
        """
        self.asked, self._passed_on = False, passed_on

    def check(self) -> None:
        """Stop here if asked to. Raises KeyboardInterrupt."""
        if self.asked:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self._passed_on:  # the second time, at once
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruptions(*, passed_on: bool = False) -> Iterator[Interruptions]:
    """Catch SIGINT and SIGTERM for the block; a second signal stops without waiting.

    Args:
        passed_on: by torchrun, which hands on the Ctrl-C that the terminal has sent us already:
            then a second signal says nothing new.
    """
    stop = Interruptions(passed_on=passed_on)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, stop._ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
