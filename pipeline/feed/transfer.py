"""Batches from the host to the device, copied ahead on a stream of their own.

A device buffer goes round: it is copied to once the stream that used its last content is done with
it, and used once the copy is done. A host buffer is held until its copy is done, and by then it
belongs to the reader's ring again. Nothing here waits on the host; the streams wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.feed.ring import Allocate, plain

AHEAD = 2
"""Batches copied ahead of the one in use."""


class Streams(Protocol):
    """A stream for copies beside the stream that uses what was copied; events between the two."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Begin a copy once the event ``after`` (None: at once) is reached; returns its event."""
        ...

    def wait(self, event: Any) -> None:
        """Let the using stream wait for an event."""
        ...

    def mark(self) -> Any:
        """An event behind all that the using stream was given so far."""
        ...

    def reached(self, event: Any) -> bool: ...


class CudaStreams:
    """The same, of a GPU. The using stream is the one that is current at each call."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event | None) -> Any:
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def mark(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def reached(self, event: torch.cuda.Event) -> bool:
        return event.query()


class Transfer:
    """Copies batches to device buffers that are allocated once."""

    def __init__(self, device: torch.device, streams: Streams) -> None:
        self._device, self._streams = device, streams
        self._buffers: list[Tensor] = []
        self._used: list[Any] = []
        """Per buffer, the event behind the last use of its content."""
        self._held: deque[tuple[Any, np.ndarray]] = deque()
        """Host batches whose copy is perhaps under way."""

    def __call__(self, batches: Iterator[np.ndarray]) -> Iterator[Tensor]:
        """The same batches on the device. Each is valid until the next one is asked for."""
        coming: deque[tuple[int, Tensor, Any]] = deque()
        for number, batch in enumerate(batches):
            coming.append(self._begin(number % (AHEAD + 1), batch))
            del batch
            if len(coming) > AHEAD:
                yield from self._use(*coming.popleft())
        while coming:
            yield from self._use(*coming.popleft())

    def _begin(self, slot: int, batch: np.ndarray) -> tuple[int, Tensor, Any]:
        while self._held and self._streams.reached(self._held[0][0]):
            self._held.popleft()
        source = torch.from_numpy(batch)
        target = self._buffer(slot, source.nbytes)[: source.nbytes]
        target = target.view(source.dtype).view(source.shape)
        ready = self._streams.copy(target, source, self._used[slot])
        self._held.append((ready, batch))
        return slot, target, ready

    def _use(self, slot: int, target: Tensor, ready: Any) -> Iterator[Tensor]:
        self._streams.wait(ready)
        yield target
        self._used[slot] = self._streams.mark()

    def _buffer(self, slot: int, nbytes: int) -> Tensor:
        if slot == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8, device=self._device))
            self._used.append(None)
        if self._buffers[slot].nbytes < nbytes:
            self._buffers[slot] = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            # The allocator may have taken it from what the using stream is not yet done with.
            self._used[slot] = self._streams.mark()
        return self._buffers[slot]


def host_memory(device: torch.device) -> Allocate:
    """Memory to copy to or from a device: for a GPU pinned, so that it reads by itself while the
    CPU goes on."""
    return _pinned if device.type == "cuda" else plain


def _pinned(nbytes: int) -> np.ndarray:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
