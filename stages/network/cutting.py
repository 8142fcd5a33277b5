"""A model cut into a chain of blocks, read off from a forward pass.

Its modules are noted in the order in which they are called, as long as each sees what the one
before it gave. ``Sequential`` is opened up, and so is a module that holds most of the model in
lists; any other (a residual block, a dense block) stays whole. Where the model's own ``forward``
computes in between, torch.fx follows it: at every value which all that comes later depends on
alone, the chain can be cut, and what lies between two such values is one part. Then a block is

    pooling that lies before it · a part with weights · norms and activations that follow it

so pooling opens the next block, as P does in a layer (Sec. 4.3, VGG). A model's own classifier is
left out, since every block has an auxiliary classifier instead: all from where the places of a
sample (pixels, tokens) are gone, or a linear map that comes last. So is pooling that closes the
last block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from strata.stages.faking import faked
from strata.stages.network.following import followed
from strata.stages.network.links import (
    ROWS,
    Named,
    Part,
    has_places,
    joined,
    loses_places,
    part_of,
    size,
)
from strata.stages.network.spec import Shape


def cut(model: nn.Module, title: str, shape: Shape, dtype: torch.dtype) -> list[Named]:
    """The blocks of a model for samples of a shape, each with its name and class.

    Raises UnusableNetwork, with a ``title`` and the true reason, where it is no chain.
    """
    units = dict(_units(model, whole=None))
    parts = _chain(model, units, shape, dtype)
    if isinstance(parts, str) or sum(part.begins for part in parts) < 2:
        units = dict(_units(model, size(model)))
        parts = _chain(model, units, shape, dtype)
    if isinstance(parts, str):
        parts = followed(model, units, f"{title} is no chain of blocks: ", parts, shape, dtype)
    *before, last = [n for n, part in enumerate(parts) if size(part.module)] or [0]
    if any(parts[n].begins for n in before) and type(parts[last].module) is nn.Linear:
        del parts[last:]
    return joined(parts)


def _units(module: nn.Module, whole: int | None, path: str = "") -> Iterator[Named]:
    """Modules that are not opened up, in the order of their definition. Lists are: nobody calls
    them; with the size of the ``whole`` model, so are those that are made of them."""
    for name, child in module.named_children():
        if _is_list(child) or (whole and _is_made_of_lists(child, whole)):
            yield from _units(child, whole, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def _is_list(module: nn.Module) -> bool:
    return type(module).forward in (nn.Sequential.forward, nn.Module.forward)


def _is_made_of_lists(module: nn.Module, whole: int) -> bool:
    """Does it hold most of the model's weights, most of them in lists of several parts?"""
    if type(module).__module__.startswith("torch.nn.") or 2 * size(module) <= whole:
        return False
    lists = [one for one in module.children() if _is_list(one)]
    several = [one for one in lists if sum(size(part) > 0 for part in one.children()) > 1]
    return 2 * sum(map(size, several)) > size(module)


# ---- modules that see what the one before them gave ----------------------------------------------


@dataclass
class _Call:
    path: str
    module: nn.Module
    given: tuple[Any, ...]
    version: int
    """How often the input had been changed in place."""
    output: Any = None
    after: int = 0
    """How often the output had been."""

    def sees(self, value: Any, version: int) -> bool:
        """Does it see one value alone, as it was made, and give one?"""
        alone = len(self.given) == 1 and self.given[0] is value and self.version == version
        return alone and isinstance(self.output, Tensor)


def _chain(
    model: nn.Module, units: Mapping[str, nn.Module], shape: Shape, dtype: torch.dtype
) -> list[Part] | str:
    """The links up to the classifier, where each is a module; else why they are none."""
    with faked(model, (ROWS, *shape), dtype) as (state, x):
        first = x._version
        calls = trained = _calls(model.eval(), units, state, x)
        model.train()
        with suppress(Exception):  # a classifier of its own may not take this size
            trained = _calls(model, units, state, x)
    chain, (last, version), (value, changed) = list[_Call](), (x, first), (x, first)
    for call in calls:
        if not call.sees(last, version) or loses_places(call.output, last):
            break
        # In training mode it must be the same: a function such as dropout is idle in eval mode.
        same = (one for one in trained if one.path == call.path and one.sees(value, changed))
        if (one := next(same, None)) is None:
            return f"{call.path} sees something else in training mode than in eval mode"
        chain.append(call)
        last, version, value, changed = call.output, call.after, one.output, one.after
    for call in calls[len(chain) :]:
        if size(call.module) and (has_places(call.output) or not has_places(x) or not chain):
            after = f" ({chain[-1].path})" if chain else ""
            what = f"{call.path} ({type(call.module).__name__})"
            return f"{what} does not see just what the part before it gave{after}"
    return [part_of(call.path, call.module) for call in chain] or "it calls no modules"


def _calls(
    model: nn.Module, units: Mapping[str, nn.Module], state: dict[str, Tensor], x: Tensor
) -> list[_Call]:
    """The calls of units in a forward pass, in their order."""
    calls: list[_Call] = []

    def begin(path: str, module: nn.Module, args: Any, more: Any) -> None:
        given = (*args, *(value for value in more.values() if value is not None))
        calls.append(_Call(path, module, given, getattr((*given, None)[0], "_version", 0)))

    def end(_: Any, __: Any, output: Any) -> None:
        calls[-1].output, calls[-1].after = output, getattr(output, "_version", 0)

    hooks = []
    for path, unit in units.items():
        before = lambda unit, args, more, path=path: begin(path, unit, args, more)  # noqa: E731
        hooks.append(unit.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(unit.register_forward_hook(end))
    try:
        functional_call(model, state, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    return calls
