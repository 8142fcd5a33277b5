"""Frozen layers as a function: x_i → x_j, the same value for a row whatever rows are beside it.

Two rules make a cache invisible. Every forward pass sees the same number of rows (the last block is
filled up and cut again), because kernels may round differently for another batch size. And after
each layer the values are rounded to the precision the level is stored in, whether or not it is
stored: so x_j computed from a cached x_{j-1} equals x_j computed from the images.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stages.errors import StageError
from stages.network import Layer

STORED = {"float32": torch.float32, "float16": torch.float16}
"""Precisions a feature level can be stored in."""


class NotFinite(StageError):
    """A feature left the range of the precision it is stored in."""


@torch.inference_mode()
def featurize(
    layers: Iterable[Layer],
    x: Float[Tensor, "b c h w"],
    *,
    precision: str,
    block: int,
    compute: torch.dtype,
) -> Shaped[Tensor, "b c2 h2 w2"]:
    """Apply frozen layers (in eval mode) to a batch of any number of rows.

    Args:
        x: features of some depth, in any float dtype, or normalised images.
        precision: what every x_j is rounded to, ``float32`` or ``float16``.
        block: rows in every forward pass.
        compute: dtype of the convolutions.

    Returns:
        The representation in the stored dtype, (B, C', H', W').

    Raises:
        NotFinite: a value is NaN or does not fit; names layer and sample.
    """
    blocks = [_forward(layers, part, block, precision, compute) for part in x.split(block)]
    return torch.cat(blocks)


def _forward(
    layers: Iterable[Layer], part: Tensor, block: int, precision: str, compute: torch.dtype
) -> Tensor:
    rows = len(part)
    if rows < block:
        part = torch.cat([part, part.new_zeros((block - rows, *part.shape[1:]))])
    for layer in layers:
        part = round_to(run_layer(layer, part, compute), precision)
    return part[:rows].contiguous()


def run_layer(layer: Layer, x: Tensor, compute: torch.dtype) -> Tensor:
    """One layer in eval mode under the numeric policy; float32 in and out of the mixed region."""
    x = x.to(torch.float32).contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, compute, enabled=compute != torch.float32):
        return layer(x)


def round_to(x: Tensor, precision: str) -> Tensor:
    """Round to a stored precision, refusing what does not fit."""
    stored = x.to(STORED[precision])
    finite = torch.isfinite(stored).flatten(1).all(1)
    if not finite.all():
        sample = int((~finite).nonzero()[0])
        value = x[sample].flatten()[(~torch.isfinite(stored[sample])).flatten().nonzero()[0]]
        raise NotFinite(
            f"sample {sample} of the batch has the feature {float(value):.6g}, which {precision} "
            f"cannot hold (largest {torch.finfo(STORED[precision]).max:.6g})"
        )
    return stored
