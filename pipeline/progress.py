"""What people see while something long runs. The pipeline reports; how it looks is decided here.

On a terminal a bar with rate and time left; elsewhere a plain line now and then; for machines none.
All of it goes to stderr, so that stdout is left to results.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PLAIN_EVERY = 10.0
"""Seconds between plain lines."""


class Tick(Protocol):
    """A function that reports finished units of a task."""

    def __call__(self, done: int, note: str = "") -> None: ...


class Reporter:
    """A reporter that says nothing; the base of those that do."""

    def say(self, text: str) -> None:
        """Say one finished fact."""

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Tick]:
        """A task of ``total`` units; the tick adds finished units and may change the note."""
        yield lambda done, note="": None


class PlainReporter(Reporter):
    """A reporter that writes plain lines, for logs and pipes."""

    def say(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Tick]:
        begun = last = time.monotonic()
        count = 0

        def tick(done: int, note: str = "") -> None:
            nonlocal count, last
            count += done
            now = time.monotonic()
            if now - last >= PLAIN_EVERY:
                last = now
                text = progress_text(count, total, now - begun, unit)
                self.say(f"  {title}: {text}{note and ', ' + note}")

        yield tick


class BarReporter(Reporter):
    """A reporter that draws bars with rate and time left, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)

    def say(self, text: str) -> None:
        self.console.print(text)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Tick]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        texts = [
            TextColumn(t, markup=False) for t in ("  {task.description}", "{task.fields[text]}")
        ]
        columns = texts[0], BarColumn(), texts[1], TimeRemainingColumn()
        with Progress(*columns, console=self.console, transient=True) as bars:
            bar = bars.add_task(title, total=total, text="")

            def tick(done: int, note: str = "") -> None:
                bars.advance(bar, done)
                task = bars.tasks[bar]
                rate = task.completed / max(1e-9, task.elapsed or 0.0)
                bars.update(bar, text=f"{rate:,.0f} {unit}/s{note and ', ' + note}")

            yield tick


def reporter(*, quiet: bool) -> Reporter:
    """The reporter that fits: none, bars on a terminal, plain lines elsewhere."""
    if quiet:
        return Reporter()
    return BarReporter() if sys.stderr.isatty() else PlainReporter()


def progress_text(done: int, total: int, seconds: float, unit: str) -> str:
    """``"12,800 of 50,000 (26 %), 410 images/s, 1 min 31 s left"``"""
    rate = done / max(seconds, 1e-9)
    left = duration((total - done) / rate) if done else "unknown time"
    share = f"{100 * done // max(1, total)} %"
    return f"{done:,} of {total:,} ({share}), {rate:,.0f} {unit}/s, {left} left"


def duration(seconds: float) -> str:
    """``"0.25 s"``, ``"8.2 s"``, ``"3 min 05 s"``, ``"2 h 07 min"``"""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(nbytes: float) -> str:
    """Decimal bytes: ``"26.2 GB"``"""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        nbytes /= 1000
        if nbytes < 999.95:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1000:.1f} TB"


def parse_size(text: str) -> int:
    """``"20GB"``, ``"1.5 TB"``, ``"512MiB"`` or a number of bytes; else ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?)(i?)[bB]?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 20GB")
    step = 1024 if match[3] else 1000
    found = float(match[1]) * step ** " KMGT".index(match[2].upper() or " ")
    if found >= 2**63:
        raise ValueError(f"{text[:20]!r} is more than any disk or memory has")
    return int(found)
