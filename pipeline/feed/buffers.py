"""Memory for rows on the host, used again as soon as nobody holds it.

New memory is dear: its first touch costs a page fault per 4 KiB, which together take longer than
filling it. A buffer is free when the ring is the only one that refers to it. So whoever was given a
part of one may keep it as long as he likes, and lets it go by forgetting it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from sys import getrefcount

import numpy as np
import torch
from torch import Tensor

from strata.store.memory import PAGE, page_of

Allocate = Callable[[int], np.ndarray]
"""A number of bytes to a uint8 array of them."""
MAP_SLOTS = 2
"""Maps in use at once: the batch at work, and the next."""


def pageable(nbytes: int) -> np.ndarray:
    """Ordinary memory."""
    return np.empty(nbytes, np.uint8)


def host_memory(device: torch.device) -> Allocate:
    """Memory to copy to or from a device: for a GPU pinned, so that it reads by itself while the
    CPU goes on."""
    if device.type != "cuda":
        return pageable
    return lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()


class Ring:
    """Some buffers of one size, each beginning at a page."""

    def __init__(self, nbytes: int, slots: int, allocate: Allocate = pageable) -> None:
        self.nbytes, self._slots, self._allocate = nbytes, slots, allocate
        self._memory: list[np.ndarray] = []
        self._pages: list[np.ndarray] = []
        self._unused = 0
        self.more()
        self._unused = max(map(getrefcount, self._memory))

    def free(self) -> np.ndarray | None:
        """A buffer that nobody holds; None if there are as many as may be, and all are held.

        Views of a piece of memory, and tensors made of them, refer to what owns it: to the piece.
        """
        for number, holders in enumerate(map(getrefcount, self._memory)):
            if holders == self._unused:
                return self._pages[number][:]
        return self.more() if len(self._memory) < self._slots else None

    def take(self) -> np.ndarray:
        """A buffer in any case."""
        buffer = self.free()
        return self.more() if buffer is None else buffer

    def more(self) -> np.ndarray:
        """A buffer beyond their number, for whoever keeps all that he is given."""
        memory = self._allocate(self.nbytes + PAGE)
        self._memory.append(memory)
        self._pages.append(memory[page_of(memory, self.nbytes)])
        return self._pages[-1][:]


class MapBuffers:
    """Maps, or other samples, in a ring's buffers, on the CPU."""

    def __init__(self) -> None:
        self._ring = Ring(0, MAP_SLOTS)

    def take(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, lying: bool = True
    ) -> Tensor:
        """A tensor of any content; its own while it is held.

        Args:
            lying: lay it out with axis 1, the channel, last in memory: for maps (B, C, H, W).
        """
        nbytes = dtype.itemsize * prod(shape)
        if self._ring.nbytes < nbytes:
            self._ring = Ring(nbytes, MAP_SLOTS)
        flat = torch.from_numpy(self._ring.take()[:nbytes]).view(dtype)
        if not lying:
            return flat.view(*shape)
        rows, channels, *places = shape
        return flat.view(rows, *places, channels).movedim(-1, 1)
