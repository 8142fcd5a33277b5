"""Peak bytes of tensors while a problem is solved, or a level computed, by arithmetic (no torch).

What lives at the same time, call by call, in ``Solver.step`` (solve/solve.py) on a ``Problem``, and
in ``featurize``; stages/memory.py measures the same, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from strata.stages.network.blocks import AnyLayer, Block
from strata.stages.network.spec import AuxiliarySpec, LayerSpec, Shape

FLOAT = 4
"""Bytes of a weight, its gradient, its momentum."""
POSITION = 8
"""Bytes of where in its 2×2 pixels max pooling found a value."""


HELD = {
    "float32": (8, 4, 0),
    "float16": (6, 2, 2),
    "bfloat16": (6, 2, 2),
    "uint8": (5, 4, 8),
    "uint4": (5.5, 4, 8),
}
"""Bytes of a value in a precision, beside what the convolutions make: as the input of a forward
pass (as it is stored, and as float32), between two frozen layers, and new ones while a layer's
output is brought into the precision."""
ACTIVATION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a value that a convolution makes, by its dtype."""


@dataclass(frozen=True)
class _Convolution:
    """One W, batch norm or not, ρ. Sizes are in values: of the input, of the output, of W."""

    inputs: int
    outputs: int
    weights: int
    batch_norm: bool
    averaged: int = 0
    """Size of what the input is an average of; 0: it is none."""

    @property
    def saved(self) -> int:
        """What backward needs of it: W's output, ρ's, which is in place, and an averaged input."""
        return self.outputs * (1 + self.batch_norm) + self.inputs * (self.averaged > 0)


def solving(
    layer: AnyLayer | None,
    auxiliary: AuxiliarySpec,
    shape: Shape,
    *,
    batch: int,
    micro: int,
    divided: bool,
    compute: str = "float32",
    keep_best: bool = False,
    at_once: bool = False,
) -> int | None:
    """Peak bytes of solving layer j: layer, auxiliary classifier, optimiser, and the batch. None
    for a block of which it is not known.

    Args:
        layer: None if only the classifier is solved.
        shape: of what the problem sees: x_{j-1}, or x_j if there is no layer.
        batch: rows that are there in float32 meanwhile.
        micro: rows that go through the network at a time.
        divided: a step has several micro-batches.
        compute: dtype of the convolutions.
        keep_best: the best iterate is kept beside the present one.
        at_once: all weights are updated in one call, as on a GPU; not one by one.
    """
    parameters = (layer.parameters if layer else 0) + auxiliary.parameters
    constant = FLOAT * batch * prod(shape) + held(layer, auxiliary, keep_best=keep_best)
    whole = FLOAT * parameters if divided else 0  # gradients of the micro-batches before
    width = ACTIVATION_BYTES[compute]
    largest = [inputs * outputs for inputs, outputs in auxiliary.maps if auxiliary.hidden]
    connected = (FLOAT + width * (width < FLOAT)) * sum(largest)  # their gradients come first
    if isinstance(layer, Block):
        peaks = layer.memory(compute)
        if peaks is None:
            return None
        convolutions = _convolutions(None, auxiliary, layer.output(shape), micro)
        kept, training, backward = (
            layer.nbytes(some, shape, micro)
            for some in ((peaks.kept,), peaks.training, peaks.backward)
        )
        classifier = kept + _backward(convolutions, width, resized=False, below=True)
        backward = max(training, classifier, backward + FLOAT * auxiliary.parameters)
        forward = 0
        largest.append(layer.largest)
    else:
        convolutions = _convolutions(layer, auxiliary, shape, micro)
        resized = layer is not None and layer.downsamplings > 0
        backward = _backward(convolutions, width, resized=resized)
        forward = whole + FLOAT * micro * prod(shape) * _shuffles(layer)
    largest += (c.weights for c in convolutions)
    decayed = parameters if at_once else max(largest, default=0)  # gradient + decay · weight
    update = FLOAT * (parameters + decayed)
    return constant + max(forward, whole + backward + connected, update)


def held(layer: AnyLayer | None, auxiliary: AuxiliarySpec, *, keep_best: bool = False) -> int:
    """Bytes of a problem between two steps: weights, momentum, and the best iterate if kept."""
    parameters = (layer.parameters if layer else 0) + auxiliary.parameters
    return FLOAT * parameters * (2 + keep_best)


