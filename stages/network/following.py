"""A model's ``forward`` followed with torch.fx, where it computes between its modules.

At every value which all that comes later depends on alone, the chain can be cut. What lies between
two such values is one link: a module, or a piece of the ``forward``.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.node import map_arg

from strata.stages.errors import UnusableNetwork
from strata.stages.faking import faked
from strata.stages.foreign import told
from strata.stages.network.links import ROWS, Part, has_places, loses_places, part_of
from strata.stages.network.spec import Shape

MAKERS = torch.arange, torch.zeros, torch.ones, torch.full
"""Functions that make tensors of a size which is followed, too."""
FEW = 2
"""Parts with weights that one block may be made of though they are half of the model's."""
ADVICE = "Name a Python file with a list of blocks of your own"


class Piece(fx.GraphModule):
    """What a model's ``forward`` does between two values, with the modules that it calls there."""

    def extra_repr(self) -> str:
        return "\n".join(map(_text, self.graph.nodes))

    __str__ = nn.Module.__repr__  # without code, which every version of torch writes otherwise


def _text(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else torch.typename(node.target)
    return f"{node.name} = {node.op} {target} {node.args} {node.kwargs}"


class _Tracer(fx.Tracer):
    def __init__(self, units: Collection[str]) -> None:
        super().__init__(autowrap_functions=MAKERS)
        self._autowrap_search.append(torch)
        self.units = units

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.units


def _trace(model: nn.Module, units: Collection[str]) -> list[fx.Node]:
    """What depends on the input, which comes first, in the order in which it is computed."""
    given = inspect.signature(model.forward).parameters.values()
    rest = {one.name: one.default for one in given if one.default is not one.empty}
    graph = _Tracer(units).trace(model, rest)
    seen = _dependent(graph)
    for node in filter(_counts_samples, seen):
        for user in list(node.users):
            if user.op == "call_method" and user.args[0] in seen and user.args[0] is not node:
                # All values have as many samples: nothing is carried past blocks to know that.
                with graph.inserting_before(user):
                    user.replace_input_with(node, graph.call_method("size", (user.args[0], 0)))
    return _dependent(graph)


def _dependent(graph: fx.Graph) -> list[fx.Node]:
    """What depends on the input, which comes first."""
    first, *others = graph.nodes
    found = {first: None}
    for node in others:
        if node.op != "output" and not found.keys().isdisjoint(node.all_input_nodes):
            found[node] = None
    return list(found)


def _counts_samples(node: fx.Node) -> bool:
    """Is it the number of samples: x.size(0), or x.shape[0]?"""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    of = node.args[0] if node.target is operator.getitem and node.args[1:] == (0,) else None
    if not isinstance(of, fx.Node):
        return False
    is_shape = of.target is getattr and of.args[1:] == ("shape",)
    return is_shape or (of.op == "call_method" and of.target == "size" and len(of.args) == 1)


def followed(
    model: nn.Module,
    units: Mapping[str, nn.Module],
    title: str,
    reason: str,
    shape: Shape,
    dtype: torch.dtype,
) -> list[Part]:
    """The links up to the classifier, as torch.fx sees them; ``reason`` says why modules alone are
    none. Raises UnusableNetwork."""
    try:
        trained, nodes = (_trace(model.train(mode), units) for mode in (True, False))
    except Exception as error:  # whatever code of others does
        why = f"{reason}, and its forward cannot be followed ({told(error)})"
        raise UnusableNetwork(f"{title}{why}. {ADVICE}") from error
    model.train()
    called = [n for n, node in enumerate(nodes) if _main([node], units)]
    cuts = _cuts(nodes)
    whole = _piece(model, nodes, {n: nodes[n] for n in sorted({*cuts, *called})})
    with faked(whole, (ROWS, *shape), dtype) as (state, x):
        values = functional_call(whole, state, (x,))
    trunk, last = [0], x
    for number in cuts:
        if loses_places(values[number], last):
            break
        if isinstance(values[number], Tensor) and values[number].shape[:1] == (ROWS,):
            trunk.append(number)
            last = values[number]
    end = trunk[-1]
    for node, other in zip(nodes[: end + 1], trained, strict=False):
        if _text(node) != _text(other):
            why = f"{node.name} does something else in training mode: make it a module of its own"
            raise UnusableNetwork(f"{title}{why}. {ADVICE}")
    stray = any(n > end and (has_places(values[n]) or not has_places(x)) for n in called)
    for before, after in [*pairwise(trunk), *([(end, len(nodes) - 1)] if stray else [])]:
        inside = [n for n in called if before < n <= after]
        if after > end or (len(inside) > FEW and 2 * len(inside) >= len(called)):
            raise UnusableNetwork(f"{title}{_crossing(nodes, called, before, after)}. {ADVICE}")
    return [_link(model, nodes[a : b + 1], units) for a, b in pairwise(trunk)]


def _cuts(nodes: Sequence[fx.Node]) -> list[int]:
    """The numbers of those values, after the first, which all that comes later depends on alone."""
    place = {node: number for number, node in enumerate(nodes)}
    found, reach = list[int](), 0
    for number, node in enumerate(nodes):
        if 0 < number >= reach:
            found.append(number)
        reach = max([reach, *(place.get(user, 0) for user in node.users)])
    return found


def _piece(model: nn.Module, nodes: Sequence[fx.Node], gives: Any) -> Piece:
    """A module that sees the value of the first node, computes the others, and gives some."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copies[nodes[0]] = graph.placeholder("x")

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # what does not depend on the input is in no list of nodes
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        copied(node)
    graph.output(map_arg(gives, copied))
    return Piece(model, graph)


def _main(nodes: Sequence[fx.Node], units: Mapping[str, nn.Module]) -> Part | None:
    """The first part called that a block is for."""
    calls = [str(node.target) for node in nodes if node.op == "call_module"]
    parts = (part_of(path, units[path]) for path in calls)
    return next((part for part in parts if part.begins), None)


def _link(model: nn.Module, nodes: Sequence[fx.Node], units: Mapping[str, nn.Module]) -> Part:
    """What lies between the values of the first and the last node."""
    first, *inner, last = nodes
    more = [value for value in last.kwargs.values() if value is not None]
    if last.op == "call_module" and not inner and last.args == (first,) and not more:
        return part_of(str(last.target), units[str(last.target)])
    main, module = _main(nodes[1:], units), _piece(model, nodes, last)
    path, kind = (main.path, main.kind) if main else (last.name, "function")
    return Part(path, module, kind, main is not None, main is None and "pool" in last.name)


def _crossing(nodes: Sequence[fx.Node], called: Sequence[int], before: int, after: int) -> str:
    """Which blocks a value passes by: as few as there are of one value."""
    place = {node: number for number, node in enumerate(nodes)}
    passed = [
        [k for k, n in enumerate(called, 1) if place[node] < n < place[user]]
        for node in nodes[before:after]
        for user in node.users
        if user in place
    ]
    crossed = min(filter(None, passed), key=len, default=[])
    if not crossed:
        return f"several parts see what {nodes[before].name} gave, and nothing joins them"
    blocks = f"block {crossed[0]}" + f" to {crossed[-1]}" * (len(crossed) > 1)
    return f"its skip connection crosses {blocks} ({nodes[called[crossed[0] - 1]].target})"
