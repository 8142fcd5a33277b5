"""Peak bytes of training steps, counted tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch
from epochs import run_epoch
from torch import Tensor, nn

from strata.stages.features.quantise import Codec, codec, memory_format
from strata.stages.network.network import Layer
from strata.stages.network.spec import Shape
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import WATCHED_STEPS, Solver

CPU = torch.device("cpu")


def stepped(
    problem: nn.Module,
    shape: Shape,
    batch: int,
    accumulate: int,
    compute: torch.dtype,
    given: tuple[Tensor, Tensor] | None = None,
    **choices: Any,
) -> int:
    """Peak bytes of two steps, as a run measures them; on a batch of some shape, or on a given
    one. Choices are those of a schedule."""
    schedule = SGDSchedule("step", 2, batch, 0.1, 0.9, 5e-4, accumulate=accumulate, **choices)
    solver = Solver(problem, schedule, CPU, compute, draws=lambda *step: 1 + sum(step))
    generator = torch.Generator().manual_seed(0)

    def batches():
        for _ in range(WATCHED_STEPS):
            if given:
                x = given[0].clone()
                yield x.contiguous(memory_format=memory_format(x)), given[1]
                continue
            x = torch.randn(batch, *shape, generator=generator)
            if isinstance(getattr(problem, "layer", None), Layer):  # as the feed of problems does
                x = x.to(compute)
            yield x.contiguous(memory_format=torch.channels_last), torch.zeros(batch).long()

    run_epoch(solver, batches(), WATCHED_STEPS)
    return solver.progress.peak_bytes


def coded(precision: str, channels: int) -> Codec:
    scale, zero = torch.ones(channels), torch.zeros(channels, dtype=torch.uint8)
    return codec(precision, {"scale": scale, "zero": zero})
