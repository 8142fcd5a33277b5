"""A recipe's [network], [window] and [auxiliary] tables, checked, and the layers that they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from strata.pipeline.recipe.strict import FEW, one_of, positive, require
from strata.pipeline.recipe.tables import SPLIT
from strata.stages.network.blocks import AnyLayer, Block, scale_at, shape_at
from strata.stages.network.spec import AuxiliarySpec, LayerSpec, Shape, sampled

DRAWS = ("flips", "stride")
"""Keys of [augment] that say how a fixed view is drawn beyond the seed."""
TENSORS = ("shape", "dtype", "targets")
"""Keys of [data] about what is no image."""
TRAINING = ("optimizer", "label_smoothing", "mixup")
"""Keys of [schedule] beyond SGD on plain labels."""
FORMS = ("pool", "widths", "half_resolution", "final_hidden")
AROUND = ("copies", "patches", "similarity", "context")
"""Keys of [auxiliary] about what is around a classifier."""
LATER = (*FORMS, *AROUND, "transform", *TENSORS, *SPLIT, *DRAWS, *TRAINING)
"""Keys that recipes did not have from the beginning."""
KINDS = {
    "map": "a map",
    "tokens": "tokens",
    "places": "no map of channels, y and x",
    "vector": "a vector",
}
"""What x_j may be, in words."""


@dataclass(frozen=True)
class NetworkTable:
    """A recipe's [network]: a chain of layers by their number, width and downsampling."""

    layers: int
    """J."""
    width: int
    """M, channels of x_1."""
    downsample: tuple[int, ...] = ()
    """The paper's j of P_j: x_j is downsampled before layer j + 1, which doubles the width."""
    stem: int = 0
    """How often the image is downsampled before layer 1 convolves it (ImageNet: 1)."""
    batch_norm: bool = False
    """Batch normalisation after every convolution."""
    bias: bool = True
    """A bias in every convolution."""
    pool: str = "invertible"
    """P: the paper's ``invertible`` downsampling, or ``max`` pooling over 2×2 pixels (VGG)."""
    widths: tuple[int, ...] = ()
    """Channels of x_1 … x_J, where they do not follow from M and P; the first is M."""

    def __post_init__(self) -> None:
        positive("network", FEW, layers=self.layers)
        positive("network", width=self.width)
        require(0 <= self.stem < 16, f"'network.stem' is {self.stem}; it must be in 0 … 15")
        for j in self.downsample:
            require(
                1 <= j < self.layers,
                f"'network.downsample' names x_{j}; with {self.layers} layers it may name "
                f"x_1 … x_{self.layers - 1}",
            )
        one_of("network.pool", self.pool, ("invertible", "max"))
        if not self.widths:
            return
        given, m = self.widths, self.width
        require(
            len(given) == self.layers,
            f"'network.widths' has {len(given)} values; 'network.layers' is {self.layers}",
        )
        require(given[0] == m, f"'network.widths' begins with {given[0]}; 'network.width' is {m}")
        require(min(given) > 0, f"'network.widths' is {list(given)}; each must be above 0")

    downsampled_by: ClassVar[str] = "'network.downsample'"
    """What messages say to change so that maps are larger."""

    @property
    def said(self) -> str:
        """The entry in a table's column of layers."""
        return str(self.layers)

    def specs(self, shape: Shape, dtype: str = "float32") -> tuple[LayerSpec, ...]:
        """The J layers, for maps of so many channels, and of any side and dtype. Output width
        equals input width, or twice that after a P (Sec. 4, naming), if ``widths`` does not say it.
        The stem is invertible whatever P is between layers."""
        found: list[LayerSpec] = []
        inputs, outputs = shape[0], self.width
        for j in range(1, self.layers + 1):
            times = self.stem if j == 1 else int((j - 1) in self.downsample)
            if self.widths:
                outputs = self.widths[j - 1]
            elif j > 1:
                outputs = inputs * (1 + times)
            p = self.pool if j > 1 and times else "invertible"  # without P it is the same layer
            found.append(LayerSpec(j, inputs, outputs, times, self.batch_norm, self.bias, p))
            inputs = outputs
        return tuple(found)


@dataclass(frozen=True)
class Window:
    """A recipe's [window]: layers that are trained together. The first of them are then frozen and
    written; the others go on from where they are in the next window."""

    layers: int = 1
    """Layers of a window; at most those up to layer J."""
    stride: int = 1
    """Layers that are frozen after each."""

    def __post_init__(self) -> None:
        positive("window", FEW, layers=self.layers)
        require(
            0 < self.stride <= self.layers,
            f"'window.stride' is {self.stride}; it must be in 1 … 'window.layers', {self.layers}",
        )

    def of(self, j: int, given: int) -> range:
        """Layers that are trained together when layer j is, the first ``given`` layers being given;
        those beyond J with them."""
        begin = j - (j - 1 - given) % self.stride
        return range(begin, begin + self.layers)


