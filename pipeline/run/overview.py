"""The run that a command speaks of, found without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from strata.pipeline.errors import LayerRange, NotThereYet, RunConflict
from strata.pipeline.options import Options
from strata.pipeline.plan.plan import Inventory, Plan, Step
from strata.pipeline.progress import reporter
from strata.pipeline.recipe import builtin
from strata.pipeline.recipe.named_network import NamedNetwork
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.recipe.tables import Data
from strata.pipeline.run import record, rundir
from strata.pipeline.run.levels import inventory, is_current, keys_at
from strata.pipeline.run.record import NETWORK, RUN
from strata.pipeline.run.rundir import Run
from strata.pipeline.run.stores import check_places, open_store
from strata.store.feature_store import Store
from strata.store.files.files import DISK
from strata.store.fingerprint import differences


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

    def again(self, options: Options) -> Overview:
        """Look at the run again, after another process may have had it."""
        held, run = DISK.share(self.directory / RUN), rundir.find(self.directory)
        if run is not None:
            _check_matches(run, self.recipe, options)
        return replace(self, run=run, held=held)

    def inventory(self) -> Inventory:
        """What exists of the run."""
        return replace(inventory(self.run, self.store), given=self.recipe.given)

    @property
    def goal(self) -> dict[str, Any]:
        """What `run` makes, as :func:`plan.steps` is asked for it: all layers solved, or x_J where
        all are given."""
        layers = len(self.recipe.layers)
        return {"write" if self.recipe.given == layers else "solve": layers}

    def data(self) -> dict[str, Any] | None:
        """What the images turned out to be; None before they were read."""
        return self.run.data() if self.run else None

    def to_write(self, costs: Plan, steps: Sequence[Step]) -> int:
        """Bytes that steps have still to write, uncompressed where it is not known better."""
        todo = 0
        for depth in (costs.depths[step.j] for step in steps if step.kind != "solve"):
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
            below = [str(path.parent) for path in sorted(self.directory.glob(f"*/{RUN}"))]
            more = (
                f" There are runs in {', '.join(below[:3])}: name one with --run." if below else ""
            )
            text = f"there is no run in {self.directory}.{more} Run: strata run {self.name}"
            raise NotThereYet(text)
        return self.run

    def evaluation(self) -> dict[str, Any]:
        """The last evaluation of the run. Raises NotThereYet if no layer was solved."""
        found = self.existing().evaluation()
        if found is None:
            raise NotThereYet(
                f"no layer is solved in {self.directory}. Run: strata run {self.name}"
            )
        return found


def find(options: Options) -> Overview:
    """The recipe and the run that a command's options speak of.

    Raises:
        RecipeError: unknown recipe, or one that cannot be.
        OptionRange: a place is something else.
        RunConflict: the directory was made with another recipe or seed.
    """
    name, text, folder = builtin.text_of(options.recipe)
    loaded = parse(text, options.recipe, folder)
    if options.held_out is not None:
        loaded = replace(loaded, data=replace(loaded.data, split=options.held_out))
    place = options.run_dir or Path("runs") / name / str(options.seed)
    check_places(options.store, place)
    held, run = DISK.share(place / RUN), rundir.find(place)
    loaded = replace(loaded, data=complete(loaded.data, options, run))
    if run is not None:
        _check_matches(run, loaded, options)
        # The same network, and perhaps the run knows its blocks.
        loaded = replace(loaded, network=run.recipe.network)
    if isinstance(loaded.network, NamedNetwork) and not loaded.network.known:
        report = reporter(quiet=options.as_json)
        report.say(f"reading the blocks of {loaded.network.name}: this imports torch, once per run")
    loaded.check_layers()
    store = open_store(options.store, options.read_cache)
    return Overview(name, loaded, place, run, store, text, held)


def complete(data: Data, options: Options, run: Run | None = None) -> Data:
    """A recipe's [data] with all its numbers: what it leaves out is as the run has it, or, where
    there is none, as the data themselves have it. Raises DataError: they cannot be read."""
    if run is not None:
        return data.filled(run.facts["science"]["data"])
    if not ((missing := data.left_out) or data.split):
        return data
    from strata.stages.data.look import look

    source, report = options.data or data.source, reporter(quiet=options.as_json)
    wanted = f" for what the recipe leaves to it: {', '.join(missing)}" * bool(missing)
    report.say(f"looking at {source}{wanted}")
    how = {"root": options.data_root, "download": options.download}
    found = look(source, **how, form=data, size=data.size, channels=data.channels)
    known = {"classes": found.classes, **found.counts, "mean": found.mean, "std": found.std}
    return data.filled(known)


def _check_matches(run: Run, wanted: Recipe, options: Options) -> None:
    """Raises RunConflict unless a run was made from a recipe, its files and a seed."""
    wanted = _with_weights(run, wanted)
    place, asked = run.directory, {**wanted.science(), "seed": options.seed}
    found = differences({**run.recipe.science(), "seed": run.seed}, asked)
    if found := found + rundir.other_files(run, wanted.network):
        free = next(path for n in count(2) if not Path(path := f"{place}-{n}").exists())
        raise RunConflict(
            f"{place} was made with another recipe ({place / 'recipe.toml'}): "
            f"{'; '.join(found[:3])}{' …' if len(found) > 3 else ''}. Choose another directory "
            f"with --run: for {options.recipe} for example --run {free}"
        )


def _with_weights(run: Run, wanted: Recipe) -> Recipe:
    """A recipe with the digest of its weights: that of the run's, if the file is as it was, or
    gone; else the file is read. Raises as ``weights.begin_with``."""
    network, own = wanted.network, run.recipe.network
    if not isinstance(network, NamedNetwork) or not isinstance(own, NamedNetwork):
        return wanted
    if not network.weights:
        return wanted
    kept = (record.whole(run.directory / NETWORK) or {}).get("weights", {"stamp": None})
    stamp, digest = network.stamp, own.weights_digest
    if stamp != kept["stamp"] if stamp else network.weights != own.weights:
        from strata.pipeline.run.weights import digest_of

        digest = digest_of(network)
    return replace(wanted, network=replace(network, weights_digest=digest))
