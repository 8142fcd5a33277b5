"""Memory of a block by a step on tensors without content.

Every tensor of a forward and backward pass is as large as its rows make it, beside what has no rows
(weights, their gradients, their copies in another dtype). So two such steps, of two and of four
rows, tell both for every moment, and a peak for any number of rows is arithmetic
(stages/network/footprint.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from strata.stages.faking import faked
from strata.stages.memory import TensorBytes
from strata.stages.network.blocks import MemoryPeaks, Pair
from strata.stages.network.spec import Shape

CPU = torch.device("cpu")
FEW, MORE = 2, 4
"""Rows of the two steps: batch norm wants more than one."""


def moments(module: nn.Module, shape: Shape, compute: torch.dtype) -> MemoryPeaks | None:
    """Bytes of tensors of a block in training mode, at every moment that can be a peak.

    Args:
        shape: of one input.
        compute: dtype of the convolutions.

    Returns:
        None where it cannot be said: a kernel does not work on tensors without content, or does
        something else for another number of rows.
    """
    try:
        few, more = (_steps(module, (rows, *shape), compute) for rows in (FEW, MORE))
    except Exception:  # whatever code of others does
        return None
    if any(len(a) != len(b) for a, b in zip(few, more, strict=True)):
        return None
    (kept,), training, backward, frozen = map(_pairs, few, more)
    return MemoryPeaks(kept, training, backward, frozen)


def _pairs(few: Sequence[int], more: Sequence[int]) -> tuple[Pair, ...]:
    """Bytes by row and beside the rows, without those that are below another's in both."""
    slopes = [(b - a) // (MORE - FEW) for a, b in zip(few, more, strict=True)]
    pairs = {(slope, a - FEW * slope) for slope, a in zip(slopes, few, strict=True)}
    return tuple(
        sorted(
            (a, b)
            for a, b in pairs
            if not any((a, b) != (c, d) and a <= c and b <= d for c, d in pairs)
        )
    )


class _Logged(TensorBytes):
    """Bytes after every call that showed tensors."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.log: list[int] = []

    def see(self, values: Any) -> None:
        super().see(values)
        self.log.append(self.now)

    def started(self, held: Sequence[Tensor]) -> int:
        """Bytes of what others count, weights and input; the log begins after it."""
        self.see(held)
        self.log = []
        return self.now


def _steps(
    module: nn.Module, shape: Sequence[int], compute: torch.dtype
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Bytes kept after a forward pass; during it; during the backward pass; without a gradient."""
    half = torch.autocast("cpu", compute, enabled=compute != torch.float32)
    module.train()
    with faked(module, shape) as (state, x), _Logged() as counted:
        held = counted.started([*state.values(), x])
        with half:
            y = functional_call(module, state, (x,))
        kept, training = counted.now - held, counted.log
        counted.log = []
        # As the classifier's backward pass does: a gradient of the output, which itself may go.
        total = (y * torch.ones_like(y)).sum()
        del y
        counted.log = []
        total.backward()
        backward = counted.log
    module.eval()
    with faked(module, shape) as (state, x), _Logged() as counted, torch.no_grad():
        before = counted.started([*state.values(), x])
        with half:
            functional_call(module, state, (x,))
    module.train()
    training, backward = ([n - held for n in log] for log in (training, backward))
    return [kept], training, backward, [n - before for n in counted.log]
