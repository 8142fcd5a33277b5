"""A module as a chain of plain torch modules, read off from a forward pass of its own.

A layer or a classifier is a sequence: every part sees what the one before it gave. Running it once
and noting who is called, with what, tells that sequence, whatever the module's class looks like.
A new kind of part needs one line: in :data:`ARGUMENTS` if it is a module, or in :data:`FUNCTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from strata.stages.errors import StageError
from strata.stages.features.quantise import Codec, Floats

CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "bias")
CONVOLUTION += ("dilation", "padding_mode")
POOLING = ("kernel_size", "stride", "padding", "ceil_mode")
NORM = ("num_features", "eps", "affine", "track_running_stats")
ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: CONVOLUTION,
    nn.BatchNorm2d: NORM,
    nn.BatchNorm1d: NORM,
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.PixelUnshuffle: ("downscale_factor",),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AvgPool2d: (*POOLING, "count_include_pad", "divisor_override"),
    nn.MaxPool2d: (*POOLING, "dilation"),
    nn.Flatten: ("start_dim",),
    nn.ReLU: (),
}
"""Arguments that make one of torch's modules, by their names."""
FUNCTIONS: dict[str, Callable[..., tuple[str, dict[str, Any]]]] = {
    "relu": lambda: ("ReLU", {}),
    "relu_": lambda: ("ReLU", {}),
    "flatten": lambda start_dim=0: ("Flatten", {"start_dim": start_dim}),
    "adaptive_avg_pool2d": lambda output_size: ("AdaptiveAvgPool2d", {"output_size": output_size}),
}
"""Functions and methods of tensors: the module that does the same, from their arguments."""

BLOCK = "Block"
"""Kind of a part that is code of somebody else's."""


@dataclass(frozen=True)
class Part:
    """One module of a chain."""

    name: str
    """Path in the module it comes from, with _ for dots: ``convolutions_0``."""
    kind: str
    """Class name."""
    arguments: dict[str, Any]
    """Arguments of the constructor, as JSON."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Parameters and buffers."""
    module: nn.Module | None = None
    """The module, where its class is none of torch's: arguments cannot make it then."""

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, **self.arguments}


@torch.no_grad()
def chain(module: nn.Module, shape: Sequence[int]) -> list[Part]:
    """The parts of a module in eval mode on the CPU, in their order; ``Identity`` is left out.

    ``shape`` is (C, H, W) of an input. Raises StageError where the module is no chain, or a part of
    it is of no known kind.
    """
    x = torch.zeros(1, *shape)
    listener, hooks = _Listener(x), []
    for name, part in module.named_modules():
        # An empty Sequential has no children either, and is no leaf.
        if not isinstance(part, nn.Sequential) and not any(part.children()):
            hooks.append(part.register_forward_pre_hook(listener.enter))
            hooks.append(part.register_forward_hook(partial(listener.leave, name)))
    try:
        with listener:
            result = module(x)
    finally:
        for hook in hooks:
            hook.remove()
    if result is not listener.last:
        raise StageError(f"{type(module).__name__} is no chain: its result is not its last part's")
    return [part for parts in listener.calls for part in parts]


def whole(module: nn.Module, name: str) -> list[Part]:
    """A module that is no chain of known parts, as one part; the name is for people."""
    return [Part("block", BLOCK, {"name_in_code": name}, dict(module.state_dict()), module)]


def rounding(codec: Codec) -> list[Part]:
    """What a layer's output is rounded to, as a chain; empty for float32."""
    if isinstance(codec, Floats):
        exact = codec.precision == "float32"
        return [] if exact else [Part("cast", "Round", {"dtype": codec.precision})]
    sizes = {"channels": len(codec.scale), "levels": codec.levels}
    return [Part("codes", "Codes", sizes, codec.tensors())]


class _Listener(TorchFunctionMode):
    """Notes every leaf module and every function outside of one, as they are called."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.last, self._inside = x, False
        self.calls: list[list[Part]] = []
        """Parts of every call; none for an ``Identity``."""

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inside = True

    def leave(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._follow(name, inputs[0], output)
        self.calls.append(_of_module(name, module))
        self._inside = False  # only now: reading a state calls functions, too

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._inside and isinstance(output, Tensor):
            self._follow(func.__name__, args[0], output)
            made = _of_function(func.__name__, args[1:], kwargs or {}, len(self.calls))
            self.calls.append([made])
        return output

    def _follow(self, name: str, x: Any, output: Tensor) -> None:
        if x is not self.last:
            raise StageError(f"no chain: {name} does not see what the part before it gave")
        self.last = output


def _of_module(name: str, module: nn.Module) -> list[Part]:
    kind = type(module)
    if kind is nn.Identity:
        return []
    if kind not in ARGUMENTS:
        raise StageError(f"{name} is a {kind.__name__}, which stages/chain.py does not know")
    arguments = {key: getattr(module, key) for key in ARGUMENTS[kind]}
    if "bias" in arguments:
        arguments["bias"] = module.bias is not None
    return [Part(name.replace(".", "_"), kind.__name__, arguments, module.state_dict())]


def _of_function(name: str, rest: tuple[Any, ...], named: dict[str, Any], number: int) -> Part:
    if name not in FUNCTIONS:
        raise StageError(f"{name}() is a function that stages/chain.py does not know")
    try:
        kind, arguments = FUNCTIONS[name](*rest, **named)
    except TypeError:
        raise StageError(f"{name}() has arguments that stages/chain.py does not know") from None
    return Part(f"{name.rstrip('_')}_{number}", kind, arguments)
