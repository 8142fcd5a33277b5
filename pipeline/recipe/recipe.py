"""Recipes: what to train, as strict TOML with frozen dataclasses behind it.

A recipe is the science and nothing else; the machine (device, directories, budgets) is flags. Every
value is checked here, once, with the fix in the message; after loading nothing changes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from strata.pipeline.errors import RecipeError
from strata.pipeline.recipe.named_function import LOSSES, Loss, named_function, said
from strata.pipeline.recipe.named_network import NamedHead, NamedNetwork, named, named_head
from strata.pipeline.recipe.network import (
    AuxiliaryTable,
    NetworkTable,
    Window,
    without_later_defaults,
)
from strata.pipeline.recipe.strict import located, read, require, tables
from strata.pipeline.recipe.tables import AS_IT_IS, Augment, Cache, Claim, Compress, Data, Schedule
from strata.stages.network.blocks import AnyLayer, Block, Origin, scale_at, shape_at
from strata.stages.network.spec import AuxiliarySpec, Shape

ProblemSpec = tuple[AnyLayer, AuxiliarySpec]
"""Layer j and C_j."""


HEADS: dict[str, Any] = {
    "auxiliary": {"k": 1},
    "schedule": {"kind": "one-cycle", "epochs": 10, "batch": 128, "lr": 0.05},
}
"""Tables that a recipe may leave out which trains nothing but heads: a linear one."""


@dataclass(frozen=True)
class Recipe:
    data: Data
    augment: Augment
    network: NetworkTable | NamedNetwork
    auxiliary: AuxiliaryTable
    schedule: Schedule
    cache: Cache = field(default_factory=Cache)
    claim: Claim = field(default_factory=Claim)
    compress: Compress | None = None
    loss: Loss = field(default_factory=Loss)
    window: Window = field(default_factory=Window)

    def __post_init__(self) -> None:
        self.check_loss(self.schedule)
        require(
            not self.schedule.mixup or self.data.dtype != "int32",
            f"'schedule.mixup' is {self.schedule.mixup}, and x_0 is tokens ('data.dtype' is "
            "int32), which cannot be mixed: leave it out",
        )
        if self.compress:
            around = [f"'auxiliary.{name}'" for name in self.auxiliary.around]
            around += ["[window]"] * (self.window != Window())
            require(
                not around,
                f"[compress] is of the paper's problems: leave {' and '.join(around)} out",
            )
            if not isinstance(self.network, NetworkTable):
                raise RecipeError(
                    "[compress] removes filters of its layers: 'network' must be a table, not the "
                    f"name {self.network.name!r}"
                )
            keep, layers = self.compress.keep, self.network.layers
            count = len(keep) if isinstance(keep, tuple) else layers
            require(
                count == layers,
                f"'compress.keep' has {count} values; the network has {layers} layers",
            )
        if self.data.shape:
            require(
                isinstance(self.network, NamedNetwork) or self.data.targets == "sample",
                "'data.targets' is 'token', and layers of the table [network] give maps: name a "
                "network",
            )
            require(
                isinstance(self.network, NamedNetwork) or len(self.data.shape) == 3,
                f"'data.shape' is {list(self.data.shape)}, and layers of the table [network] are "
                "for maps (channel, y, x): name a network",
            )
        else:
            self._check_crop()
        if isinstance(self.network, NetworkTable) and self.data.classes:
            self.check_layers()

    def check_loss(self, schedule: Schedule) -> None:
        """Refuse a loss that does not suit how a problem is solved. Raises RecipeError."""
        for value, what in (
            (schedule.label_smoothing, "'schedule.label_smoothing' is of cross-entropy"),
            (self.compress, "[compress] judges filters by cross-entropy"),
            (self.auxiliary.similarity, "'auxiliary.similarity' is of class labels"),
        ):
            require(
                self.loss.kind == "cross-entropy" or not value,
                f"{what}, and 'loss.name' is {self.loss.called!r}: leave it out",
            )
        require(
            not (self.auxiliary.similarity and schedule.mixup),
            "'auxiliary.similarity' is of class labels, and 'schedule.mixup' mixes them: leave one "
            "of them out",
        )

    def _check_crop(self) -> None:
        a = self.augment
        require(
            not a.transform or a.views != "canvas",
            "'augment.transform' changes every image by itself, and with 'augment.views' "
            '"canvas" all crops are cut from one map: use 4 or more views, or 0',
        )
        require(
            a.crop <= self.canvas,
            f"'augment.crop' is {a.crop}; the canvas, 'data.size' + 2 · 'augment.pad', is "
            f"{self.canvas}",
        )
        require(
            not (a.views == 1 and self.is_random and not a.allow_single_view),
            "'augment.views' is 1 with random crops or flips: every epoch would see the same draw. "
            "Use 4 or more views, \"canvas\", or set 'augment.allow_single_view'",
        )

    def check_layers(self) -> None:
        """Refuse layers that do not suit x_0. A named network's blocks are made for it, so
        it is done only when somebody asks for them. Raises RecipeError."""
        a = self.augment
        require(
            self.given <= len(self.layers),
            f"'network.frozen' is {self.given}; {self.network.said} has {len(self.layers)} blocks",
        )
        sides = self.data.shape[1:] if isinstance(self.network, NetworkTable) else ()
        for side in sides if self.data.shape else (a.crop,):
            what = "a side of 'data.shape'" if self.data.shape else "augment.crop"
            self._check_divisible(what, side, len(self.layers))
        side = (*self.shape(len(self.layers), a.crop), 0)[1]
        require(
            side >= 2 or not self.auxiliary.final_hidden,
            f"'auxiliary.final_hidden' begins with max pooling over 2×2 pixels, and x_J has "
            f"{side}; enlarge 'augment.crop' or shorten {self.network.downsampled_by}",
        )
        if a.views == "canvas":
            self._check_divisible("the canvas", self.canvas, len(self.layers))
            self._check_divisible(
                "the border of the centre crop", self.centre, len(self.layers) - 1
            )
            for block in (layer for layer in self.layers if isinstance(layer, Block)):
                require(
                    block.local,
                    f"'augment.views' is \"canvas\", but block {block.index}, {block.name}, sees "
                    "more of a map than what lies around a place: what it makes of a canvas is "
                    "not what it makes of its crops. Use fixed views, or 0",
                )

    def _check_divisible(self, what: str, pixels: int, depth: int) -> None:
        scale = scale_at(self.layers, depth)
        require(
            pixels % scale == 0,
            f"{what} is {pixels} pixels, which {scale} (2^downsamplings up to x_{depth}) does not "
            f"divide; change 'augment.crop', 'augment.pad' or {self.network.downsampled_by}",
        )

    @property
    def canvas(self) -> int:
        """Side of the canvas in pixels."""
        return self.data.size + 2 * self.augment.pad

    @property
    def centre(self) -> int:
        """Offset of the centre crop in the canvas, in pixels."""
        return (self.canvas - self.augment.crop) // 2

    @property
    def is_random(self) -> bool:
        """Does augmentation draw anything?"""
        return self.augment.flip or self.canvas > self.augment.crop or bool(self.augment.transform)

    @property
    def functions(self) -> tuple[Origin, ...]:
        """The user's own loss and transform."""
        named = self.loss.name, self.augment.transform
        return tuple(one for one in named if isinstance(one, Origin))

    @cached_property
    def given(self) -> int:
        """Layers that are given, from the first: used as they are, and never trained."""
        frozen = self.network.frozen if isinstance(self.network, NamedNetwork) else 0
        return len(self._plain[0]) if frozen == "all" else int(frozen)

    @property
    def classifiers(self) -> tuple[AuxiliarySpec, ...]:
        """The classifier of every depth, whatever is around it."""
        return self._plain[1]

    @cached_property
    def _plain(self) -> tuple[tuple[AnyLayer, ...], tuple[AuxiliarySpec, ...]]:
        x_0, each = self.data.sample(self.augment.crop), self.data.targets == "token"
        layers = self.network.specs(x_0, self.data.dtype)
        side = (*shape_at(layers, len(layers), x_0), 0)[1]
        return layers, self.auxiliary.specs(layers, self.data.classes, side, each=each)

    def has_problem(self, j: int) -> bool:
        """Is there a problem whose first layer is j? Else it is given, or a window below has it."""
        return j > self.given and self.window.of(j, self.given)[0] == j

    def context_of(self, j: int) -> int | None:
        """Depth of the features that the classifier of layer j sees beside x_j; None: no others."""
        has = j <= len(self.auxiliaries) and self.auxiliaries[j - 1].context
        return self.auxiliary.context if has else None

    @cached_property
    def problems(self) -> tuple[ProblemSpec, ...]:
        """Layers and classifiers as they are solved: on x_{j-1} as it is kept, before [compress]
        removes filters of layer j itself."""
        x_0, layers = self.data.sample(self.augment.crop), list(self._plain[0])
        auxiliaries = self.auxiliary.networks(*self._plain, x_0, self.given, self.window)
        if self.compress:
            for j, below in enumerate(layers[:-1], start=1):
                kept = min((below.width, *self.compress.widths(j, below.width)))
                layers[j] = dataclasses.replace(layers[j], channels=kept)
        return tuple(zip(layers, auxiliaries, strict=True))

    def fine_tuned(self, j: int) -> tuple[ProblemSpec, ...]:
        """Problem j after each removal of filters, as it is fine-tuned; the last is what is kept.
        Empty where none are removed."""
        if not self.compress:
            return ()
        layer, auxiliary = self.problems[j - 1]
        return tuple(
            (dataclasses.replace(layer, width=n), dataclasses.replace(auxiliary, channels=n))
            for n in self.compress.widths(j, layer.width)
        )

    @cached_property
    def _kept(self) -> tuple[ProblemSpec, ...]:
        """Problems as they are left by [compress]."""
        return tuple((one, *self.fine_tuned(j))[-1] for j, one in enumerate(self.problems, 1))

    @cached_property
    def layers(self) -> tuple[AnyLayer, ...]:
        """The layers as they are kept: what x_1 … x_J are made with."""
        return tuple(layer for layer, _ in self._kept)

    @cached_property
    def auxiliaries(self) -> tuple[AuxiliarySpec, ...]:
        """The auxiliary classifiers C_1 … C_J as they are kept."""
        return tuple(auxiliary for _, auxiliary in self._kept)

    def shape(self, depth: int, size: int) -> Shape:
        """Shape of x_depth for an image (crop or canvas) of side ``size``."""
        known = self._shapes.setdefault(size, [self.data.sample(size)])
        known += (layer.output(known[-1]) for layer in self.layers[len(known) - 1 : depth])
        return known[depth]

    @cached_property
    def _shapes(self) -> dict[int, list[Shape]]:
        """Shapes of x_0 … so far, by the side of the image: a plan asks for them at every depth."""
        return {}

    def science(self) -> dict[str, Any]:
        """What decides the result, as JSON: all of the recipe but its claim and the data's path."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del parts["claim"]
        found = {name: without_later_defaults(t) for name, t in parts.items() if t is not None}
        del found["data"]["source"]
        found["loss"] = {"name": said(self.loss.name)}
        if self.augment.transform:
            found["augment"]["transform"] = said(self.augment.transform)
        if self.loss == Loss():
            del found["loss"]
        if self.window == Window():
            del found["window"]
        if self.data.shape:
            del found["augment"]
        for one in ("network", "auxiliary"):
            if isinstance(table := parts[one], NamedNetwork | NamedHead):
                found[one] = table.science()
        return found


def parse(text: str, name: str, folder: Path | None = None) -> Recipe:
    """A recipe from TOML text; ``name`` is for messages.

    Args:
        folder: where a Python file lies that the recipe names; None: here.

    Raises:
        RecipeError: not TOML, an unknown or missing key, a wrong type or a value out of bounds; or
            the file cannot be read.
    """
    try:
        found = tables(text)
        network: Any = found.get("network")
        data, augment = cast(Any, (found.get("data"), found.get("augment")))
        if isinstance(data, dict) and "shape" in data:
            keys = list(cast(Any, augment)) if isinstance(augment, dict) else []
            path = ".".join(["augment", *keys[:1]])
            require(
                augment is None,
                f"'{path}' is for images, and with 'data.shape' a sample is seen as it is: leave "
                "[augment] out",
            )
            found["augment"] = AS_IT_IS
        if isinstance(network, str) or (isinstance(network, dict) and "name" in network):
            found["network"] = given = named(cast(Any, network), folder or Path())
            found = {**(HEADS if given.frozen == "all" else {}), **found}
        for table, key, known in (("loss", "name", LOSSES), ("augment", "transform", ("",))):
            if isinstance(one := cast(Any, found.get(table)), dict) and key in one:
                how = folder or Path(), f"{table}.{key}", known
                found[table] = {**one, key: named_function(one[key], *how)}
        head: Any = found.get("auxiliary")
        if isinstance(head, str) or (isinstance(head, dict) and "name" in head):
            found["auxiliary"] = named_head(cast(Any, head), folder or Path())
        return read(Recipe, found)
    except RecipeError as error:
        raise RecipeError(f"recipe {name}: {located(text, error)}") from None
