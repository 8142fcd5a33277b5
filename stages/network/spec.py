"""The architecture as arithmetic (paper Sec. 3.1, Eq. 1 and 2): shapes, parameters, operations.

No torch here, so that planning answers at once. Layers are numbered as in the paper's text from 1:
layer j is the map x_{j-1} → x_j = ρ W_θ P x_{j-1}. ``downsample = [2, 3]`` is the paper's P_j: x_2
and x_3 are downsampled before the next layer, so layers 3 and 4 begin with P and double the width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

Shape = tuple[int, ...]
"""Axes of one sample, 1 to 4: (feature,), (channel, time), (channel, y, x), (channel, z, y, x); or,
where features are the last axis, (token, feature), (y, x, channel), (z, y, x, channel)."""

KERNEL = 9
"""Weights of a 3×3 kernel."""
FLOAT = 4
"""Bytes of a weight, its gradient, its momentum."""
UNNAMED = {"described": False}
"""Metadata of a field that does not decide about values, so that no fingerprint has it."""


@dataclass(frozen=True)
class LayerSpec:
    """Layer j: P (``downsamplings`` times), W (3×3, zero padding 1), batch norm or not, ρ."""

    index: int
    """j, from 1."""
    channels: int
    """Channels of x_{j-1}."""
    width: int
    """Channels of x_j."""
    downsamplings: int
    """How often P is applied before W: 0 or 1, for layer 1 the stem's count."""
    batch_norm: bool
    bias: bool
    pool: str = "invertible"
    """P: the ``invertible`` downsampling, or ``max`` over 2×2 pixels as in VGG (Sec. 4.3)."""

    features_last: ClassVar[bool] = False
    """Is a feature an index along the last axis of x_j, not the first?"""
    draws: ClassVar[bool] = False
    """Does it draw random numbers in training mode?"""

    @property
    def convolved_channels(self) -> int:
        """Channels that W sees: the invertible P turns each into 4."""
        return self.channels * (4**self.downsamplings if self.pool == "invertible" else 1)

    @property
    def factor(self) -> int:
        """By how much x_j has fewer pixels a side than x_{j-1}."""
        return 2**self.downsamplings

    @property
    def remark(self) -> str:
        """What decides about its speed beside its shapes."""
        return ", max pooled" * (self.pool == "max")

    def output(self, shape: Shape) -> Shape:
        """Shape of x_j from that of x_{j-1}."""
        return self.width, shape[1] // self.factor, shape[2] // self.factor

    @property
    def parameters(self) -> int:
        kernels = self.convolved_channels * self.width * KERNEL
        return kernels + self.width * (self.bias + 2 * self.batch_norm)

    def operations(self, shape: Shape) -> int:
        """Multiply-adds of one forward pass of one sample of shape ``shape`` (x_{j-1})."""
        _, height, width = self.output(shape)
        return self.convolved_channels * self.width * KERNEL * height * width


