"""Blocks of a network that a Python file or torchvision makes: modules, one after another.

A constructor draws its weights from torch's own generator. As long as it runs, that generator goes
on from a given seed, and afterwards from where it was; where weights are loaded later, it is not
asked at all. Weights are always random, never pretrained.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from strata.stages.errors import UnusableNetwork
from strata.stages.network.blocks import Block, Origin
from strata.stages.network.cutting import cut

TORCHVISION = "torchvision:"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")

_Named = tuple[str, nn.Module]


def blank_block(block: Block) -> nn.Module:
    """A block whose weights are to be loaded; nothing is drawn."""
    return _one(block, None)


def fresh_block(block: Block, seed: int) -> nn.Module:
    """A block as its constructor initialises it, with torch's draws from a seed: the same on every
    machine."""
    return _one(block, seed)


def fresh_blocks(blocks: Sequence[Block], seed: int) -> list[nn.Module]:
    """All blocks of one network, from one construction."""
    made = made_by(blocks[0].source, seed)
    return [_checked(block, made) for block in blocks]


def _one(block: Block, seed: int | None) -> nn.Module:
    return _checked(block, made_by(block.source, seed))


def _checked(block: Block, made: Sequence[_Named]) -> nn.Module:
    name, module = made[block.index - 1] if block.index <= len(made) else ("", None)
    if module is None or digest(block.source, module) != block.digest:
        raise UnusableNetwork(
            f"network {block.source.name}: block {block.index}, {name or 'missing'} here, is not "
            f"what the run was made with ({block.name}, {block.digest[:12]}). Is this another "
            "version of torchvision, or of what the file imports?"
        )
    return module


def made_by(source: Origin, seed: int | None) -> list[_Named]:
    """The blocks of a network on the CPU, each with its name there, in training mode.

    Args:
        seed: None draws nothing: what constructors fill at random is all alike.

    Raises:
        UnusableNetwork: it cannot be made, or not be cut into blocks.
    """
    with _drawing(seed), _in_one_line(source):
        if source.name.startswith(TORCHVISION):
            return cut(_torchvision(source), source.name)
        return _of_file(source)


def digest(source: Origin, module: nn.Module) -> str:
    """Of a block's code and structure, without its weights."""
    state = [[n, list(t.shape), str(t.dtype)] for n, t in module.state_dict().items()]
    said = {
        "name": source.name,
        "arguments": source.arguments,
        "code": source.digest or _code_of(module),
        "structure": ADDRESS.sub("", str(module)),
        "state": state,
    }
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _code_of(module: nn.Module) -> list[str]:
    """Of every class in it that is not torch's own, without comments and layout."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")]
    sources = [textwrap.dedent(inspect.getsource(kind)) for kind in own]
    return sorted(ast.unparse(ast.parse(text)) for text in sources)


# ---- who makes them ------------------------------------------------------------------------------


def _torchvision(source: Origin) -> nn.Module:
    from torchvision import models

    name, known = source.name.removeprefix(TORCHVISION), models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise UnusableNetwork(
            f"network {source.name}: torchvision has no such classifier"
            f"{f'. Did you mean {TORCHVISION}{near[0]}?' if near else ''}"
        )
    return models.get_model(name, weights=None, **dict(source.arguments))


def _of_file(source: Origin) -> list[_Named]:
    path, _, name = source.name.rpartition(":")
    place = _executed(source, path)
    found = getattr(place, name, None)
    if found is None:
        raise UnusableNetwork(f"network {source.name}: {path} has no {name}")
    if callable(found) and not isinstance(found, nn.Module):
        found = found(**dict(source.arguments))
    elif source.arguments:
        raise UnusableNetwork(
            f"network {source.name}: {name} is no function, and takes no arguments"
        )
    if not isinstance(found, (list, tuple, nn.Sequential, nn.ModuleList)) or not len(found):
        raise UnusableNetwork(
            f"network {source.name}: {name} must be or return a list of blocks, got "
            f"{type(found).__name__}"
        )
    for number, part in enumerate(found, start=1):
        if not isinstance(part, nn.Module):
            raise UnusableNetwork(
                f"network {source.name}: block {number} is a {type(part).__name__}, not a module"
            )
    return [(f"{name}[{n}] ({type(part).__name__})", part) for n, part in enumerate(found)]


def _executed(source: Origin, path: str) -> ModuleType:
    """The file as a module of its own. Its directory is not searched for imports: what it needs
    beside installed packages is in it, so that its text tells all."""
    code = source.code or ""
    module = ModuleType(f"strata_network_{sha256(code.encode()).hexdigest()[:12]}")
    sys.modules[module.__name__] = module  # dataclasses look there for the types of their fields
    exec(compile(code, path, "exec"), module.__dict__)
    return module


# ---- around a constructor ------------------------------------------------------------------------


@contextmanager
def _drawing(seed: int | None) -> Iterator[None]:
    """Torch's generator of the CPU stands at a seed, and afterwards where it was."""
    with torch.random.fork_rng(devices=[]):
        if seed is None:
            with _NoDraws():
                yield
        else:
            torch.default_generator.set_state(torch.Generator().manual_seed(seed).get_state())
            yield


class _NoDraws(TorchFunctionMode):
    """What would be drawn is its mean: drawing is most of the time that a large network takes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ not in ("uniform_", "normal_"):
            return func(*args, **kwargs)
        tensor, first, second = _filled(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_((first + second) / 2 if func.__name__ == "uniform_" else first)


def _filled(tensor: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, float, float]:
    """The tensor, and two numbers, of ``uniform_(a, b)`` or ``normal_(mean, std)``, which nn.init
    and tensors have; they name them differently."""
    rest = (*rest, *(value for name, value in named.items() if name != "generator"))
    first, second = (*rest, 0.0, 1.0)[:2] if len(rest) != 1 else (rest[0], 1.0)
    return tensor, first, second


@contextmanager
def _in_one_line(source: Origin) -> Iterator[None]:
    """Whatever goes wrong in code that is not ours, as one of our errors."""
    try:
        yield
    except UnusableNetwork:
        raise
    except Exception as error:
        raise UnusableNetwork(
            f"network {source.name}: {_where(source, error)}{type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def _where(source: Origin, error: BaseException) -> str:
    path = source.name.rpartition(":")[0]
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}, "
    lines, at = [], error.__traceback__
    while at:
        lines += [at.tb_lineno] if at.tb_frame.f_code.co_filename == path else []
        at = at.tb_next
    return f"line {lines[-1]}, " if lines and source.code else ""


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a line of ours."""
    return (str(error).strip().splitlines() or [""])[0][:200]
