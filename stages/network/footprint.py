"""Peak bytes of tensors while a problem is solved, or a level computed, by arithmetic (no torch).

What lives at the same time, call by call, in ``Solver.step`` (solve/solve.py) on a ``Problem``, and
in ``featurize``; stages/memory.py measures the same, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from strata.stages.network.blocks import AnyLayer, Block, shape_at
from strata.stages.network.convolving import (
    POSITION,
    Convolution,
    backward_of,
    of_classifier,
    of_layers,
    small,
)
from strata.stages.network.spec import FLOAT, AuxiliarySpec, LayerSpec, Shape

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
    sample = prod(shape) + auxiliary.context * prod(shape[1:])
    constant = value * batch * sample + held(layer, auxiliary, keep_best=keep_best)
    kept = gradients(layer, auxiliary, straight=straight)
    whole = kept if divided else 0  # gradients of the micro-batches before
    connected = auxiliary.hidden or auxiliary.sees != "map"
    maps = [inputs * outputs for inputs, outputs in auxiliary.maps if connected]
    copies = width * (width < FLOAT) * sum(maps)
    later = FLOAT * sum(small(maps, straight=straight)) + (not straight) * copies
    first = straight * (FLOAT * max(maps, default=0) + copies)  # before all others, and then gone
    below, above = _in_one_piece(layer, auxiliary, shape, micro)
    if isinstance(layer, Block):
        backward = _of_block(layer, auxiliary, shape, micro, compute, first, straight=straight)
        forward = 0
        maps += [block.largest for block in (layer, *auxiliary.ahead)]
    else:
        what = layer, auxiliary, shape, micro, compute, first
        backward = _of_layer(*what, (below, above), straight=straight)
        forward = whole + value * micro * prod(shape) * _shuffles(layer)
    if backward is None:
        return None
    backward += _beside(layer, auxiliary, shape, micro, width)
    maps += [c.weights for c in below + above]
    maps += [auxiliary.head.largest] if auxiliary.head else []
    largest = FLOAT * max(small(maps, straight=straight), default=0)
    update = kept + (kept if at_once else largest)  # gradient + decay · weight
    return constant + max(forward, whole + backward + later, update)


def _of_layer(
    layer: LayerSpec | None,
    auxiliary: AuxiliarySpec,
    shape: Shape,
    rows: int,
    compute: str,
    first: int,
    pieces: tuple[Sequence[Convolution], Sequence[Convolution]],
    *,
    straight: bool,
) -> int | None:
    """As :func:`_of_block`, of a layer, or of a classifier alone; ``pieces`` are what
    :func:`_in_one_piece` gives."""
    width, (below, above) = ACTIVATION_BYTES[compute], pieces
    saved = first + width * sum(c.saved for c in below) + sum(c.positions for c in below)
    if layer is None:
        how = {"copied": width < FLOAT, "below": False, "straight": straight}
        alone = _classifying(auxiliary, shape, rows, compute, FLOAT, **how)
        return alone and max(alone, saved)
    if auxiliary.head:
        return None
    backward = backward_of(below, width, copied=layer.downsamplings > 0, straight=straight)
    of_patch = _of_patch(layer, auxiliary, shape, rows, width, above, straight=straight)
    return max(backward, saved + of_patch)


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
    """Most bytes of a block, those of its window, and what sees them: activations and gradients;
    None: not known.

    ``first`` are those of gradients that come before all others.
    """
    patched = auxiliary.copies if auxiliary.patches > 1 else ()
    blocks = [layer, *auxiliary.ahead[: len(auxiliary.ahead) - len(patched)]]
    seen = shape_at(blocks, len(blocks), shape)
    part = _patch(seen, auxiliary.patches)
    how = {"copied": auxiliary.patches > 1, "below": True, "straight": straight}
    last = [*blocks, *patched][-1].memory(compute)
    top = last and _classifying(
        auxiliary, shape_at(patched, len(patched), part), rows, compute, last.value, **how
    )
    above = gradients(None, auxiliary, straight=straight)
    large = 0 if straight else FLOAT * (layer.parameters - layer.small)
    if top is None or last is None:
        return None
    top = _of_blocks(patched, max(top, first), part, rows, compute, above)
    if top is not None and auxiliary.patches > 1:
        top = _with_gradients(top, last.value * rows * prod(seen))
    return None if top is None else _of_blocks(blocks, top, shape, rows, compute, above + large)


def _of_blocks(
    blocks: Sequence[Block], top: int, shape: Shape, rows: int, compute: str, others: int
) -> int | None:
    """Most bytes of blocks, one on another, where what sees the last takes ``top`` and ``others``
    are those of gradients beside them; None: not known."""
    kept, training, backward = 0, 0, 0
    for block in blocks:
        if (peaks := block.memory(compute)) is None:
            return None
        training = max(training, kept + block.nbytes(peaks.training, shape, rows))
        backward = max(backward, kept + block.nbytes(peaks.backward, shape, rows))
        kept += block.nbytes((peaks.kept,), shape, rows)
        shape = block.output(shape)
    return max(training, kept + top, backward + others * (len(blocks) > 0))


def _patch(shape: Shape, patches: int) -> Shape:
    """Shape of the largest part of a map that is cut into so many a side."""
    if patches == 1:
        return shape
    return shape[0], *(-(-side // patches) for side in shape[1:])


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
    ``value`` is the bytes of one of x_j; ``copied`` and ``below`` as in :func:`backward_of`."""
    if head := auxiliary.head:
        peaks = head.memory(compute)
        return peaks and head.nbytes((*peaks.training, *peaks.backward), shape, rows)
    width = ACTIVATION_BYTES[compute]
    if auxiliary.sees != "map":
        return auxiliary.activations(shape, rows, value, width, below=below)
    convolutions = of_classifier(auxiliary, shape, rows)
    return backward_of(convolutions, width, copied=copied, below=below, straight=straight)