@dataclass(frozen=True)
class AuxiliarySpec:
    """C_γ = L A ρW̃_{k-2} … ρW̃_0 (Eq. 2): k-1 convolutions, averaging to 2×2, one linear map.

    Or, with ``hidden`` layers, what VGG ends with: max pooling over 2×2 pixels and, instead of
    convolutions, fully connected layers, each with bias and ρ, before the linear map. Or, where x_j
    is no map, layer norm, the mean over places, and k - 1 fully connected layers of width M̃, each
    with bias and ρ, before the linear map; a vector has no places, and is not normalised.
    """

    channels: int
    """Channels of what it sees: x_j, or what :attr:`ahead` makes of it; with those of context."""
    k: int
    """Hidden layers of the auxiliary problem, layer j itself included."""
    width: int
    """M̃ at this depth."""
    classes: int
    batch_norm: bool
    bias: bool
    half_resolution: bool = False
    """The convolutions see x_j averaged over 2×2 pixels (Sec. 4.3, VGG)."""
    hidden: tuple[int, ...] = ()
    """Widths of the fully connected layers."""
    side: int = 0
    """With ``hidden``: of x_j after max pooling, in pixels."""
    sees: str = "map"
    """What x_j is: a ``map`` (channel, y, x); ``tokens``, with features along the last axis;
    ``places``, with a channel and other axes than those of a map; a ``vector``."""
    pool: str = "mean"
    """What is seen of tokens: their ``mean``, or the first, which is the ``class`` token."""
    each: bool = False
    """Every token has logits of its own."""
    digest: str = ""
    """sha256 hex digest of the code and structure of one that a Python file makes."""
    head: Any = field(default=None, metadata=UNNAMED)
    """The :class:`Block` which that one is; None: there is no file."""
    above: tuple[Any, ...] = ()
    """Layers j + 1, … of a window: C sees what they make of x_j, and is trained with them."""
    copies: tuple[Any, ...] = ()
    """Layers after those, like some of the later ones, with weights of their own (AugLocal)."""
    patches: int = 1
    """C, with its copies, sees a map in so many parts a side, one after another (HPFF)."""
    similarity: float = 0.0
    """Share of the similarity of x_j in the loss (predsim)."""
    context: int = 0
    """Channels of earlier features, which C sees beside x_j, averaged to its size (ContSup)."""

    @property
    def ahead(self) -> tuple[Any, ...]:
        """Layers between x_j and C."""
        return *self.above, *self.copies

    @property
    def inputs(self) -> int:
        """Channels of x_j."""
        return self.ahead[0].channels if self.ahead else self.channels - self.context

    @property
    def draws(self) -> bool:
        """Does it draw random numbers in training mode?"""
        return any(part.draws for part in (*self.ahead, self.head) if part)

    @property
    def convolutions(self) -> tuple[tuple[int, int], ...]:
        """Channels in and out of W̃_0 … W̃_{k-2}."""
        widths = [self.channels, *[self.width] * (self.k - 1)]
        return () if self.head or self.hidden or self.sees != "map" else tuple(pairwise(widths))

    @property
    def maps(self) -> tuple[tuple[int, int], ...]:
        """Values in and out of the linear maps: L, after those of the hidden layers."""
        if self.head:
            return ()
        if self.sees != "map":
            return tuple(pairwise((self.channels, *[self.width] * (self.k - 1), self.classes)))
        averaged = self.width if self.k > 1 else self.channels
        inputs = self.channels * self.side**2 if self.hidden else 4 * averaged
        return tuple(pairwise((inputs, *self.hidden, self.classes)))

    @property
    def parameters(self) -> int:
        return self._own + self.similar + sum(layer.parameters for layer in self.ahead)

    @property
    def similar(self) -> int:
        """Parameters of the convolution whose output is compared."""
        return self.inputs * (self.inputs * KERNEL + 1) if self.similarity else 0

    @property
    def _own(self) -> int:
        if self.head:
            return self.head.parameters
        extra = self.bias + 2 * self.batch_norm
        kernels = sum(outputs * (inputs * KERNEL + extra) for inputs, outputs in self.convolutions)
        norm = 2 * self.channels * (self.sees in ("tokens", "places"))
        return kernels + norm + sum(outputs * (inputs + 1) for inputs, outputs in self.maps)

    def pixels(self, shape: Shape) -> int:
        """How many places C sees of a map, or tokens, of shape ``shape``."""
        if self.sees != "map":
            return prod(shape) // self.channels
        _, height, width = shape
        if self.half_resolution:
            height, width = -(-height // 2), -(-width // 2)
        return height * width

    def operations(self, shape: Shape) -> int:
        """Multiply-adds of one forward pass of one x_j of shape ``shape``."""
        found = self.inputs * KERNEL * prod(shape) * (self.similarity > 0)
        for layer in self.ahead:
            found, shape = found + layer.operations(shape), layer.output(shape)
        if self.head:
            return found + self.head.operations(shape)
        kernels = sum(inputs * outputs * KERNEL for inputs, outputs in self.convolutions)
        maps = sum(inputs * outputs for inputs, outputs in self.maps)
        return (
            found + kernels * self.pixels(shape) + maps * (self.pixels(shape) if self.each else 1)
        )

    def activations(self, shape: Shape, rows: int, value: int, width: int, *, below: bool) -> int:
        """Most bytes that backward wants of tokens or vectors, beside what C sees, of ``shape``.

        Args:
            value: bytes of a value of x_j. Layer norm works in float32, and keeps what it sees.
            width: bytes of a value that a linear map makes, such as a logit. The loss works in
                float32: log softmax, and the gradients of it and of what it sees.
            below: there is a layer, which wants a gradient.
        """
        pixels = self.pixels(shape)
        seen = rows * (pixels if self.each else 1)
        normed = FLOAT * rows * self.channels * (self.sees != "vector")
        normed *= 1 if self.pool == "class" and not self.each else pixels
        copied = normed * (value < FLOAT)
        inner = FLOAT * seen * sum(outputs for _, outputs in self.maps[:-1])
        logits = FLOAT * seen * self.classes
        kept = copied + inner + normed * self.each
        judged = 3 * logits + width * seen * self.classes
        return max(copied + normed, kept + judged, copied + logits + (1 + below) * normed)


def described(spec: Any) -> dict[str, Any]:
    """A specification as JSON, without what is at its default: so that a network keeps its
    fingerprints when specifications learn to say more. And without what decides nothing."""
    found = {
        one.name: getattr(spec, one.name)
        for one in dataclasses.fields(spec)
        if getattr(spec, one.name) != one.default and one.metadata != UNNAMED
    }
    for name in {"above", "copies"} & found.keys():
        found[name] = [described(layer) for layer in found[name]]
    return found


def sampled(layers: Sequence[Any], shape: Shape, count: int) -> tuple[Any, ...]:
    """Layers of which an auxiliary network has copies (AugLocal, Ma et al. 2024): ``count`` of
    them, evenly spaced up to the last; and all that change the shape, so that each fits the one
    before it.

    Args:
        layers: those that follow.
        shape: of what the first of them sees.
    """
    chosen = {-(-len(layers) * n // count) - 1 for n in range(1, count + 1)} if count else set()
    for i, layer in enumerate(layers if chosen else ()):
        before, shape = shape, layer.output(shape)
        if shape != before:
            chosen.add(i)
    return tuple(layers[i] for i in sorted(chosen - {-1}))
