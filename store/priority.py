"""Who goes first where threads publish while others compute."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

STEP_BACK = 5
"""What is added to the niceness of threads that publish."""


def step_back() -> None:
    """Let those who compute go first: a forward pass runs on all cores at once, and waits for the
    one that was taken from it. Threads of this one step back with it."""
    if sys.platform == "linux":  # where threads have a priority of their own
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            nice = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(19, nice + STEP_BACK))
