"""Peak bytes of convolutions one on another in a step, by arithmetic (no torch): what backward
keeps of each, its gradients, and large ones found in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from strata.stages.network.blocks import AnyLayer
from strata.stages.network.spec import FLOAT, AuxiliarySpec, LayerSpec, Shape

POSITION = 8
"""Bytes of where in its 2×2 pixels max pooling found a value."""
WHOLE = 1 << 20
"""Bytes of a parameter up to which its gradient is kept until the step. A larger one's goes
straight into the momentum, which costs some calls and saves as many bytes."""
PART = 8 << 20
"""Bytes above which a kernel's gradient is found in parts, of about so many."""
TOGETHER = 32
"""Output channels that a part is a multiple of: as many as CPUs and GPUs work on at once."""


def channels_at_once(channels: int, nbytes: int) -> int:
    """Output channels of a part of a kernel's gradient, where one takes so many bytes."""
    parts = -(-channels * nbytes // PART)
    return -(-channels // (parts * TOGETHER)) * TOGETHER


@dataclass(frozen=True)
class Convolution:
    """One W, batch norm or not, ρ. Sizes are in values: of the input, of the output, of W."""

    inputs: int
    outputs: int
    weights: int
    channels: int
    """Of the output."""
    batch_norm: bool
    averaged: int = 0
    """Size of what the input is an average, or a P, of; 0: it is none."""
    positions: int = 0
    """Bytes of where max pooling found the input."""

    @property
    def saved(self) -> int:
        """What backward needs of it: W's output, ρ's, which is in place, and an averaged input."""
        return self.outputs * (1 + self.batch_norm) + self.inputs * (self.averaged > 0)


def of_layers(
    layers: Sequence[AnyLayer], shape: Shape, rows: int, *, first: bool = False
) -> list[Convolution]:
    """Convolutions of layers one on another; what the ``first`` one sees is the caller's."""
    found = []
    for layer in layers:
        output = layer.output(shape)
        if isinstance(layer, LayerSpec):
            inputs, channels = layer.convolved_channels, output[0]
            places = rows * prod(output[1:])
            sizes = places * inputs, places * channels, 9 * inputs * channels, channels
            pooled = layer.downsamplings > 0 and not (first and layer is layers[0])
            averaged = rows * prod(shape) if pooled else 0
            positions = POSITION * places * inputs if pooled and layer.pool == "max" else 0
            found.append(Convolution(*sizes, layer.batch_norm, averaged, positions))
        shape = output
    return found


def of_classifier(auxiliary: AuxiliarySpec, shape: Shape, rows: int) -> list[Convolution]:
    """Those of a classifier that sees maps of that shape."""
    pixels, seen, found = rows * prod(shape[1:]), rows * auxiliary.pixels(shape), []
    for number, (inputs, channels) in enumerate(auxiliary.convolutions):
        averaged = pixels * inputs if auxiliary.half_resolution and number == 0 else 0
        sizes = seen * inputs, seen * channels, 9 * inputs * channels, channels
        found.append(Convolution(*sizes, auxiliary.batch_norm, averaged))
    return found


def backward_of(
    convolutions: Sequence[Convolution],
    width: int,
    *,
    copied: bool,
    below: bool = False,
    straight: bool,
) -> int:
    """Most bytes between the end of forward and the end of backward: activations and gradients.

    ``copied``: the first convolution's input is a copy of what the problem sees. ``below``: there
    is a block below, which made the input and wants its gradient.
    """
    if not convolutions:
        return 0
    mixed = width < FLOAT
    parted = [straight and FLOAT * c.weights > PART for c in convolutions]
    copies = [width * c.weights * mixed for c in convolutions]
    first = width * convolutions[0].inputs if copied else 0
    saved = first + width * sum(c.saved for c in convolutions)
    saved += sum(c.positions for c in convolutions)
    peak = saved + max(map(prod, zip(copies, parted, strict=True)))  # as it is convolved
    saved += sum(copy for copy, part in zip(copies, parted, strict=True) if not part)
    gradient, peak, done = width * convolutions[-1].outputs, max(peak, saved), 0
    for number in reversed(range(len(convolutions))):
        c, in_parts, copy = convolutions[number], parted[number], copies[number]
        out = width * c.outputs
        peak = max(peak, saved + gradient + out + done)  # ρ: gradient in, gradient out
        if c.batch_norm:
            saved -= out
            peak = max(peak, saved + 2 * out + done)
        saved -= out
        gradient = width * c.inputs if number or below else 0
        of_weights = FLOAT * c.weights
        if in_parts:
            channels = channels_at_once(c.channels, of_weights // c.channels)
            part = width * channels * c.weights // c.channels
            peak = max(peak, saved + out + done + max(part, gradient and gradient + copy))
        else:
            peak = max(peak, saved + out + gradient + done + of_weights)
            saved -= copy
        done += FLOAT * sum(small([c.weights], straight=straight))
        if c.averaged:
            saved -= gradient + c.positions  # as large as the averaged input
            peak = max(peak, saved + gradient + width * c.averaged + done)
            gradient = width * c.averaged
    return peak


def small(sizes: Sequence[int], *, straight: bool) -> list[int]:
    """Those whose gradients are kept until the step."""
    return [size for size in sizes if not straight or FLOAT * size <= WHOLE]
