"""The device tier: all rows, as stored, in the memory of the device, gathered there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from strata.store.level.layout import Geometry

LOAD_BYTES = 32 << 20
"""Of rows that are copied to the device at a time."""

Read = Callable[[Sequence[np.ndarray]], Iterator[Tensor]]
"""Parts of row numbers to their stored rows on the device, each valid until the next."""


class Resident:
    """Rows of some levels, by number: view · rows + row."""

    def __init__(
        self,
        geometry: Geometry,
        views: int,
        device: torch.device,
        read: Read,
        tick: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """
        Args:
            read: used once for every row, in order.
            tick: called with the rows that were loaded since the last call.
        """
        rows, each = views * geometry.rows, max(1, LOAD_BYTES // geometry.row_bytes)
        parts = [np.arange(at, min(at + each, rows)) for at in range(0, rows, each)]
        kind = gathered(torch.from_numpy(np.empty(0, geometry.dtype)).dtype)
        self._rows = torch.empty((rows, *geometry.stored), dtype=kind, device=device)
        for part, found in zip(parts, read(parts), strict=True):
            self._rows[part[0] : part[-1] + 1] = found.view(kind)
            tick(len(part))

    def batches(self, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """The rows of each part, in the order asked for: memory of their own."""
        order = torch.from_numpy(np.concatenate([*parts, np.empty(0, np.int64)]))
        for index in order.to(self._rows.device).split([len(part) for part in parts]):
            yield self._rows.index_select(0, index)


def gathered(dtype: torch.dtype) -> torch.dtype:
    """A dtype of as many bits that a GPU can gather: it knows no uint16."""
    return torch.int16 if dtype == torch.uint16 else dtype
