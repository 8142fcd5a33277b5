"""What a run keeps of auxiliary classifiers that a Python file makes: the file, and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from strata.pipeline.recipe.named_network import NamedHead, NamedNetwork
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import record
from strata.stages.network.blocks import Block
from strata.store.files import publish
from strata.store.files.publish import make_directory


def known(recipe: Recipe, kept: Mapping[str, Any]) -> Recipe:
    """The recipe of a run, with the figures that the record of its network has."""
    head = recipe.auxiliary
    if not isinstance(head, NamedHead):
        return recipe
    made = tuple(Block.of_json(one, head.source) for one in kept.get("heads", ()))
    return replace(recipe, auxiliary=replace(head, known=made))


def keep(directory: Path, recipe: Recipe) -> None:
    """Write the file, if there is one, what it has read beside itself, and, where layers are those
    of a table, the figures, if they are not there yet. Raises RecipeError: it will not do."""
    if not isinstance(recipe.auxiliary, NamedHead):
        return
    source = recipe.auxiliary.source
    if not (here := directory / (source.file or "")).exists():
        publish.replace(make_directory(here.parent), here.name, (source.code or "").encode())
    figures = told(recipe)
    for name in sorted(source.read):
        if not (to := here.parent / name).exists():
            original = Path(source.folder, source.file or "").parent / name
            publish.replace(make_directory(to.parent), to.name, original.read_bytes())
    path = directory / record.NETWORK
    if not isinstance(recipe.network, NamedNetwork) and not path.exists():
        record.write(path, {"blocks": [], **figures})


def told(recipe: Recipe) -> dict[str, Any]:
    """Figures of the classifiers, for the record of the network; empty where no file makes them."""
    found = [spec.head.as_json() for spec in recipe.auxiliaries if spec.head]
    return {"heads": found} if found else {}
