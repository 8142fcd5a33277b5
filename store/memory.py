"""Memory that begins at a page.

Copying is what reading rows comes down to, and on some processors (AMD's Zen 3, measured in
docs/performance.md) a copy whose target lies 1 to 31 bytes further into its page than its source
runs at a seventh of the rate. Rows in files begin at a page or at a round part of one, and ordinary
memory 16 bytes after one: exactly the bad case.
"""

from __future__ import annotations

import mmap

import numpy as np

PAGE = mmap.PAGESIZE


def aligned(nbytes: int) -> np.ndarray:
    """New memory, uint8 (nbytes,), that begins at a page."""
    memory = np.empty(nbytes + PAGE, np.uint8)
    return memory[page_of(memory, nbytes)]


def page_of(memory: np.ndarray, nbytes: int) -> slice:
    """Where in some memory its first page begins, and the ``nbytes`` from there."""
    begin = -memory.ctypes.data % PAGE
    return slice(begin, begin + nbytes)
