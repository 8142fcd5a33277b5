"""What exists of a run, as far as deciding what to do next is concerned."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Inventory:
    """What exists of a run, as far as deciding what to do next is concerned."""

    images: bool
    """x_0 is complete."""
    solved: int
    """Layers, from the first, that are solved and current."""
    written: frozenset[int]
    """Depths j ≥ 1 whose every level is complete and current."""
