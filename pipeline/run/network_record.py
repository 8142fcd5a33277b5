"""What a run keeps of a named network: a copy of its Python file, and what its blocks are.

    RUN/residual.py      where the recipe beside it looks for it
        weights.pt …     copies of what the file read beside itself
        network.json     the blocks: names, shapes, digests, operations, memory; what was read

So a run goes on wherever it is moved, and commands that only look at it make no block. The weights
of a block are loaded into what its source makes today, if that has the digest that is kept here.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import file_digest
from pathlib import Path
from typing import Any

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
        blocks: Any = recipe.layers
        body: dict[str, Any] = {"blocks": [Block.as_json(block) for block in blocks]}
        if read := sorted(blocks[0].source.read):
            home = _beside(network.folder, network)
            body |= {"read": {n: _sha256(home / n) for n in read}, "home": network.folder}
            for name in read:
                to = _beside(directory, network) / name
                if not to.exists():  # what lies elsewhere does
                    publish.replace(make_directory(to.parent), to.name, (home / name).read_bytes())
        record.write(directory / NETWORK, body)


def changed(directory: Path, network: NamedNetwork) -> list[str]:
    """Files that the run's network has read, which are others now in the recipe's folder. Those
    that are gone are not: the run has them."""
    read = (record.whole(directory / NETWORK) or {}).get("read", {})
    there = {n: path for n in read if (path := _beside(network.folder, network) / n).is_file()}
    return [name for name, path in there.items() if _sha256(path) != read[name]]


def _beside(folder: str | Path, network: NamedNetwork) -> Path:
    return Path(folder, network.file or "").parent


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def recalled(directory: Path, recipe: Recipe) -> Recipe:
    """The recipe with the blocks that were kept. A record that is damaged is as none: `verify`
    names it."""
    network, found = recipe.network, record.whole(directory / NETWORK)
    if not isinstance(network, NamedNetwork) or found is None:
        return recipe
    network = replace(network, home=found.get("home", ""), read=set(found.get("read", ())))
    known = tuple(Block.of_json(one, network) for one in found["blocks"])
    return replace(recipe, network=replace(network, known=known))
