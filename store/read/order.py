"""Random orders and draws as pure functions of named keys: no state to save."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from strata.store.level.layout import Geometry


def key_of(*words: str | int) -> int:
    """128-bit integer that depends on every word and on their order."""
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:16], "little")


def generator(*words: str | int) -> np.random.Generator:
    """Counter-based generator (Philox) keyed by words: ``("epoch order", seed, epoch)``."""
    return np.random.Generator(np.random.Philox(key=key_of(*words)))


POOL_BYTES = 112 << 20
"""Where rows are drawn in blocks, so many bytes of them are mixed at least, and at most twice."""


@dataclass(frozen=True)
class Mixing:
    """How the rows of a level are shuffled: in blocks of neighbours, where a row by itself is dear.

    Blocks are visited in a random order, in windows of many, and the rows of a window are shuffled.
    Since the rows of a level lie in a random order, that is still a uniform shuffle in the first
    epoch; later on, rows of one block meet in a batch a little too often (:meth:`same_block`). One
    row per block, or one window, is an exact shuffle of every row.
    """

    rows: int
    block: int = 1
    """Rows of a block: an inner chunk of a packed level, whose rows are decoded together."""
    pool: int = 1
    """A window has at least so many rows."""

    @property
    def windows(self) -> int:
        return 1 if self.block == 1 else max(1, self.rows // self.pool)

    def order(self, seed: int, depth: int, epoch: int) -> np.ndarray:
        """The order in which epoch ``epoch`` of problem ``depth + 1`` visits the rows of x_depth:
        int64 (rows,), a permutation."""
        if self.windows == 1:
            return generator("epoch order", seed, depth, epoch).permutation(self.rows)
        blocks = generator("block order", seed, depth, epoch).permutation(
            -(-self.rows // self.block)
        )
        shuffle = generator("order in windows", seed, depth, epoch).permutation
        windows = []
        for part in np.array_split(blocks, self.windows):
            rows = (part[:, None] * self.block + np.arange(self.block)).ravel()
            windows.append(shuffle(rows[rows < self.rows]))
        return np.concatenate(windows)

    @property
    def same_block(self) -> float:
        """Share of the pairs of a batch that come from one block, (block - 1) / (window - 1); 0 for
        an exact shuffle, which is what the last share is compared with."""
        return 0.0 if self.windows == 1 else (self.block - 1) / (self.rows // self.windows - 1)


def mixing(geometry: Geometry) -> Mixing:
    """How a level of this geometry is shuffled: raw ones exactly, packed ones in their chunks.

    A function of the geometry alone, not of the machine: so a run on another one, or one that is
    taken up when memory is short, sees the same order.
    """
    if geometry.profile == "raw":
        return Mixing(geometry.rows)
    return Mixing(geometry.rows, geometry.chunk_rows, max(1, POOL_BYTES // geometry.row_bytes))


def batches(
    order: np.ndarray, batch: int, *, drop_last: bool, start: int = 0
) -> tuple[np.ndarray, list[int]]:
    """Cut an order into batches, skipping the first ``start`` of them: their rows, one batch after
    another, and their lengths. The order is sorted in place: new memory costs more than sorting.

    Rows are ascending inside each batch: which rows share a batch is the random part, and reading
    them in file order costs fewer seeks.
    """
    full = len(order) // batch * batch
    rows = order[start * batch : full if drop_last else len(order)]
    whole = len(rows) // batch * batch
    rows[:whole].reshape(-1, batch).sort(axis=1)
    rows[whole:].sort()
    return rows, cut(len(rows), batch)


def cut(rows: int, most: int) -> list[int]:
    """Lengths of parts of some rows; the last is perhaps shorter."""
    rest = rows % most
    return [most] * (rows // most) + ([rest] if rest else [])


def parts(numbers: np.ndarray, most: int) -> list[np.ndarray]:
    """An array in parts of so many; the last is perhaps shorter."""
    return [numbers[at : at + most] for at in range(0, len(numbers), most)]


def batch_count(rows: int, batch: int, *, drop_last: bool) -> int:
    """Batches in one epoch."""
    return rows // batch if drop_last else -(-rows // batch)
