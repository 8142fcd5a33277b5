"""What blocks are, read off from the modules: shapes, operations, memory, and whether they will do.

A block is shown a tensor without content in training mode. It must take one batch and give one, of
samples of 1 to 4 axes; it must draw nothing in eval mode, leave its input as it is, and keep all
its tensors where weights are kept. What is refused here would otherwise show as weights that cannot
be repeated, or as features that are not those of the network.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from strata.stages.errors import UnusableNetwork
from strata.stages.faking import faked
from strata.stages.foreign import guarded, told
from strata.stages.network.block_memory import Seen, memory_peaks
from strata.stages.network.block_source import construct, construct_head, digest
from strata.stages.network.blocks import AnyLayer, Block, Origin
from strata.stages.network.convolving import WHOLE
from strata.stages.network.spec import Shape

PIXELS = 16
"""Side of the x_j on which it is seen whether a block is local."""


def read_blocks(source: Origin, shape: Shape, dtype: str = "float32") -> tuple[Block, ...]:
    """The blocks of a network for x_0 of a shape.

    Args:
        dtype: of x_0 as it is stored. ``int32`` is seen as it is, all else as float32.

    Raises UnusableNetwork where it cannot be made or cut, or a block is not what layers can be.
    """
    blocks: list[Block] = []
    owner: dict[int, int] = {}
    known: dict[tuple[str, Seen], dict[str, Any]] = {}
    seen = Seen(shape, torch.int32 if dtype == "int32" else torch.float32)
    for index, (name, module) in enumerate(construct(source, None, shape, dtype), start=1):
        title = f"network {source.name}: block {index}, {name},"
        with guarded(title.rstrip(",")):
            _check_apart(module, index, owner, title)
            key = digest(source, module), seen
            if key not in known:  # many networks have the same block many times
                known[key] = _figures(module, seen, title)
        same = {"digest": key[0], "source": source, "x_0": (shape, dtype), **known[key]}
        blocks.append(one := Block(index=index, name=name, **same))
        seen = Seen(one.gives, last=one.features_last)
    return tuple(blocks)


def read_head(source: Origin, layer: AnyLayer, shape: Shape, classes: int) -> Block:
    """The classifier that a file makes for a layer whose x_j has a shape. Raises UnusableNetwork,
    also where it does not give as many logits as there are ``classes``."""
    title = f"network {source.name}: the classifier of x_{layer.index}"
    module = construct_head(source, shape, classes, None)
    with guarded(title):
        _check_apart(module, layer.index, {}, title)
        found = _figures(module, Seen(shape, last=layer.features_last), title)
        same = {"digest": digest(source, module), "source": source, **found}
    if found["gives"][-1] != classes:
        gives = _said(found["gives"])
        raise UnusableNetwork(f"{title} gives {gives}; its last axis must be {classes} classes")
    same |= {"width": classes, "features_last": False}
    return Block(index=layer.index, name=type(module).__name__, **same)


def _figures(module: nn.Module, seen: Seen, title: str) -> dict[str, Any]:
    """All of a block but what it is called."""
    shape = seen.shape
    output, work, draws = _shown(module, seen, title)
    last = _is_last(module, seen, output)
    factor = 0 if last or seen.last else _factor(shape, output)
    places = output[:-1] if last else output[1:]
    if len(places) == 2 and min(places) < 2:
        raise UnusableNetwork(
            f"{title} turns {_said(shape)} into {_said(output)}; sides must be 2 or more pixels: "
            "enlarge 'augment.crop', or leave out blocks"
        )
    sizes = [parameter.numel() for parameter in module.parameters()]
    return {
        "channels": shape[-1 if seen.last else 0],
        "width": output[-1 if last else 0],
        "factor": factor or 1,
        "features_last": last,
        "draws": draws,
        "takes": shape,
        "gives": output,
        "parameters": sum(sizes),
        "largest": max(sizes),
        "small": sum(p.numel() for p in module.parameters() if p.nbytes <= WHOLE),
        "work": work,
        "local": factor > 0 and _is_local(module, shape[0], factor),
        "whole": memory_peaks(module, seen, torch.float32),
        "half": memory_peaks(module, seen, torch.bfloat16),
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


def _shown(module: nn.Module, seen: Seen, title: str) -> tuple[Shape, int, bool]:
    """Shape of one output, multiply-adds of one input, and whether it draws in training."""
    rows = 2
    module.train()
    try:
        with faked(module, (rows, *seen.shape), seen.dtype) as (state, x):
            with _Draws() as draws, FlopCounterMode(display=False) as counter:
                y = functional_call(module, state, (x,))
            changed = x._version > 0
            with _Draws() as frozen_draws:
                frozen = functional_call(module.eval(), state, (x,))
            module.train()
    except Exception as error:  # whatever code of others does
        raise UnusableNetwork(f"{title} cannot take {_said(seen.shape)}: {told(error)}") from error
    if frozen_draws.name:
        raise UnusableNetwork(
            f"{title} draws random numbers in eval mode too ({frozen_draws.name}), so its features "
            "could not be computed again: draw in training mode alone"
        )
    if changed:
        raise UnusableNetwork(
            f"{title} changes its input in place: let its first operation make a copy"
        )
    for given, mode in ((y, "training"), (frozen, "eval")):
        gives = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        if (
            not isinstance(given, Tensor)
            or given.ndim not in range(2, 6)
            or given.shape != (rows, *y.shape[1:])
        ):
            raise UnusableNetwork(
                f"{title} must give one tensor, N samples of 1 to 4 axes, and gives {gives} in "
                f"{mode} mode"
            )
    if not y.requires_grad or not y.dtype.is_floating_point:
        raise UnusableNetwork(f"{title} gives no gradient to its weights")
    return tuple(y.shape[1:]), counter.get_total_flops() // 2 // rows, draws.name is not None


def _said(shape: Shape) -> str:
    return "×".join(map(str, shape))


def _is_last(module: nn.Module, seen: Seen, output: Shape) -> bool:
    """Is the last axis of the output that of the features? With twice as many places, all axes but
    that of the features are longer; where that cannot be shown, shapes and kinds of parts tell."""
    if len(output) == 1 or (len(output) == 3 and output[0] != output[1] == output[2]):
        return False
    twice = [2 * size for size in seen.shape]
    if seen.dtype.is_floating_point:
        twice[-1 if seen.last else 0] //= 2
    with suppress(Exception), faked(module, (2, *twice), seen.dtype) as (state, x):
        y = functional_call(module, state, (x,))
        same = [a == b for a, b in zip(y.shape[1:], output, strict=True)]
        if sum(same) == 1 and (same[0] or same[-1]):
            return same[-1]
    if len(output) == 2:
        kinds = nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d
        return not any(isinstance(part, kinds) for part in module.modules())
    return len(output) == 3 and output[0] == output[1] != output[2]


def _factor(shape: Shape, output: Shape) -> int:
    """By how much a map has fewer pixels a side; 0: by no one number."""
    if not len(shape) == len(output) == 3:
        return 0
    factor = shape[1] // output[1]
    return factor if tuple(side // factor for side in shape[1:] if factor) == output[1:] else 0


@torch.no_grad()
def _is_local(module: nn.Module, channels: int, factor: int) -> bool:
    """Does a pixel in one corner leave the values at the opposite one alone? If not (global
    averages, attention, learnt positions), the features of a canvas are not those of its crops."""
    generator = torch.Generator().manual_seed(0)
    named = *module.named_parameters(), *module.named_buffers()
    state = {n: torch.ones_like(t, device="cpu") if t.is_meta else t for n, t in named}
    for name, parameter in module.named_parameters():
        bound = 1 / math.sqrt(max(1, parameter[:1].numel()))
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        state[name] = values.uniform_(-bound, bound, generator=generator)
    side = PIXELS * factor
    x = torch.randn(1, channels, side, side, generator=generator)
    other = x.clone()
    other[..., :factor, :factor] += 1
    module.eval()
    try:
        y, z = (
            functional_call(module, state, (one,))[..., -PIXELS // 4 :, -PIXELS // 4 :]
            for one in (x, other)
        )
    except Exception:  # it knows one size only
        return False
    return torch.equal(y, z)
