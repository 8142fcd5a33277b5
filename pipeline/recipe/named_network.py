"""``network = "torchvision:vgg13_bn"`` or ``"FILE.py:blocks"``: any network, as a chain of blocks.

In a recipe the string stands in place of the table ``[network]``; a table with ``name`` and
``arguments`` gives the function that makes the network arguments of its own, with ``weights`` the
file that its weights are from, and with ``frozen`` the number of layers that are given: used as
they are, and never trained. The file lies beside the recipe, or below; a run keeps a copy of it,
and what its blocks are, so that looking at a run needs neither the file nor torch.
docs/networks.md says what a block must be, docs/pretrained.md what weights may be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from strata.pipeline.errors import RecipeError
from strata.pipeline.recipe.network import AuxiliaryTable, seen_by
from strata.pipeline.recipe.strict import FEW, MOST, bounded, brief, read_text, require
from strata.stages.errors import UnusableNetwork
from strata.stages.home import home
from strata.stages.network.blocks import PACKAGES, AnyLayer, Block, Origin
from strata.stages.network.spec import AuxiliarySpec, Shape

VALUES = (bool, int, float, str)
"""What an argument may be."""
PUBLISHED = "torchvision:"
"""What names of weights begin with that torchvision publishes."""


@dataclass(frozen=True)
class NamedNetwork(Origin):
    """A network that something else than the recipe describes."""

    known: tuple[Block, ...] = field(default=(), repr=False, compare=False)
    """Its blocks, where a run has kept what they are."""
    weights: str = ""
    """File of the whole model's weights, or a name of torchvision's; empty: they are drawn."""
    frozen: int | str = 0
    """Layers that are given, from the first; ``all``: every one."""
    file_of_weights: Path | None = field(default=None, repr=False, compare=False)
    """Where the file lies, absolute; None: there is none."""
    weights_digest: str = ""
    """Digest of the tensors in that file; empty: it was not read."""

    downsampled_by: ClassVar[str] = "the network"
    """What messages say to change so that maps are larger."""

    @property
    def said(self) -> str:
        """The entry in a table's column of layers."""
        return self.name

    def specs(self, shape: Shape, dtype: str = "float32") -> tuple[Block, ...]:
        """The blocks, for an x_0 of a shape and dtype, such as (channel, y, x). If they are not
        known, this makes them, and imports torch.

        Raises:
            RecipeError: the network cannot be had, or its blocks cannot be trained one by one.
        """
        return self.known or _blocks(self, shape, dtype)

    @property
    def stamp(self) -> list[int] | None:
        """Size and time of the file of weights; None: there is none."""
        path = self.file_of_weights
        if path is None or not path.is_file():
            return None
        return [path.stat().st_size, path.stat().st_mtime_ns]

    def knowing(self, kept: Mapping[str, Any]) -> NamedNetwork:
        """This one, with what the record of a run's network has kept."""
        read = {"read": set(kept.get("read", ())), "home": kept.get("home", "")}
        place = kept.get("weights")
        found = replace(
            self, **read, file_of_weights=Path(place["file"]) if place else self.file_of_weights
        )
        return replace(found, known=tuple(Block.of_json(one, found) for one in kept["blocks"]))

    def science(self) -> dict[str, Any]:
        """The network's part of ``Recipe.science``."""
        parts = {"arguments": dict(self.arguments), "code": self.digest}
        parts |= {"weights": self.weights_digest, "frozen": self.frozen}
        return {"name": self.name, **{key: value for key, value in parts.items() if value}}


def listed(layers: Sequence[AnyLayer]) -> list[dict[str, Any]]:
    """The layers that are blocks, as `plan` describes them in JSON."""
    said = ("index", "name", "factor", "local", "digest")
    blocks = (layer for layer in layers if isinstance(layer, Block))
    return [{name: getattr(block, name) for name in said} for block in blocks]


@cache
def _blocks(source: Origin, shape: Shape, dtype: str) -> tuple[Block, ...]:
    from strata.stages.network.block_reading import read_blocks

    try:
        return read_blocks(source, shape, dtype)
    except UnusableNetwork as error:
        raise RecipeError(str(error)) from error


@dataclass(frozen=True)
class NamedHead(AuxiliaryTable):
    """Auxiliary classifiers that a Python file's function makes, from the shape of x_j and the
    number of classes."""

    k: int = 1
    source: NamedNetwork = field(default_factory=lambda: NamedNetwork(""))
    known: tuple[Block, ...] = field(default=(), repr=False, compare=False)
    """The classifiers, where a run has kept what they are."""

    def specs(
        self, layers: Sequence[AnyLayer], classes: int, side: int, *, each: bool = False
    ) -> tuple[AuxiliarySpec, ...]:
        """The auxiliary classifiers; if they are not known, this makes them, and imports torch.
        Arguments and errors as in the base class; also where the function will not do."""
        heads = self.known
        if len(heads) != len(layers) or heads[0].width != classes:
            scales = [prod(above.factor for above in layers[j:]) for j in range(1, len(layers) + 1)]
            sides = [side * scale for scale in scales]
            heads = [_head(self.source, *pair, classes) for pair in zip(layers, sides, strict=True)]
        fixed: Any = {"batch_norm": False, "bias": True, "each": each}
        return tuple(
            AuxiliarySpec(
                layer.width,
                1,
                0,
                classes,
                sees=seen_by(layer),
                digest=one.digest,
                head=one,
                **fixed,
            )
            for layer, one in zip(layers, heads, strict=True)
        )

    def knowing(self, kept: Mapping[str, Any]) -> NamedHead:
        """These, with the figures that a run has kept."""
        heads = tuple(Block.of_json(one, self.source) for one in kept.get("heads", ()))
        return replace(self, known=heads)

    def science(self) -> dict[str, Any]:
        """The classifiers' part of ``Recipe.science``."""
        return self.source.science()


