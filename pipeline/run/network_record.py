"""What a run keeps of a named network: a copy of its Python file, and what its blocks are.

    RUN/residual.py      where the recipe beside it looks for it
        network.json     the blocks: names, shapes, digests, operations, memory

So a run goes on wherever it is moved, and commands that only look at it make no block. The weights
of a block are loaded into what its source makes today, if that has the digest that is kept here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from strata.pipeline.recipe.named_network import NamedNetwork
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import record
from strata.pipeline.run.record import NETWORK
from strata.stages.network.blocks import Block
from strata.store.files import publish
from strata.store.files.publish import make_directory


def keep(directory: Path, recipe: Recipe) -> None:
    """Write what is not there yet. Raises RecipeError if blocks are to be made, and cannot be."""
    network = recipe.network
    if not isinstance(network, NamedNetwork):
        return
    if network.file and not (directory / network.file).exists():
        path = directory / network.file
        publish.replace(make_directory(path.parent), path.name, (network.code or "").encode())
    if not (directory / NETWORK).exists():
        body = {"blocks": [Block.as_json(layer) for layer in recipe.layers]}  # pyright: ignore
        record.write(directory / NETWORK, body)


def recalled(directory: Path, recipe: Recipe) -> Recipe:
    """The recipe with the blocks that were kept. A record that is damaged is as none: `verify`
    names it."""
    network, found = recipe.network, record.whole(directory / NETWORK)
    if not isinstance(network, NamedNetwork) or found is None:
        return recipe
    known = tuple(Block.of_json(one, network) for one in found["blocks"])
    return replace(recipe, network=replace(network, known=known))
