"""Standard streams that cannot fail the work, whatever they are: closed, full, broken, or not of
UTF-8. A character that a stream cannot hold is written as its number, ``\\u2026``."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Any


class Stream(io.FileIO):
    """The bytes of stdout or stderr. What it refuses is lost, and the work goes on."""

    lost: OSError | None = None
    """Why the first bytes were lost."""

    def write(self, data: Any) -> int:
        try:
            while (taken := super().write(data)) is None:  # others made it one that does not wait
                select.select((), (self,), ())
            return taken
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


def install() -> None:
    """Put them in the place of Python's own; streams that somebody else put there stay, and need
    not hold every character either.

    A closed one becomes /dev/null. Its number would otherwise be that of the next file opened, and
    whatever a library prints would go into that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if (now := getattr(sys, name)) is getattr(sys, f"__{name}__"):
            raw, encoding = Stream(number, "w", closefd=False), now.encoding if now else "utf-8"
            shown = io.TextIOWrapper(
                io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=number == 2
            )
            setattr(sys, name, shown)
        elif isinstance(now, io.TextIOWrapper):
            now.reconfigure(errors="backslashreplace")


@contextmanager
def silenced() -> Iterator[None]:
    """What is written to stdout, by this process or by those that it starts, goes to stderr."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        with suppress(OSError):  # stdout or stderr is closed
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        yield


def lost() -> str | None:
    """Why some of the answer on stdout was lost; None: it was not, or its reader went away, as
    ``head`` does."""
    sys.stdout.flush()
    error = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)
    return None if error is None or isinstance(error, BrokenPipeError) else error.strerror
