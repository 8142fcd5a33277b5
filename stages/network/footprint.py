"""Peak bytes of tensors while a problem is solved, or a level computed, by arithmetic (no torch).

What lives at the same time, call by call, in :meth:`strata.stages.solve.solve.Solver.step` on
:class:`strata.stages.network.network.Problem` and in
:func:`strata.stages.network.featurize.featurize`; stages/memory.py measures the same, and a test
compares them.
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


@dataclass(frozen=True)
class _Held:
    """Bytes of a value in a precision, beside what the convolutions make."""

    read: float
    """As the input of a forward pass: as it is stored, and as float32."""
    between: int
    """Between two frozen layers."""
    rounding: int
    """New ones while a layer's output is brought into the precision."""


HELD = {
    "float32": _Held(8, 4, 0),
    "float16": _Held(6, 2, 2),
    "bfloat16": _Held(6, 2, 2),
    "uint8": _Held(5, 4, 8),
    "uint4": _Held(5.5, 4, 8),
}
ACTIVATION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""By the dtype of the convolutions."""


@dataclass(frozen=True)
class _Convolution:
    """One W, batch norm or not, ρ. Sizes are in values: of the input, of the output, of W."""

    inputs: int
    outputs: int
    weights: int
    batch_norm: bool
    averaged: int = 0
    """Of what the input is an average of; 0: of nothing."""

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
    parameters = _parameters(layer, auxiliary)
    rows = FLOAT * batch * prod(shape)
    constant = rows + held(layer, auxiliary, keep_best=keep_best)
    whole = FLOAT * parameters if divided else 0  # gradients of the micro-batches before
    width = ACTIVATION_BYTES[compute]
    if isinstance(layer, Block):
        convolutions = _convolutions(None, auxiliary, layer.output(shape), micro)
        backward = _backward_of_block(layer, auxiliary, convolutions, shape, micro, compute)
        if backward is None:
            return None
        backward, forward = whole + backward, 0
    else:
        convolutions = _convolutions(layer, auxiliary, shape, micro)
        backward = whole + _backward(convolutions, width, resized=_resizes(layer))
        forward = whole + FLOAT * micro * prod(shape) * _shuffles(layer)
    connected = [inputs * outputs for inputs, outputs in auxiliary.maps if auxiliary.hidden]
    backward += (FLOAT + width * (width < FLOAT)) * sum(connected)  # their gradients come first
    own = [layer.largest] if isinstance(layer, Block) else []
    largest = max([*connected, *own, *(c.weights for c in convolutions)], default=0)
    decayed = parameters if at_once else largest  # gradient + weight decay · weight
    update = FLOAT * (parameters + decayed)
    return constant + max(forward, backward, update)


def held(layer: AnyLayer | None, auxiliary: AuxiliarySpec, *, keep_best: bool = False) -> int:
    """Bytes of a problem between two steps: weights, momentum, and the best iterate if kept."""
    return FLOAT * _parameters(layer, auxiliary) * (2 + keep_best)


def _parameters(layer: AnyLayer | None, auxiliary: AuxiliarySpec) -> int:
    return (layer.parameters if layer else 0) + auxiliary.parameters


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
    stored = HELD[precision]
    whole = round((FLOAT if images else stored.read) * block * prod(shape))
    for number, layer in enumerate(layers):
        inputs, outputs = block * prod(shape), width * block * prod(layer.output(shape))
        held = whole + stored.between * inputs * (number > 0)
        copied = FLOAT * (images if number == 0 else stored.between < FLOAT)
        if isinstance(layer, Block):
            moments = layer.moments(compute)
            if moments is None:
                return None
            convolved = held + copied * inputs + layer.nbytes(moments.frozen, shape, block)
        else:
            convolved = held + copied * inputs + _convolving(layer, shape, block, width)
        rounded = held + outputs + stored.rounding * outputs // width
        peak = max(peak, convolved, rounded)
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


def _backward_of_block(
    block: Block,
    auxiliary: AuxiliarySpec,
    convolutions: Sequence[_Convolution],
    shape: Shape,
    rows: int,
    compute: str,
) -> int | None:
    """As :func:`_backward`, of a block and the convolutions of its classifier; or, if that is more,
    bytes in its forward pass."""
    moments = block.moments(compute)
    if moments is None:
        return None
    kept, training, backward = (
        block.nbytes(some, shape, rows)
        for some in ((moments.kept,), moments.training, moments.backward)
    )
    classifier = _backward(convolutions, ACTIVATION_BYTES[compute], resized=False, below=True)
    return max(training, kept + classifier, backward + FLOAT * auxiliary.parameters)


def _resizes(layer: LayerSpec | None) -> bool:
    return layer is not None and layer.downsamplings > 0


def _shuffles(layer: LayerSpec | None) -> int:
    """Values that lie there as large as the input while P is applied: one P's output is the next
    one's input. Max pooling's are smaller than what comes later."""
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

    Args:
        below: there is a block below, which made the input and wants its gradient.
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
