"""Ctrl-C and SIGTERM are honoured between two batches or two shards, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

from strata.pipeline.progress import Reporter


class Interruptions:
    """Whether somebody asked us to stop. As a context it catches SIGINT and SIGTERM for the block;
    a second signal stops without waiting."""

    def __init__(self, *, passed_on: bool = False) -> None:
        """
        Args:
            passed_on: by torchrun, which hands on the Ctrl-C that the terminal has sent us already:
                then a second signal says nothing new.
        """
        self.asked, self._passed_on = False, passed_on

    def check(self) -> None:
        """Stop here if asked to. Raises KeyboardInterrupt."""
        if self.asked:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        here = threading.current_thread() is threading.main_thread()
        caught = (signal.SIGINT, signal.SIGTERM) if here else ()
        self._before = {number: signal.signal(number, self._ask) for number in caught}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self._passed_on:  # the second time, at once
            raise KeyboardInterrupt
        self.asked = True


def patience(stop: Interruptions, report: Reporter) -> Callable[[str], None]:
    """A function that is called while another process is waited for: it stops if somebody asks us
    to, and says once for whom we wait."""
    said = set[str]()

    def waiting(who: str) -> None:
        stop.check()
        if who not in said:
            said.add(who)
            report.say(f"{who}: waiting until it is done")

    return waiting
