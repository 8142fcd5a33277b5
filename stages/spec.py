"""The architecture as arithmetic (paper Sec. 3.1, Eq. 1 and 2): shapes, parameters, operations.

No torch here, so that planning answers at once. Layers are numbered as in the paper's text from 1:
layer j is the map x_{j-1} → x_j = ρ W_θ P x_{j-1}. ``downsample = [2, 3]`` is the paper's P_j: x_2
and x_3 are downsampled before the next layer, so layers 3 and 4 begin with P and double the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, int, int]
"""(channel, y, x)."""

KERNEL = 9
"""Weights of a 3×3 kernel."""


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

    @property
    def convolved_channels(self) -> int:
        """Channels that W sees: P turns each into 4."""
        return self.channels * 4**self.downsamplings

    def output(self, shape: Shape) -> Shape:
        """Shape of x_j from that of x_{j-1}."""
        scale = 2**self.downsamplings
        return self.width, shape[1] // scale, shape[2] // scale

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
    """C_γ = L A ρW̃_{k-2} … ρW̃_0 (Eq. 2): k-1 convolutions, averaging to 2×2, one linear map."""

    channels: int
    """Channels of x_j."""
    k: int
    """Hidden layers of the auxiliary problem, layer j itself included."""
    width: int
    """M̃ at this depth."""
    classes: int
    batch_norm: bool
    bias: bool

    @property
    def averaged_channels(self) -> int:
        """Channels that A sees."""
        return self.width if self.k > 1 else self.channels

    @property
    def parameters(self) -> int:
        convolutions = 0
        for n in range(self.k - 1):
            inputs = self.channels if n == 0 else self.width
            convolutions += self.width * (inputs * KERNEL + self.bias + 2 * self.batch_norm)
        return convolutions + self.classes * (4 * self.averaged_channels + 1)

    def operations(self, shape: Shape) -> int:
        """Multiply-adds of one forward pass of one x_j of shape ``shape``."""
        total = self.classes * 4 * self.averaged_channels
        for n in range(self.k - 1):
            inputs = self.channels if n == 0 else self.width
            total += inputs * self.width * KERNEL * shape[1] * shape[2]
        return total


def layer_specs(
    *,
    channels: int,
    layers: int,
    width: int,
    downsample: Sequence[int],
    stem: int,
    batch_norm: bool,
    bias: bool,
) -> tuple[LayerSpec, ...]:
    """The J layers. Output width equals input width, or twice that after a P (Sec. 4, naming)."""
    specs: list[LayerSpec] = []
    for j in range(1, layers + 1):
        begins_with_p = (j - 1) in downsample
        inputs = channels if j == 1 else specs[-1].width
        outputs = width if j == 1 else inputs * (2 if begins_with_p else 1)
        specs.append(
            LayerSpec(j, inputs, outputs, stem if j == 1 else int(begins_with_p), batch_norm, bias)
        )
    return tuple(specs)


def auxiliary_specs(
    layers: Sequence[LayerSpec],
    *,
    k: int,
    width: int,
    final_width: int | None,
    classes: int,
    batch_norm: bool,
    bias: bool,
) -> tuple[AuxiliarySpec, ...]:
    """One auxiliary classifier per layer; M̃ doubles with the width, M̃_f is the last one's."""
    specs = []
    for layer in layers:
        scaled = width * layer.width // layers[0].width
        if layer is layers[-1] and final_width is not None:
            scaled = final_width
        specs.append(AuxiliarySpec(layer.width, k, scaled, classes, batch_norm, bias))
    return tuple(specs)


def scale_at(layers: Sequence[LayerSpec], depth: int) -> int:
    """How many pixels of x_0 one pixel of x_depth spans: 2^(downsamplings so far)."""
    return int(2 ** sum(layer.downsamplings for layer in layers[:depth]))


def shape_at(layers: Sequence[LayerSpec], depth: int, channels: int, size: int) -> Shape:
    """Shape of x_depth when x_0 is (channels, size, size)."""
    shape: Shape = (channels, size, size)
    for layer in layers[:depth]:
        shape = layer.output(shape)
    return shape
