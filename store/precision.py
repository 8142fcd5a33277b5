"""How values lie on disk: dtype, and the poison that a hole in a level reads as."""

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


PRECISIONS = {
    p.name: p
    for p in (
        Precision("float32", np.dtype("<f4"), float("nan")),
        Precision("float16", np.dtype("<f2"), float("nan")),
        # Images use all 256 codes, so 255 is loud (a white row) but not impossible; our own
        # reader never meets a hole, because it opens levels by their commit.
        Precision("uint8", np.dtype("u1"), 255),
    )
}


def precision(name: str) -> Precision:
    """Look a precision up by name; ``KeyError`` lists the known ones."""
    try:
        return PRECISIONS[name]
    except KeyError:
        raise KeyError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}") from None
