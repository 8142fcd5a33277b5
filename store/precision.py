"""How values lie on disk: dtype, values per element, and what a hole in a level reads as.

The store keeps codes and knows nothing of what they mean; ``stages/features/quantise.py`` makes and
undoes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Precision:
    name: str
    """What recipes and commits call it."""
    dtype: np.dtype
    """The stored dtype, little-endian."""
    poison: float
    """Fill value: what a missing shard reads as, never what a whole written row holds."""
    packed: int = 1
    """Neighbours along x that share one stored element, the first in its lowest bits."""


PRECISIONS = {
    p.name: p
    for p in (
        Precision("float32", np.dtype("<f4"), float("nan")),
        Precision("float16", np.dtype("<f2"), float("nan")),
        # The bits of a bfloat16, which Zarr has no name for; the poison is a NaN of its own.
        Precision("bfloat16", np.dtype("<u2"), 0xFFC1),
        # Features use the codes 0 … 254. Images use all 256, so 255 is loud (a white row) but not
        # impossible; our own reader never meets a hole, because it opens levels by their commit.
        Precision("uint8", np.dtype("u1"), 255),
        # Two codes of 0 … 14 in a byte.
        Precision("uint4", np.dtype("u1"), 255, packed=2),
    )
}


def precision(name: str) -> Precision:
    """Look a precision up by name; ``KeyError`` lists the known ones."""
    try:
        return PRECISIONS[name]
    except KeyError:
        raise KeyError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}") from None
