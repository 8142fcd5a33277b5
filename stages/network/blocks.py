"""Layers that are blocks of any network, as arithmetic: shapes, parameters, operations, memory.

Layer j is then block j: a module with one batch of samples in and one out, of 1 to 4 axes each,
which a Python file or torchvision made. What a block is was read off from the module once
(block_reading.py); here are only its figures, so that planning needs no torch once they are known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from typing import Any

from strata.stages.network.spec import UNNAMED, LayerSpec, Shape

PACKAGES = "torchvision:", "timm:"
"""What names of networks begin with that are no files'."""
Pair = tuple[int, int]
"""Bytes of every row, and bytes beside the rows."""


@dataclass(frozen=True)
class Origin:
    """Where blocks come from."""

    name: str
    """``torchvision:resnet18`` or ``residual.py:blocks``."""
    arguments: tuple[tuple[str, Any], ...] = ()
    """Arguments of the function that makes the network."""
    code: str | None = field(default=None, repr=False)
    """Text of the Python file."""
    folder: str = field(default="", repr=False)
    """Where the file and what it reads lie: the recipe's folder, or a run with copies."""
    home: str = field(default="", repr=False, compare=False)
    """The folder of the recipe that a run was made from; empty: ``folder``."""
    read: set[str] = field(default_factory=set, repr=False, compare=False)
    """Files that the file has read beside itself, by their name from its folder."""

    @property
    def file(self) -> str | None:
        """Path of the Python file from the recipe; None for torchvision and timm."""
        return None if self.name.startswith(PACKAGES) else self.name.rpartition(":")[0]

    @property
    def digest(self) -> str | None:
        """sha256 hex digest of the text; None for torchvision and timm."""
        return self.code and sha256(self.code.encode()).hexdigest()


@dataclass(frozen=True)
class MemoryPeaks:
    """Bytes of tensors at the moments that can be a peak, without the input and the weights."""

    kept: Pair
    """Held between the forward and the backward pass: what backward needs, and the output."""
    training: tuple[Pair, ...]
    """During the forward pass of a training step."""
    backward: tuple[Pair, ...]
    """During the backward pass, from the output's gradient on."""
    frozen: tuple[Pair, ...]
    """During a forward pass in eval mode, of which nothing is kept."""
    value: int = 4
    """Bytes of a value of the output in training."""


@dataclass(frozen=True)
class Block:
    """Layer j as block j of a network."""

    index: int
    """j, from 1."""
    channels: int
    """Channels, or features, of x_{j-1}."""
    width: int
    """Channels, or features, of x_j."""
    factor: int
    """By how much x_j has fewer pixels a side than x_{j-1}; 1 where that does not divide."""
    digest: str
    """sha256 hex digest of its code and structure; in fingerprints it stands for the block."""
    name: str = field(metadata=UNNAMED)
    """What it is called where it comes from, and its class: ``layer1.0 (BasicBlock)``."""
    parameters: int = field(metadata=UNNAMED)
    largest: int = field(metadata=UNNAMED)
    """Values of its largest parameter."""
    takes: Shape = field(metadata=UNNAMED)
    """Shape of the x_{j-1} that it was read with, which the figures here are for."""
    gives: Shape = field(metadata=UNNAMED)
    """Shape of x_j then."""
    work: int = field(metadata=UNNAMED)
    """Multiply-adds of one forward pass of one x_{j-1}."""
    local: bool = field(metadata=UNNAMED)
    """A value of x_j depends on the pixels around its place, and on no others."""
    whole: MemoryPeaks | None = field(metadata=UNNAMED)
    """Memory in float32; None: not known."""
    half: MemoryPeaks | None = field(metadata=UNNAMED)
    """Memory with convolutions in bfloat16 or float16; None: not known."""
    source: Origin = field(metadata=UNNAMED)
    small: int = field(default=0, metadata=UNNAMED)
    """Values of the parameters whose gradients a step keeps until its end."""
    features_last: bool = False
    """A feature of x_j is an index along its last axis: tokens, maps of Swin."""
    draws: bool = field(default=False, metadata=UNNAMED)
    """It draws random numbers in training mode, as dropout does."""
    x_0: tuple[Any, ...] = field(default=(), metadata=UNNAMED)
    """Shape and dtype of the x_0 that the network was cut for; empty: not known."""

    @property
    def convolved_channels(self) -> int:
        """Channels that it sees."""
        return self.channels

    @property
    def remark(self) -> str:
        """What decides about its speed beside its shapes."""
        return f", {self.name} {self.digest[:12]}"

    def output(self, shape: Shape) -> Shape:
        """Shape of x_j from that of x_{j-1}. A map may have another size than the one that the
        block was read with, if sides divide."""
        if shape == self.takes or not self.scales:
            return self.gives
        return self.width, *(side // self.factor for side in shape[1:])

    @property
    def scales(self) -> bool:
        """Is x_j, of any map, that map's size divided by :attr:`factor`?"""
        is_map = len(self.takes) == len(self.gives) == 3
        sides = tuple(side // self.factor for side in self.takes[1:])
        return is_map and self.gives == (self.width, *sides)

    def operations(self, shape: Shape) -> int:
        """Multiply-adds of one forward pass of one sample of shape ``shape`` (x_{j-1})."""
        return round(self.work * self._share(shape))

    def memory(self, compute: str) -> MemoryPeaks | None:
        """Memory by the dtype of the convolutions; None: not known."""
        return self.whole if compute == "float32" else self.half

    def nbytes(self, pairs: tuple[Pair, ...], shape: Shape, rows: int) -> int:
        """The most bytes at any of some moments, for so many rows of shape ``shape``."""
        share = rows * self._share(shape)
        return max((round(a * share) + b for a, b in pairs), default=0)

    def _share(self, shape: Shape) -> float:
        return prod(shape) / prod(self.takes)

    def as_json(self) -> dict[str, Any]:
        """All but its source."""
        found = dataclasses.asdict(self)
        del found["source"]
        return found

    @classmethod
    def of_json(cls, found: Mapping[str, Any], source: Origin) -> Block:
        known = {
            name: found[name] and MemoryPeaks(**{k: _tuples(v) for k, v in found[name].items()})
            for name in ("whole", "half")
        }
        found = {**found, **known, "source": source}
        if side := found.pop("side", 0):  # of a run made when x_j was a square map
            found["takes"] = found["channels"], side, side
            found["gives"] = found["width"], *[side // found["factor"]] * 2
        return cls(**{name: _tuples(value) for name, value in found.items()})


AnyLayer = LayerSpec | Block
"""What layer j is, of any network."""


def scale_at(layers: Sequence[AnyLayer], depth: int) -> int:
    """How many pixels of x_0 one pixel of x_depth spans: 2^(downsamplings so far)."""
    return prod(layer.factor for layer in layers[:depth])


def shape_at(layers: Sequence[AnyLayer], depth: int, shape: Shape) -> Shape:
    """Shape of x_depth when x_0 has the given one."""
    for layer in layers[:depth]:
        shape = layer.output(shape)
    return shape


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
