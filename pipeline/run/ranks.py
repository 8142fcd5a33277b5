"""Processes that torchrun has started: `torchrun --nproc-per-node 2 cli.py train --layer j`.

The leader, rank 0, does all that is written, and speaks; what the others know of a run they read
from its directory, which all must see. Only solving layers is shared among them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from strata.pipeline.errors import OptionRange

if TYPE_CHECKING:
    from strata.stages.solve.ranks import Ranks

PATIENCE = timedelta(days=7)
"""How long ranks wait for the leader, which may have a level to write. torchrun ends all of them
when one of them dies."""


def number(name: str) -> int:
    """``RANK``, ``WORLD_SIZE`` and the same with ``LOCAL_``, as torchrun sets them; what a process
    alone has, if there is no torchrun."""
    return int(os.environ.get(name, name.endswith("WORLD_SIZE")))


def together() -> bool:
    """Are we one of several?"""
    return number("WORLD_SIZE") > 1


def leads() -> bool:
    """Are we the one that writes and speaks?"""
    return number("RANK") == 0


def voice() -> str:
    """What an error of one of several begins with."""
    return f"rank {number('RANK')}: " if together() else ""


def refuse_ranks() -> None:
    """For commands that one process does alone. Raises OptionRange where there are several."""
    if together():
        raise OptionRange(
            f"torchrun started {number('WORLD_SIZE')} processes, and this command is for one. "
            "`train`, `run` and `materialize` solve layers with several"
        )


@contextmanager
def ranks(device_name: str) -> Iterator[Ranks]:
    """This process among those that torchrun started, for the block; alone without torchrun.

    Args:
        device_name: ``auto``, ``cpu`` or ``cuda``: gradients go through gloo or NCCL.
    """
    from strata.stages.solve.ranks import Ranks

    if not together():
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    from strata.pipeline.run import device

    on_gpu = device.pick(device_name).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(number("LOCAL_RANK"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def check_parts(rows: int, accumulate: int, count: int) -> None:
    """Can so many ranks have equal parts of every micro-batch? Raises OptionRange.

    Args:
        rows: of a batch.
        accumulate: micro-batches in it.
        count: of ranks.
    """
    if count > 1 and rows % (accumulate * count):
        micro = f" in {accumulate} micro-batches" if accumulate > 1 else ""
        raise OptionRange(
            f"{count} ranks cannot have equal parts of a batch of {rows}{micro}. Start a number "
            f"of processes that divides {rows // accumulate}"
        )
