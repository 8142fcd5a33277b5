"""Random orders and draws as pure functions of named keys: no state to save."""

from __future__ import annotations

import hashlib
import json

import numpy as np


def key_of(*words: str | int) -> int:
    """128-bit integer that depends on every word and on their order."""
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:16], "little")


def generator(*words: str | int) -> np.random.Generator:
    """Counter-based generator (Philox) keyed by words: ``("epoch order", seed, epoch)``."""
    return np.random.Generator(np.random.Philox(key=key_of(*words)))


def epoch_order(rows: int, seed: int, depth: int, epoch: int) -> np.ndarray:
    """The order in which epoch ``epoch`` of problem ``depth + 1`` visits the rows of x_depth.

    Returns:
        int64 (rows,), a permutation.
    """
    return generator("epoch order", seed, depth, epoch).permutation(rows)


def batches(order: np.ndarray, batch: int, *, drop_last: bool, start: int = 0) -> list[np.ndarray]:
    """Cut an order into batches, skipping the first ``start`` of them.

    Rows are ascending inside each batch: which rows share a batch is the random part, and reading
    them in file order costs fewer seeks.
    """
    full = len(order) // batch if drop_last else -(-len(order) // batch)
    return [np.sort(order[b * batch : (b + 1) * batch]) for b in range(start, full)]


def batch_count(rows: int, batch: int, *, drop_last: bool) -> int:
    """Batches in one epoch."""
    return rows // batch if drop_last else -(-rows // batch)
