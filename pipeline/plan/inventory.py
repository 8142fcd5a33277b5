"""What exists of a run, as far as deciding what to do next is concerned."""

from __future__ import annotations

from dataclasses import dataclass

from strata.pipeline.run.images import have_images
from strata.pipeline.run.levels import missing_at
from strata.pipeline.run.rundir import Run
from strata.store.feature_store import Store


@dataclass(frozen=True)
class Inventory:
    """What exists of a run, as far as deciding what to do next is concerned."""

    images: bool
    """x_0 is complete."""
    solved: int
    """Layers, from the first, that are solved and current."""
    written: frozenset[int]
    """Depths j ≥ 1 whose every level is complete and current."""


def inventory(run: Run | None, store: Store) -> Inventory:
    """Take stock of a run; one that was not made has nothing."""
    if run is None or run.data() is None:
        return Inventory(False, 0, frozenset())
    solved = run.solved()
    written = {j for j in range(1, solved + 1) if not missing_at(run, store, j)}
    return Inventory(have_images(run, store), solved, frozenset(written))
