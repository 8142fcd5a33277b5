"""Batches from the host to the device, copied ahead on a stream of their own.

A device buffer goes round: it is copied to once the stream that used its last content is done with
it, and used once the copy is done. A host buffer is held until its copy is done, and by then it
belongs to the reader's ring again. Nothing here waits on the host; the streams wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Event = torch.Event | torch.cuda.Event
AHEAD = 2
"""Batches copied ahead of the one in use."""


class CudaStreams:
    """A stream for copies beside the stream that uses what was copied, the one that is current at
    each call; and events between the two."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor, after: Event | None) -> Event:
        """Begin a copy once the event ``after`` (None: at once) is reached; returns its event."""
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, event: Event) -> None:
        """Let the using stream wait for an event."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def mark(self) -> Event:
        """An event behind all that the using stream was given so far."""
        return torch.cuda.current_stream(self._device).record_event()


class Transfer:
    """Copies batches to device buffers that are allocated once."""

    def __init__(self, device: torch.device, streams: CudaStreams) -> None:
        self._device, self._streams = device, streams
        self._buffers: list[Tensor] = []
        self._used: list[Event | None] = []
        """Per buffer, the event behind the last use of its content."""
        self._held: deque[tuple[Event, np.ndarray]] = deque()
        """Host batches whose copy is perhaps under way."""

    def __call__(self, batches: Iterator[np.ndarray]) -> Iterator[Tensor]:
        """Copies of batches on the device. Each is valid until the next one is asked for."""
        coming: deque[tuple[int, Tensor, Event]] = deque()
        for number, batch in enumerate(batches):
            coming.append(self._begin(number % (AHEAD + 1), batch))
            del batch
            if len(coming) > AHEAD:
                yield from self._use(*coming.popleft())
        while coming:
            yield from self._use(*coming.popleft())

    def _begin(self, slot: int, batch: np.ndarray) -> tuple[int, Tensor, Event]:
        while self._held and self._held[0][0].query():
            self._held.popleft()
        source = torch.from_numpy(batch)
        target = self._buffer(slot, source.nbytes)[: source.nbytes]
        target = target.view(source.dtype).view(source.shape)
        ready = self._streams.copy(target, source, self._used[slot])
        self._held.append((ready, batch))
        return slot, target, ready

    def _use(self, slot: int, target: Tensor, ready: Event) -> Iterator[Tensor]:
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
