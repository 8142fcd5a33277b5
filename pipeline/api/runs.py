"""Runs from Python: one that a directory holds, and a recipe done as `strata run` does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from strata.pipeline.api.features import LevelFeatures
from strata.pipeline.commands import run as commands
from strata.pipeline.curves import curve_of
from strata.pipeline.errors import LayerRange, NotThereYet, OptionRange, own_errors, remedy
from strata.pipeline.feed.features import frozen_layer, frozen_layers
from strata.pipeline.options import Options
from strata.pipeline.recipe.augmentation import views_at
from strata.pipeline.results.exported import ExportedNetwork
from strata.pipeline.run import rundir
from strata.pipeline.run.record import CURVE
from strata.pipeline.run.stores import open_store
from strata.stages.data.images import SPLITS
from strata.store.errors import LevelAbsent
from strata.store.feature_store import is_url
from strata.store.level.layout import LevelKey


class OpenRun:
    """A run: what one recipe and seed have given so far, in a directory. It is looked at anew with
    every call, and never changed."""

    def __init__(self, directory: Path | str, store: Path | str = "features") -> None:
        """
        Args:
            store: where the run's features are: a directory, or ``s3://BUCKET/PREFIX``.

        Raises:
            NotThereYet: there is no run in the directory.
            RunConflict: its recipe was edited since it was made.
        """
        self.directory, self.store = Path(directory), open_store(store)
        self._run()

    def __repr__(self) -> str:
        run = self._run()
        return f"<Run {run.name}, {run.solved()} of {run.layers} layers, in {self.directory}>"

    @property
    def records(self) -> dict[str, Any]:
        """What the run has recorded: ``run`` (recipe, seed, versions), ``data`` (digest, counts,
        classes), ``layers`` (of each that is solved its figures, and ``curve``, a dict for every
        epoch) and ``evaluation``. None, or an empty list, before there is anything."""
        run, layers = self._run(), list[dict[str, Any]]()
        for j in range(1, run.solved() + 1):
            path = run.layer_directory(j) / CURVE
            with own_errors():
                curve = curve_of(path) if path.exists() else []  # of a given layer
            layers.append({**(run.layer(j) or {}), "curve": list(curve)})
        facts = {"run": dict(run.facts), "data": run.data()}
        return facts | {"layers": layers, "evaluation": run.evaluation()}

    def network(self, layer: int | None = None) -> nn.Module:
        """What was trained, in eval mode on the CPU.

        Args:
            layer: j: layer j, from x_{j-1} to x_j before it is rounded; layer 1 from float32
                images, (pixel / 255 - mean) / std. None: the whole network, from uint8 images
                (n, channel, y, x) of any size to logits (n, classes), or to x_J where all layers
                are given.

        Raises:
            LayerRange, OptionRange, NotThereYet: there is no such layer, or it is not solved; or
                all are asked for, and samples are no images.
            LevelDamaged: weights are not those that the layer's record speaks of.
        """
        with own_errors():
            run = self._run(layer)
            if layer is not None:
                return frozen_layer(run, layer, torch.device("cpu")).layer
            if run.solved() < run.layers:
                raise NotThereYet(f"{run.solved()} of {run.layers} layers are solved: {run.name}")
            if run.recipe.data.shape:
                raise OptionRange("the whole network is given for images alone: name a layer")
            every = frozen_layers(run, range(1, run.layers + 1), torch.device("cpu"))
            return ExportedNetwork(run, every, features=run.recipe.given == run.layers)

    def features(self, j: int, split: str = "train") -> LevelFeatures:
        """x_j of a split, all its views; x_0 are the images.

        Args:
            split: ``train`` or ``test``.

        Raises:
            LayerRange, OptionRange: there is no such layer, or split.
            NotThereYet, LevelAbsent: x_j is not written; says the command that writes it.
            LevelDamaged: a file is not what was written.
        """
        with own_errors():
            run = self._run(j or None)
            if split not in SPLITS:
                raise OptionRange(f"split is {split!r}; it may be {' or '.join(SPLITS)}")
            nodes = run.nodes()
            if not nodes:
                raise NotThereYet(f"{self.directory} has read no images yet")
            views = views_at(run.recipe, j, split)
            keys = [LevelKey(j, nodes[j].fingerprint, split, view) for view in views]
            if not keys:
                raise NotThereYet(f"x_{j} of {split} is never written: 'augment.views' is 0")
            recipe = f"{self.directory / 'recipe.toml'} --run {self.directory}"
            told = f"strata materialize {recipe} --store {self.store.root} --layer {j}"
            with remedy(LevelAbsent, f"Run: {told}"):
                return LevelFeatures([self.store.open(key) for key in keys])

    def _run(self, layer: int | None = None) -> rundir.Run:
        """The run as it is now, which must have solved a layer."""
        with own_errors():
            run = rundir.find(self.directory)
        if run is None:
            raise NotThereYet(f"there is no run in {self.directory}: `strata run` makes one")
        if layer is not None and not 1 <= layer <= run.layers:
            raise LayerRange(f"layer {layer} is out of range: {run.name} has 1 … {run.layers}")
        if (layer or 0) > run.solved():
            raise NotThereYet(f"layer {layer} is not solved in {self.directory}")
        return run


Run = OpenRun
"""The class, under the name that people use."""


def open_run(path: Path | str, store: Path | str = "features") -> OpenRun:
    """The run in a directory, such as ``runs/digits/0``. Arguments and errors: :class:`OpenRun`."""
    return OpenRun(path, store)


def run(
    recipe: Path | str,
    *,
    directory: Path | str | None = None,
    store: Path | str = "features",
    seed: int = 0,
    data: str | None = None,
    device: str = "auto",
    progress: bool = True,
    **options: Any,
) -> OpenRun:
    """Do what is missing of a recipe: solve every layer from cached features, evaluate, report.

    Args:
        recipe: a built-in name, or the path of a TOML file.
        directory: of the run; None: ``runs/RECIPE/SEED``.
        data: other images for the recipe: ``imagefolder:PATH``, ….
        progress: say on stderr what is done.
        options: any other flag of `strata run`, with ``_`` for ``-``; sizes in bytes.

    Raises:
        TypeError: `strata run` has no such flag.
        Whatever makes the command end with an exit code (docs/commands.md): RecipeError, DataError,
        BudgetError, RunConflict, Diverged, DiskFull, …
    """
    told: Any = {"store": store if is_url(store) else Path(store), "as_json": not progress}
    told |= {"run_dir": directory and Path(directory), "seed": seed, "data": data}
    with own_errors():
        answer = commands.run(Options(str(recipe), device=device, **told, **options))
    return OpenRun(answer.value["run"], store)
