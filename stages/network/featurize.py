"""Frozen layers as a function: x_i → x_j, the same value for a row whatever rows are beside it.

Two rules make a cache invisible. Every forward pass sees the same number of rows (the last block is
filled up and cut again), because kernels may round differently for another batch size. And after
each layer the values are rounded to the form the level is stored in, whether or not it is stored:
so x_j computed from a cached x_{j-1} equals x_j computed from the images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from strata.stages.errors import NotFinite
from strata.stages.features.quantise import Codec, memory_format


@dataclass(frozen=True)
class Frozen:
    """A solved layer, in eval mode, and what its output is rounded to: each has its own scales."""

    layer: nn.Module
    stored: Codec
    axis: int = 1
    """Which axis of its input is the channel: 1 or -1."""


@torch.no_grad()
def featurize(
    layers: Sequence[Frozen],
    x: Shaped[Tensor, "b ..."],
    *,
    block: int,
    compute: torch.dtype,
    encode: bool = False,
) -> Shaped[Tensor, "b ..."]:
    """Apply frozen layers to a batch of any number of rows.

    Args:
        x: features of some depth, in any float dtype, normalised images, or tokens as integers.
        block: rows in every forward pass.
        compute: dtype of the convolutions.
        encode: give the form in which the last layer's output is stored.

    Returns:
        The representation, for example (B, C', H', W'), rounded to what the last layer is stored
        as: its codec encodes it without a further loss. Or its stored form.

    Raises:
        NotFinite: a value is NaN or does not fit; names channel and sample.
    """
    if not layers:
        return x
    *below, last = layers
    finish = last.stored.encode if encode else last.stored.rounded
    blocks = []
    for first in range(0, len(x), block):
        part = x[first : first + block]
        rows = len(part)
        if rows < block:
            # With rows that there are, which no layer makes infinite for their sake.
            part = torch.cat([part, part[-1:].expand(block - rows, *part.shape[1:])])
        try:
            for frozen in below:
                part = run_layer(frozen.layer, part, compute, frozen.axis)
                part = frozen.stored.rounded(part)
            part = finish(run_layer(last.layer, part, compute, last.axis))
        except NotFinite as error:
            error.sample += first
            raise
        blocks.append(part[:rows])
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def run_layer(layer: nn.Module, x: Tensor, compute: torch.dtype, axis: int = 1) -> Tensor:
    """One layer in eval mode under the numeric policy; float32 in and out of the mixed region, but
    integers as they are. ``axis`` is that of x's channels, 1 or -1."""
    x = x.to(torch.float32) if x.is_floating_point() else x
    x = x.contiguous(memory_format=memory_format(x, axis))
    with torch.autocast(x.device.type, compute, enabled=compute != torch.float32):
        return layer(x)


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    """The module itself, moved to a device, its kernels with channels last, as maps lie."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return module.to(device)


def pooled(x: Float[Tensor, "b ..."], axis: int = 1) -> Float[np.ndarray, "b columns"]:
    """A x of Eq. 2, flat: means over the four quadrants of each of the C channels, float32
    (B, 4 · C), on the CPU. Of what is no map (B, C, H, W) the means over all places: of tokens, or
    of points in time or space, (B, C); a vector is what it is.

    Args:
        axis: of the channels, 1 or -1.
    """
    if memory_format(x, axis) == torch.channels_last:
        found = nn.functional.adaptive_avg_pool2d(x, 2)
    else:
        found = x.movedim(axis, 1).reshape(len(x), x.shape[axis], -1).mean(2)
    return found.flatten(1).float().cpu().numpy()
