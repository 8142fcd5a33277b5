"""Memory of blocks, read off from steps on tensors without content."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from strata.stages.faking import faked
from strata.stages.memory import TensorBytes
from strata.stages.network.blocks import MemoryPeaks, Pair
from strata.stages.network.convolving import WHOLE
from strata.stages.network.kernels import in_parts
from strata.stages.network.spec import Shape

FEW, MORE = 2, 4
"""Rows of the two steps that tell memory: batch norm wants more than one."""


@dataclass(frozen=True)
class Seen:
    """What a block is shown: samples of a shape and dtype, whose features may be the last axis."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    last: bool = False


def memory_peaks(module: nn.Module, seen: Seen, compute: torch.dtype) -> MemoryPeaks | None:
    """Bytes of tensors of a block, at every moment of a step that can be a peak.

    None where a kernel does not work on tensors without content, or does something else for another
    number of rows. ``compute`` is the dtype of the convolutions.
    """
    try:
        few, more = (_steps(module, seen, rows, compute) for rows in (FEW, MORE))
    except Exception:  # whatever code of others does
        return None
    if [len(log) for log in few] != [len(log) for log in more]:
        return None
    (value, *_), _ = few.pop(), more.pop()
    (kept,), training, backward, frozen = map(_pairs, few, more)
    return MemoryPeaks(kept, training, backward, frozen, value)


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
    """Bytes after every call that showed tensors, without those of some that others count."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__(torch.device("cpu"))
        super().see(held)
        self.held, self.log = self.now, list[int]()

    def see(self, values: Any) -> None:
        super().see(values)
        self.log.append(self.now - self.held)

    def taken(self) -> list[int]:
        """The log so far; another one begins."""
        log, self.log = self.log, []
        return log


def _steps(module: nn.Module, seen: Seen, rows: int, compute: torch.dtype) -> list[list[int]]:
    """Bytes kept after a forward pass; during it; during the backward pass; without a gradient; of
    a value."""
    half = torch.autocast("cpu", compute, enabled=compute != torch.float32)
    module.train()
    with faked(module, (rows, *seen.shape), seen.dtype) as (state, x), ExitStack() as stack:
        # As the solver does: what is large goes where the momentum is, and does not stay.
        large = [t for t in state.values() if t.requires_grad and t.nbytes > WHOLE]
        totals = {one: torch.zeros_like(one) for one in large}
        for one in large:
            one.register_post_accumulate_grad_hook(lambda t: setattr(t, "grad", None))
        counted = stack.enter_context(_Logged([*state.values(), *totals.values(), x]))
        stack.enter_context(in_parts(module, totals.__getitem__))
        with half:
            y = functional_call(module, state, (x,))
        value = [y.itemsize]
        kept, training = [counted.now - counted.held], counted.taken()
        # As the classifier's backward pass does: a gradient of the output, which itself may go.
        total = (y * torch.ones_like(y)).sum()
        del y
        counted.taken()
        total.backward()
        backward = counted.taken()
    module.eval()
    with (
        faked(module, (rows, *seen.shape), seen.dtype) as (state, x),
        _Logged([*state.values(), x]) as counted,
        torch.no_grad(),
        half,
    ):
        functional_call(module, state, (x,))
    module.train()
    return [kept, training, backward, counted.log, value]
