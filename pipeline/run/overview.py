"""The run that a command speaks of, found without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from strata.pipeline.errors import LayerRange, NotThereYet
from strata.pipeline.plan.plan import Inventory, Plan
from strata.pipeline.recipe import builtin
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.run import rundir
from strata.pipeline.run.levels import inventory, is_current, keys_at
from strata.pipeline.run.record import RUN
from strata.pipeline.run.rundir import Run
from strata.pipeline.run.stores import open_store
from strata.store.feature_store import Place, Store
from strata.store.files.files import DISK


@dataclass(frozen=True)
class Overview:
    """A run, made or not yet."""

    name: str
    recipe: Recipe
    directory: Path
    run: Run | None
    store: Store
    text: str
    """The recipe's TOML."""
    held: object = None
    """Nobody removes the run while this lives."""

    def again(self, seed: int) -> Overview:
        """As the run is now, after another process may have had it."""
        held = DISK.share(self.directory / RUN)
        run = rundir.find_matching(self.directory, self.recipe, seed, self.text)
        return replace(self, run=run, held=held)

    def inventory(self) -> Inventory:
        """What exists of the run."""
        return inventory(self.run, self.store)

    def data(self) -> dict[str, Any] | None:
        """What the images turned out to be; None before they were read."""
        return self.run.data() if self.run else None

    def to_write(self, costs: Plan) -> int:
        """Bytes that are still to be written of what a whole run reads: x_0 … x_{J-1}, uncompressed
        where it is not known better."""
        todo = 0
        for depth in costs.depths[:-1]:
            keys = keys_at(self.run, depth.depth) if self.run else []
            there = {key.name for key in keys if is_current(self.store, key)}
            todo += sum(n for name, n in depth.levels.items() if name not in there)
        return todo

    def check_layer(self, j: int) -> None:
        """Refuse a layer that the network does not have. Raises LayerRange."""
        layers = len(self.recipe.layers)
        if not 1 <= j <= layers:
            raise LayerRange(
                f"layer {j} is out of range: recipe {self.name} has layers 1 … {layers}"
            )

    def existing(self) -> Run:
        """The run. Raises NotThereYet if it was not made."""
        if self.run is None:
            raise NotThereYet(f"there is no run in {self.directory}. Run: strata run {self.name}")
        return self.run

    def evaluation(self) -> dict[str, Any]:
        """The last evaluation of the run. Raises NotThereYet if no layer was solved."""
        found = self.existing().evaluation()
        if found is None:
            raise NotThereYet(
                f"no layer is solved in {self.directory}. Run: strata run {self.name}"
            )
        return found


def find(
    recipe: str, directory: Path | None, store: Place, seed: int, read_cache: str | None = None
) -> Overview:
    """Look up a recipe and its run.

    Raises:
        RecipeError: unknown recipe, or one that cannot be.
        RunConflict: the directory was made with another recipe or seed.
    """
    name, text, folder = builtin.text_of(recipe)
    loaded = parse(text, name, folder)
    place = directory or Path("runs") / name / str(seed)
    held, run = DISK.share(place / RUN), rundir.find_matching(place, loaded, seed, text)
    if run is not None:  # the same network, and perhaps it knows its blocks
        loaded = replace(loaded, network=run.recipe.network)
    loaded.check_layers()
    return Overview(name, loaded, place, run, open_store(store, read_cache), text, held)