@dataclass(frozen=True)
class AuxiliaryTable:
    """A recipe's [auxiliary]: the classifiers C_1 … C_J that layers are trained with."""

    k: int
    """Hidden layers of the auxiliary problem: layer j and k - 1 convolutions in C."""
    width: int = 0
    """M̃, width of C at layer 1; doubled with the layers' width. Unused at k = 1."""
    final_width: int | None = None
    """M̃_f, width of the last layer's C; left out: as M̃ gives it."""
    batch_norm: bool = False
    """Batch normalisation after every convolution of C."""
    bias: bool = True
    """A bias in every convolution of C."""
    half_resolution: bool = False
    """C's convolutions see x_j averaged over 2×2 pixels (VGG)."""
    pool: str = "mean"
    """What C sees of tokens: their ``mean``, or the first, which is the ``class`` token."""
    final_hidden: tuple[int, ...] = ()
    """The last layer's C is max pooling and fully connected layers of these widths (VGG)."""
    copies: int = 0
    """Layer 1 is trained with so many layers between it and C, like some of the later ones and
    evenly spaced among them; higher layers with fewer, and layer J with none (AugLocal). Those that
    change the shape come in addition. They are dropped when x_j is written."""
    patches: int = 1
    """C, with its copies, sees so many parts a side of x_j one after another, and their logits are
    averaged (HPFF): 2 are quadrants. It then holds the activations of one part at a time. Layer J
    is trained without."""
    similarity: float = 0.0
    """Share, below 1, in the loss of layers below J of how differently the samples of a micro-batch
    are alike in x_j and in their labels (predsim); cross-entropy has the rest."""
    context: int | None = None
    """C of layers below J sees the features of this depth beside x_j, averaged to its size
    (ContSup), if they are below the window of layer j; 0 is the image."""

    def __post_init__(self) -> None:
        positive("auxiliary", FEW, k=self.k)
        if self.k > 1:
            positive("auxiliary", width=self.width)
            positive("auxiliary", final_width=1 if self.final_width is None else self.final_width)
        require(
            self.k > 1 or not self.half_resolution,
            "'auxiliary.half_resolution' is for the convolutions of C, and with 'auxiliary.k' 1 "
            "there are none",
        )
        require(
            not self.final_hidden or self.final_width is None,
            "'auxiliary.final_width' is for convolutions; 'auxiliary.final_hidden' has none. Give "
            "one of them",
        )
        one_of("auxiliary.pool", self.pool, ("mean", "class"))
        require(
            0 <= self.copies <= FEW,
            f"'auxiliary.copies' is {self.copies}; it must be in 0 … {FEW:,}",
        )
        positive("auxiliary", FEW, patches=self.patches)
        require(
            0 <= self.similarity < 1,
            f"'auxiliary.similarity' is {self.similarity}; it must be in [0, 1)",
        )
        least = min(self.final_hidden, default=1)
        require(
            least > 0,
            f"'auxiliary.final_hidden' is {list(self.final_hidden)}; each must be above 0",
        )

    def specs(
        self, layers: Sequence[AnyLayer], classes: int, side: int, *, each: bool = False
    ) -> tuple[AuxiliarySpec, ...]:
        """The auxiliary classifiers. M̃ doubles with the layers' width.

        Args:
            side: of x_J, in pixels, if it is a map.
            each: every token, or place, has a label of its own.

        Raises RecipeError where a setting is for another kind of x_j.
        """
        extra = self.batch_norm, self.bias, self.half_resolution
        widths = [self.width * layer.width // layers[0].width for layer in layers]
        widths = [max(width, min(self.width, 1)) for width in widths]
        if self.final_width is not None:
            widths[-1] = self.final_width
        found: list[AuxiliarySpec] = []
        for layer, width in zip(layers, widths, strict=True):
            kind = seen_by(layer)
            kind = "places" if each and kind == "map" else kind
            is_last, where = layer is layers[-1], f"but x_{layer.index} is {KINDS[kind]}"
            maps = "half_resolution" * self.half_resolution or "final_hidden" * (
                bool(self.final_hidden) and is_last
            )
            require(not maps or kind == "map", f"'auxiliary.{maps}' is for maps, {where}")
            require(not each or kind != "vector", f"every token has a label of its own, {where}")
            pool: Any = {"pool": self.pool if kind == "tokens" else "mean", "each": each}
            found.append(
                AuxiliarySpec(layer.width, self.k, width, classes, *extra, sees=kind, **pool)
            )
        require(
            self.pool == "mean" or any(spec.sees == "tokens" for spec in found),
            "'auxiliary.pool' is \"class\", but no layer gives tokens",
        )
        if hidden := self.final_hidden:
            vgg = {"k": 1 + len(hidden), "width": 0, "half_resolution": False, "side": side // 2}
            found[-1] = dataclasses.replace(found[-1], hidden=hidden, **vgg)
        return tuple(found)

    @property
    def around(self) -> dict[str, Any]:
        """Settings of what is around a classifier, without those that are at their default."""
        default = {field.name: field.default for field in dataclasses.fields(AuxiliaryTable)}
        found = {name: getattr(self, name) for name in AROUND}
        return {name: value for name, value in found.items() if value != default[name]}

    def networks(
        self,
        layers: Sequence[AnyLayer],
        classifiers: Sequence[AuxiliarySpec],
        shape: Shape,
        given: int,
        window: Window,
    ) -> list[AuxiliarySpec]:
        """What sees x_1 … x_J while layers are trained: the rest of a window, and all else that is
        around a classifier. The classifier is that of the highest layer below it.

        Args:
            shape: of x_0.
            given: layers that are given, from the first.
        """
        last, found = len(layers), list[AuxiliarySpec]()
        self._check_context(layers, shape)
        for j in range(1, last + 1):
            those = window.of(j, given) if j > given else range(j, j + 1)
            above = tuple(layers[j : those[-1]])
            goes_on = j > given and those[0] + window.stride <= last
            rest, around = layers[j + len(above) :], self.around if goes_on else {}
            count = -(-around.pop("copies", 0) * len(rest) // max(1, last - 1))
            seen = shape_at(layers, last - len(rest), shape)
            copies = sampled(rest, seen, count)
            trained = (layers[j - 1], *above)
            _check_around(trained, seen, copies, around)
            classifier = classifiers[(*trained, *copies)[-1].index - 1]
            beside = around.pop("context", last)
            context = shape_at(layers, beside, shape)[0] if beside < those[0] else 0
            network = {**around, "above": above, "copies": copies, "context": context}
            channels = classifier.channels + context
            found.append(dataclasses.replace(classifier, channels=channels, **network))
        require(
            self.context is None or any(one.context for one in found),
            f"'auxiliary.context' is {self.context}, and no classifier sees x_{self.context} beside"
            " another: lower it, or leave it out",
        )
        return found

    def _check_context(self, layers: Sequence[AnyLayer], shape: Shape) -> None:
        """Refuse a context that there is not, or that is no map."""
        if (depth := self.context) is None:
            return
        told, last = f"'auxiliary.context' is {depth}", len(layers)
        require(0 <= depth < last, f"{told}; it must be in 0 … {last - 1}")
        kind = seen_by(layers[depth - 1]) if depth else "map" if len(shape) == 3 else "places"
        require(kind == "map", f"{told}; context is a map, but x_{depth} is {KINDS[kind]}")


def _check_around(
    trained: Sequence[AnyLayer], seen: Shape, copies: Sequence[AnyLayer], around: dict[str, Any]
) -> None:
    """Refuse patches and similarity of what is no map, or of one that cannot be cut so.

    Args:
        trained: layer j and those of its window.
        seen: shape of what the last of them gives.
    """
    for name, layer in ((name, layer) for name in around for layer in trained):
        kind = seen_by(layer)
        told = f"'auxiliary.{name}' is for maps, but x_{layer.index} is {KINDS[kind]}"
        require(kind == "map", told)
    require(
        not {"patches", "context"} <= around.keys(),
        "'auxiliary.context' is seen whole, and 'auxiliary.patches' are not: leave one of them out",
    )
    parts, scale = around.get("patches", 1), scale_at(copies, len(copies))
    sides = seen[1:] if parts > 1 else ()
    require(
        all(side % (parts * scale) == 0 and side >= 2 * parts for side in sides),
        f"'auxiliary.patches' is {parts}, and what is cut above layer {trained[0].index} has "
        f"{'×'.join(map(str, sides))} pixels: it must be divided, into parts of 2 and more",
    )


def seen_by(layer: AnyLayer) -> str:
    """The kind of what a layer gives, as :attr:`AuxiliarySpec.sees` has it."""
    axes = len(layer.gives) if isinstance(layer, Block) else 3
    if axes == 1:
        return "vector"
    return "tokens" if layer.features_last else "map" if axes == 3 else "places"


def without_later_defaults(table: Any) -> dict[str, Any]:
    """A table of a recipe, as JSON. Keys of :data:`LATER` are left out at their default, so that
    runs made before there were any are still of their recipe."""
    default = {field.name: field.default for field in dataclasses.fields(table)}
    found = dataclasses.asdict(table)
    return {k: v for k, v in found.items() if k not in LATER or v != default[k]}