def applying(
    layers: Sequence[AnyLayer],
    shape: Shape,
    *,
    block: int,
    compute: str = "float32",
    precision: str = "float32",
    images: bool = False,
) -> int | None:
    """Peak bytes of a forward pass of frozen layers, one block of rows at a time. None if it is not
    known of one of them.

    Args:
        shape: of the first layer's input.
        block: rows of a pass.
        precision: in which features are stored.
        images: the input is images, in float32.
    """
    width, parameters, peak = ACTIVATION_BYTES[compute], 0, 0
    read, between, rounding = HELD[precision]
    whole = round((FLOAT if images else read) * block * prod(shape))
    for number, layer in enumerate(layers):
        inputs, outputs = block * prod(shape), width * block * prod(layer.output(shape))
        held = whole + between * inputs * (number > 0)
        copied = FLOAT * (images if number == 0 else between < FLOAT) * inputs
        if isinstance(layer, LayerSpec):
            work = _convolving(layer, shape, block, width)
        elif peaks := layer.memory(compute):
            work = layer.nbytes(peaks.frozen, shape, block)
        else:
            return None
        rounded = held + outputs + rounding * outputs // width
        peak = max(peak, held + copied + work, rounded)
        parameters += layer.parameters
        shape = layer.output(shape)
    return FLOAT * parameters + peak


def _convolving(layer: LayerSpec, shape: Shape, block: int, width: int) -> int:
    """Most bytes of a frozen layer at work, beside its input in float32."""
    inputs, outputs = block * prod(shape), width * block * prod(layer.output(shape))
    resized = width * inputs * (layer.downsamplings > 0)
    if layer.pool == "max":
        pooled = block * layer.channels * prod(layer.output(shape)[1:])
        resized = (FLOAT + POSITION) * pooled
    shuffled = FLOAT * inputs * _shuffles(layer)
    convolved = max(shuffled, resized + outputs, outputs * (1 + layer.batch_norm))
    return (width < FLOAT) * width * inputs + convolved


def _shuffles(layer: LayerSpec | None) -> int:
    """How many times the input's size is held while P is applied: one P's output is the next one's
    input. What max pooling makes is smaller than what comes later."""
    return min(2, layer.downsamplings) if layer and layer.pool == "invertible" else 0


def _convolutions(
    layer: LayerSpec | None, auxiliary: AuxiliarySpec, shape: Shape, rows: int
) -> list[_Convolution]:
    output = layer.output(shape) if layer else shape
    pixels = rows * prod(output[1:])
    found = []
    if layer:
        inputs, channels = layer.convolved_channels, output[0]
        sizes = pixels * inputs, pixels * channels, 9 * inputs * channels
        found.append(_Convolution(*sizes, layer.batch_norm))
    seen = rows * auxiliary.pixels(output)
    for number, (inputs, channels) in enumerate(auxiliary.convolutions):
        averaged = pixels * inputs if auxiliary.half_resolution and number == 0 else 0
        kernels = 9 * inputs * channels
        found.append(
            _Convolution(seen * inputs, seen * channels, kernels, auxiliary.batch_norm, averaged)
        )
    return found


def _backward(
    convolutions: Sequence[_Convolution], width: int, *, resized: bool, below: bool = False
) -> int:
    """Most bytes between the end of forward and the end of backward: activations and gradients.

    ``below``: there is a block below, which made the input and wants its gradient.
    """
    if not convolutions:
        return 0
    mixed = width < FLOAT
    copies = width * sum(c.weights for c in convolutions) * mixed
    first = width * convolutions[0].inputs if (resized or mixed) and not below else 0
    saved = first + copies + width * sum(c.saved for c in convolutions)
    gradient, peak, done = width * convolutions[-1].outputs, saved, 0
    for number in reversed(range(len(convolutions))):
        c = convolutions[number]
        out = width * c.outputs
        peak = max(peak, saved + gradient + out + done)  # ρ: gradient in, gradient out
        if c.batch_norm:
            saved -= out
            peak = max(peak, saved + 2 * out + done)
        saved -= out
        gradient = width * c.inputs if number or below else 0
        of_weights = FLOAT * c.weights
        peak = max(peak, saved + out + gradient + done + of_weights)
        done += of_weights
        saved -= width * c.weights * mixed
        if c.averaged:
            saved -= gradient  # as large as the averaged input
            peak = max(peak, saved + gradient + width * c.averaged + done)
            gradient = width * c.averaged
    return peak
