"""Peak bytes of tensors while a problem is solved, or a level computed, by arithmetic (no torch).

What lives at the same time, call by call, in ``Solver.step`` (solve/solve.py) on a ``Problem``, and
in ``featurize``; stages/memory.py measures the same, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from strata.stages.network.blocks import AnyLayer, Block
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


def channels_at_once(channels: int, nbytes: int) -> int:
    """Output channels of a part of a kernel's gradient, where one takes so many bytes."""
    parts = -(-channels * nbytes // PART)
    return -(-channels // (parts * TOGETHER)) * TOGETHER


@dataclass(frozen=True)
class _Convolution:
    """One W, batch norm or not, ρ. Sizes are in values: of the input, of the output, of W."""

    inputs: int
    outputs: int
    weights: int
    channels: int
    """Of the output."""
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
    straight: bool = True,
    at_once: bool = False,
) -> int | None:
    """Peak bytes of solving layer j: layer, auxiliary classifier, SGD's momentum, and the batch.
    None for a block of which it is not known.

    Args:
        layer: None if only the classifier is solved.
        shape: of what the problem sees: x_{j-1}, or x_j if there is no layer.
        batch: rows that are there meanwhile, in float32, or as the layer's convolution wants them.
        micro: rows that go through the network at a time.
        divided: a step has several micro-batches.
        compute: dtype of the convolutions.
        keep_best: the best iterate is kept beside the present one.
        straight: large gradients go into the momentum as they come.
        at_once: all weights are updated in one call, as on a GPU; not one by one.
    """
    width = ACTIVATION_BYTES[compute]
    value = width if isinstance(layer, LayerSpec) else FLOAT  # as the feed makes x_{j-1}
    constant = value * batch * prod(shape) + held(layer, auxiliary, keep_best=keep_best)
    kept = gradients(layer, auxiliary, straight=straight)
    whole = kept if divided else 0  # gradients of the micro-batches before
    connected = auxiliary.hidden or auxiliary.sees != "map"
    maps = [inputs * outputs for inputs, outputs in auxiliary.maps if connected]
    copies = width * (width < FLOAT) * sum(maps)
    later = FLOAT * sum(_kept(maps, straight=straight)) + (not straight) * copies
    first = straight * (FLOAT * max(maps, default=0) + copies)  # before all others, and then gone
    if isinstance(layer, Block):
        convolutions = _convolutions(None, auxiliary, layer.output(shape), micro)
        backward = _of_block(layer, auxiliary, shape, micro, compute, first, straight=straight)
        forward = 0
        maps += [layer.largest]
    else:
        convolutions = _convolutions(layer, auxiliary, shape, micro)
        copied = value > width or bool(layer and layer.downsamplings)
        backward = _backward(convolutions, width, copied=copied, straight=straight)
        if layer is None:
            how = {"copied": copied, "below": False, "straight": straight}
            backward = _classifying(auxiliary, shape, micro, compute, FLOAT, **how)
        saved = first + width * sum(c.saved for c in convolutions)
        backward = None if layer and auxiliary.head else backward and max(backward, saved)
        forward = whole + value * micro * prod(shape) * _shuffles(layer)
    if backward is None:
        return None
    maps += [c.weights for c in convolutions]
    maps += [auxiliary.head.largest] if auxiliary.head else []
    largest = FLOAT * max(_kept(maps, straight=straight), default=0)
    update = kept + (kept if at_once else largest)  # gradient + decay · weight
    return constant + max(forward, whole + backward + later, update)


def _of_block(
    layer: Block,
    auxiliary: AuxiliarySpec,
    shape: Shape,
    rows: int,
    compute: str,
    first: int,
    *,
    straight: bool,
) -> int | None:
    """Most bytes of a block and its classifier: activations and gradients; None: not known.

    ``first`` are those of gradients that come before all others.
    """
    if (peaks := layer.memory(compute)) is None:
        return None
    how = {"copied": False, "below": True, "straight": straight}
    output = layer.output(shape)
    below = _classifying(auxiliary, output, rows, compute, peaks.value, **how)
    between, training, backward = (
        layer.nbytes(some, shape, rows) for some in ((peaks.kept,), peaks.training, peaks.backward)
    )
    above = gradients(None, auxiliary, straight=straight)
    large = 0 if straight else FLOAT * (layer.parameters - layer.small)
    if below is None:
        return None
    return max(training, between + max(below, first), backward + above + large)


def _classifying(
    auxiliary: AuxiliarySpec,
    shape: Shape,
    rows: int,
    compute: str,
    value: int,
    *,
    copied: bool,
    below: bool,
    straight: bool,
) -> int | None:
    """Most bytes of a classifier on x_j, beside x_j: activations and gradients; None: not known.
    ``value`` is the bytes of one of x_j; ``copied`` and ``below`` as :func:`_backward` has them."""
    if head := auxiliary.head:
        peaks = head.memory(compute)
        return peaks and head.nbytes((*peaks.training, *peaks.backward), shape, rows)
    width = ACTIVATION_BYTES[compute]
    if auxiliary.sees != "map":
        return auxiliary.activations(shape, rows, value, width, below=below)
    convolutions = _convolutions(None, auxiliary, shape, rows)
    return _backward(convolutions, width, copied=copied, below=below, straight=straight)


def gradients(layer: AnyLayer | None, auxiliary: AuxiliarySpec, *, straight: bool) -> int:
    """Bytes of the gradients that a step keeps until its end."""
    parameters = (layer.parameters if layer else 0) + auxiliary.parameters
    if not straight:
        return FLOAT * parameters
    if isinstance(layer, Block):
        parameters -= layer.parameters - layer.small
    if auxiliary.head:
        parameters -= auxiliary.parameters - auxiliary.head.small
    sizes = [inputs * outputs for inputs, outputs in auxiliary.maps]
    sizes += [9 * inputs * outputs for inputs, outputs in auxiliary.convolutions]
    if isinstance(layer, LayerSpec):
        sizes.append(9 * layer.convolved_channels * layer.width)
    return FLOAT * (parameters - sum(sizes) + sum(_kept(sizes, straight=True)))


def _kept(sizes: Sequence[int], *, straight: bool) -> list[int]:
    """Those whose gradients are kept until the step."""
    return [size for size in sizes if not straight or FLOAT * size <= WHOLE]


def held(
    layer: AnyLayer | None, auxiliary: AuxiliarySpec, *, keep_best: bool = False, moments: int = 1
) -> int:
    """Bytes of a problem between two steps: weights, moments, and the best iterate if kept."""
    parameters = (layer.parameters if layer else 0) + auxiliary.parameters
    return FLOAT * parameters * (1 + moments + keep_best)


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
        seen = held if layer is layers[-1] else whole  # of others, the input is gone by then
        rounded = seen + outputs + rounding * outputs // width
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
        sizes = pixels * inputs, pixels * channels, 9 * inputs * channels, channels
        found.append(_Convolution(*sizes, layer.batch_norm))
    seen = rows * auxiliary.pixels(output)
    for number, (inputs, channels) in enumerate(auxiliary.convolutions):
        averaged = pixels * inputs if auxiliary.half_resolution and number == 0 else 0
        sizes = seen * inputs, seen * channels, 9 * inputs * channels, channels
        found.append(_Convolution(*sizes, auxiliary.batch_norm, averaged))
    return found


def _backward(
    convolutions: Sequence[_Convolution],
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
        done += FLOAT * sum(_kept([c.weights], straight=straight))
        if c.averaged:
            saved -= gradient  # as large as the averaged input
            peak = max(peak, saved + gradient + width * c.averaged + done)
            gradient = width * c.averaged
    return peak