@cache
def _head(source: Origin, layer: AnyLayer, side: int, classes: int) -> Block:
    from strata.stages.network.block_reading import read_head

    shape = layer.gives if isinstance(layer, Block) else (layer.width, side, side)
    try:
        return read_head(source, layer, shape, classes)
    except UnusableNetwork as error:
        raise RecipeError(str(error)) from error


def named_head(asked: str | Mapping[str, Any], folder: Path) -> NamedHead:
    """The classifiers that a recipe names under ``auxiliary``. Arguments and errors as in
    :func:`named`."""
    source = named(asked, folder, "auxiliary")
    only = next((key for key in ("weights", "frozen") if getattr(source, key)), "")
    require(not only, f"'auxiliary.{only}' is for the network: leave it out")
    require(bool(source.file), f"'auxiliary' is {source.name!r}; it must be \"FILE.py:FUNCTION\"")
    return NamedHead(source=source)


def named(asked: str | Mapping[str, Any], folder: Path, key: str = "network") -> NamedNetwork:
    """The network that a recipe names.

    Args:
        asked: what the recipe says under ``key``: a name, or a table with one.
        folder: the recipe's; a Python file is looked for from there.

    Raises:
        RecipeError: it is no name of that kind, or the file cannot be read.
    """
    table: dict[str, Any] = {"name": asked} if isinstance(asked, str) else dict(asked)
    name, arguments = table.pop("name"), table.pop("arguments", {})
    weights, frozen = table.pop("weights", ""), table.pop("frozen", 0)
    require(not table, f"unknown key '{key}.{next(iter(table), '')}' beside '{key}.name'")
    require(
        isinstance(name, str) and is_name(name),
        f'\'{key}\' is {name!r}; it must be a table, "torchvision:NAME", "timm:NAME" or '
        '"FILE.py:FUNCTION"',
    )
    require(isinstance(arguments, dict), f"'network.arguments' must be a table, got {arguments!r}")
    for key, value in arguments.items():
        path = f"network.arguments.{key}"
        require(
            key not in ("weights", "pretrained") or not name.startswith(PACKAGES),
            f"'{path}' is {brief(value)}: leave it out, and name the weights under "
            "'network.weights', a file or, for example, \"torchvision:IMAGENET1K_V1\"",
        )
        require(
            isinstance(value, VALUES),
            f"'{path}' must be a number, a string, true or false, got {brief(value)}",
        )
        if type(value) in MOST:
            bounded(type(value), value, path)
    network = NamedNetwork(name, tuple(arguments.items()), frozen=_frozen(frozen))
    if weights:
        require(
            isinstance(weights, str) and (weights.startswith(PUBLISHED) or _is_file(weights)),
            f"'network.weights' is {brief(weights)}; it must be a .safetensors, .pth or .pt file, "
            f'or a name of torchvision\'s weights, for example "{PUBLISHED}IMAGENET1K_V1"',
        )
        place = None if weights.startswith(PUBLISHED) else folder.absolute() / home(weights)
        network = replace(network, weights=weights, file_of_weights=place)
    if not network.file:
        return network
    return replace(network, code=text_of(folder, network.file), folder=str(folder.absolute()))


def _is_file(weights: str) -> bool:
    return Path(weights).suffix in (".safetensors", ".pth", ".pt")


def _frozen(value: Any) -> int | str:
    is_number = type(value) is int and 0 <= value <= FEW
    require(
        is_number or value == "all",
        f"'network.frozen' is {brief(value)}; it must be the number of layers that are given, from "
        'the first, or "all"',
    )
    return value


def is_name(name: str) -> bool:
    """Is it ``torchvision:NAME``, ``timm:NAME`` or ``FILE.py:FUNCTION``?"""
    place, colon, what = name.rpartition(":")
    if place == "timm":  # vit_small_patch16_224.augreg_in1k
        return bool(re.fullmatch(r"[\w.-]+", what))
    return bool(colon) and what.isidentifier() and (place == "torchvision" or place.endswith(".py"))


def text_of(folder: Path, file: str, key: str = "network") -> str:
    """The text of a Python file that a recipe names under a key. Raises RecipeError: it lies
    elsewhere, or cannot be read."""
    path = PurePosixPath(file)
    require(
        not path.is_absolute() and ".." not in path.parts,
        f"'{key}' names {file}; the file must lie beside the recipe, or below it",
    )
    try:
        return read_text(folder / file)
    except RecipeError as error:
        raise RecipeError(f"'{key}' names a file: {error}") from None
