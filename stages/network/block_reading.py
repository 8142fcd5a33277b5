"""What blocks are, read off from the modules: shapes, operations, memory, and whether they will do.

A block is shown a tensor without content in training mode. It must take one (N, C, H, W) and give
one, of a side that divides the input's; it must draw nothing, leave its input as it is, and keep
all its tensors where weights are kept. What is refused here would otherwise show as weights that
cannot be repeated, or as features that are not those of the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from strata.stages.errors import UnusableNetwork
from strata.stages.faking import faked
from strata.stages.foreign import guarded, told
from strata.stages.memory import TensorBytes
from strata.stages.network.block_source import construct, digest
from strata.stages.network.blocks import Block, MemoryPeaks, Origin, Pair
from strata.stages.network.footprint import WHOLE
from strata.stages.network.kernels import in_parts
from strata.stages.network.spec import Shape

PIXELS = 16
"""Side of the x_j on which it is seen whether a block is local."""
FEW, MORE = 2, 4
"""Rows of the two steps that tell memory: batch norm wants more than one."""


def read_blocks(source: Origin, shape: Shape) -> tuple[Block, ...]:
    """The blocks of a network for images of a shape, (channel, y, x).

    Raises UnusableNetwork where it cannot be made or cut, or a block is not what layers can be.
    """
    blocks: list[Block] = []
    owner: dict[int, int] = {}
    known: dict[tuple[str, Shape], dict[str, Any]] = {}
    for index, (name, module) in enumerate(construct(source, None), start=1):
        title = f"network {source.name}: block {index}, {name},"
        with guarded(title.rstrip(",")):
            _check_apart(module, index, owner, title)
            key = digest(source, module), shape
            if key not in known:  # many networks have the same block many times
                known[key] = _figures(module, shape, title)
        one = Block(index=index, digest=key[0], name=name, source=source, **known[key])
        blocks.append(one)
        shape = one.output(shape)
    return tuple(blocks)


def _figures(module: nn.Module, shape: Shape, title: str) -> dict[str, Any]:
    """All of a block but what it is called."""
    output, work = _shown(module, shape, title)
    sizes = [parameter.numel() for parameter in module.parameters()]
    return {
        "channels": shape[0],
        "width": output[0],
        "factor": _factor(shape, output, title),
        "parameters": sum(sizes),
        "largest": max(sizes),
        "small": sum(p.numel() for p in module.parameters() if p.nbytes <= WHOLE),
        "side": shape[1],
        "work": work,
        "local": _is_local(module, shape[0], shape[1] // output[1]),
        "whole": memory_peaks(module, shape, torch.float32),
        "half": memory_peaks(module, shape, torch.bfloat16),
    }


def _check_apart(module: nn.Module, index: int, owner: dict[int, int], title: str) -> None:
    """Refuse a block that has no weights, or shares them, and tensors that would not be kept.

    ``owner`` has the block of every parameter, by id; those of this one are noted.
    """
    for parameter in module.parameters():
        if (other := owner.setdefault(id(parameter), index)) != index:
            raise UnusableNetwork(
                f"{title} shares weights with block {other}, which is trained alone"
            )
    if not any(p.requires_grad for p in module.parameters()):
        raise UnusableNetwork(f"{title} has no weights to train: make it a part of the next one")
    kept = set(module.state_dict(keep_vars=True))
    for path, part in module.named_modules():
        for name, value in (*vars(part).items(), *part._buffers.items()):
            loose = f"{path}.{name}".removeprefix(".")
            if isinstance(value, Tensor) and loose not in kept:
                raise UnusableNetwork(
                    f"{title} has the tensor {loose} beside its parameters and buffers, so it "
                    "would not be kept with them: use register_buffer, persistent"
                )


# ---- shown a tensor without content --------------------------------------------------------------


class _Draws(TorchDispatchMode):
    """Notes the first call that draws from a random generator."""

    name: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and self.name is None:
            given = {one.name: one.default_value for one in func._schema.arguments}
            given |= {**dict(zip(given, args, strict=False)), **(kwargs or {})}
            if given.get("dropout_p") != 0:  # attention has the tag whatever its dropout is
                self.name = func.name().removeprefix("aten::")
        return func(*args, **(kwargs or {}))


def _shown(module: nn.Module, shape: Shape, title: str) -> tuple[Shape, int]:
    """Shape of one output, and multiply-adds of one input."""
    rows = 2
    module.train()
    try:
        with faked(module, (rows, *shape)) as (state, x), _Draws() as draws:
            with FlopCounterMode(display=False) as counter:
                y = functional_call(module, state, (x,))
            changed = x._version > 0
            frozen = functional_call(module.eval(), state, (x,))
            module.train()
    except Exception as error:  # whatever code of others does
        seen = "×".join(map(str, shape))
        raise UnusableNetwork(f"{title} cannot take {seen}: {told(error)}") from error
    if draws.name:
        raise UnusableNetwork(
            f"{title} draws random numbers in training ({draws.name}), which a run could not "
            "repeat: take its dropout away, or set it to 0"
        )
    if changed:
        raise UnusableNetwork(
            f"{title} changes its input in place: let its first operation make a copy"
        )
    for given, mode in ((y, "training"), (frozen, "eval")):
        gives = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        if not isinstance(given, Tensor) or given.ndim != 4 or given.shape != (rows, *y.shape[1:]):
            raise UnusableNetwork(
                f"{title} must give one tensor N×C×H×W, and gives {gives} in {mode} mode"
            )
    if not y.requires_grad or not y.dtype.is_floating_point:
        raise UnusableNetwork(f"{title} gives no gradient to its weights")
    _, channels, height, width = y.shape
    return (channels, height, width), counter.get_total_flops() // 2 // rows


def _factor(shape: Shape, output: Shape, title: str) -> int:
    """By how much it has fewer pixels a side."""
    (_, before, _), (channels, height, width) = shape, output
    if height != width or height < 2:
        raise UnusableNetwork(
            f"{title} turns {'×'.join(map(str, shape))} into {channels}×{height}×{width}; sides "
            "must be equal, and 2 or more pixels: enlarge 'augment.crop', or leave out blocks"
        )
    factor = before // height
    if factor * height != before:
        raise UnusableNetwork(
            f"{title} turns a side of {before} pixels into {height}, which does not divide it: pad "
            "its convolutions, or change 'augment.crop'"
        )
    return factor


@torch.no_grad()
def _is_local(module: nn.Module, channels: int, factor: int) -> bool:
    """Does a pixel in one corner leave the values at the opposite one alone? If not (global
    averages, attention, learnt positions), the features of a canvas are not those of its crops."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        bound = 1 / math.sqrt(max(1, parameter[:1].numel()))
        parameter.uniform_(-bound, bound, generator=generator)
    side = PIXELS * factor
    x = torch.randn(1, channels, side, side, generator=generator)
    other = x.clone()
    other[..., :factor, :factor] += 1
    module.eval()
    try:
        y, z = (module(one)[..., -PIXELS // 4 :, -PIXELS // 4 :] for one in (x, other))
    except Exception:  # it knows one size only
        return False
    return torch.equal(y, z)


# ---- memory --------------------------------------------------------------------------------------


def memory_peaks(module: nn.Module, shape: Shape, compute: torch.dtype) -> MemoryPeaks | None:
    """Bytes of tensors of a block, at every moment of a step that can be a peak.

    None where a kernel does not work on tensors without content, or does something else for another
    number of rows. ``shape`` is that of one input, ``compute`` the dtype of the convolutions.
    """
    try:
        few, more = (_steps(module, (rows, *shape), compute) for rows in (FEW, MORE))
    except Exception:  # whatever code of others does
        return None
    if [len(log) for log in few] != [len(log) for log in more]:
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


def _steps(module: nn.Module, shape: Sequence[int], compute: torch.dtype) -> list[list[int]]:
    """Bytes kept after a forward pass; during it; during the backward pass; without a gradient."""
    half = torch.autocast("cpu", compute, enabled=compute != torch.float32)
    module.train()
    with faked(module, shape) as (state, x), ExitStack() as stack:
        # As the solver does: what is large goes where the momentum is, and does not stay.
        large = [t for t in state.values() if t.requires_grad and t.nbytes > WHOLE]
        totals = {one: torch.zeros_like(one) for one in large}
        for one in large:
            one.register_post_accumulate_grad_hook(lambda t: setattr(t, "grad", None))
        counted = stack.enter_context(_Logged([*state.values(), *totals.values(), x]))
        stack.enter_context(in_parts(module, totals.__getitem__))
        with half:
            y = functional_call(module, state, (x,))
        kept, training = [counted.now - counted.held], counted.taken()
        # As the classifier's backward pass does: a gradient of the output, which itself may go.
        total = (y * torch.ones_like(y)).sum()
        del y
        counted.taken()
        total.backward()
        backward = counted.taken()
    module.eval()
    with (
        faked(module, shape) as (state, x),
        _Logged([*state.values(), x]) as counted,
        torch.no_grad(),
        half,
    ):
        functional_call(module, state, (x,))
    module.train()
    return [kept, training, backward, counted.log]