def gradients(layer: AnyLayer | None, auxiliary: AuxiliarySpec, *, straight: bool) -> int:
    """Bytes of the gradients that a step keeps until its end."""
    parameters = (layer.parameters if layer else 0) + auxiliary.parameters
    if not straight:
        return FLOAT * parameters
    layers = [*([layer] if layer else []), *auxiliary.ahead]
    blocks = [block for block in (*layers, auxiliary.head) if isinstance(block, Block)]
    parameters -= sum(block.parameters - block.small for block in blocks)
    sizes = [inputs * outputs for inputs, outputs in auxiliary.maps]
    sizes += [9 * inputs * outputs for inputs, outputs in auxiliary.convolutions]
    sizes += [
        9 * one.convolved_channels * one.width for one in layers if isinstance(one, LayerSpec)
    ]
    sizes += [9 * auxiliary.inputs**2] * (auxiliary.similarity > 0)
    return FLOAT * (parameters - sum(sizes) + sum(small(sizes, straight=True)))


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


def _in_one_piece(
    layer: AnyLayer | None, auxiliary: AuxiliarySpec, shape: Shape, rows: int
) -> tuple[list[Convolution], list[Convolution]]:
    """Convolutions that see a whole map, and those that see it a patch at a time."""
    below = [*([layer] if isinstance(layer, LayerSpec) else []), *auxiliary.above]
    seen = shape_at([layer] if layer else [], 1, shape)
    seen = shape_at(auxiliary.above, len(auxiliary.above), seen)
    part = _patch(seen, auxiliary.patches)
    found = of_layers(below, shape, rows, first=layer is not None)
    above = of_layers(auxiliary.copies, part, rows)
    above += of_classifier(auxiliary, shape_at(auxiliary.copies, len(auxiliary.copies), part), rows)
    return (found + above, []) if auxiliary.patches == 1 else (found, above)


def _beside(
    layer: AnyLayer | None, auxiliary: AuxiliarySpec, shape: Shape, rows: int, width: int
) -> int:
    """Most bytes of x_{j-1} without its context, and of x_j with it; and of what is compared."""
    layers, found = [*([layer] if layer else []), *auxiliary.ahead], 0
    if auxiliary.context:
        seen = auxiliary.channels * prod(shape_at(layers, len(layers), shape)[1:])
        found += width * rows * (prod(shape) + seen)
    if auxiliary.similarity:  # W x_j, and, if it is in half precision, in float32
        compared = rows * prod(shape_at(layers, 1, shape))
        found += compared * FLOAT * (1 + (width < FLOAT))
    return found


def _of_patch(
    layer: AnyLayer | None,
    auxiliary: AuxiliarySpec,
    shape: Shape,
    rows: int,
    width: int,
    above: Sequence[Convolution],
    *,
    straight: bool,
) -> int:
    """Most bytes of what sees one patch, and of the gradients of all, which are put together."""
    if auxiliary.patches == 1 or layer is None:
        return 0
    seen = shape_at(auxiliary.above, len(auxiliary.above), layer.output(shape))
    of_one = backward_of(above, width, copied=True, below=True, straight=straight)
    return _with_gradients(of_one, width * rows * prod(seen))


def _with_gradients(of_one: int, whole: int) -> int:
    """Of a patch and the gradients of those before it, all of which are put together at the end."""
    return max(of_one + whole, 2 * whole)
