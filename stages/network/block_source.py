"""Blocks of a network that a Python file or torchvision makes: modules, one after another.

A file gives blocks. A model of torchvision is cut into a chain of them, read off from a forward
pass: its modules in the order in which they are called, as long as each sees what the one before it
gave. ``Sequential`` is opened up; any other module (a residual block, a dense block) stays whole.
Then a block is

    pooling that lies before it · a part with weights · norms and activations that follow it

so pooling opens the next block, as P does in a layer (Sec. 4.3, VGG). From the first part on that
is shown or gives no map any more, a model is its own classifier; that is left out, since every
block has an auxiliary classifier instead. So is pooling that closes the last block.

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
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from strata.stages.errors import UnusableNetwork
from strata.stages.faking import faked
from strata.stages.foreign import at_home, executed, guarded
from strata.stages.network.blocks import Block, Origin

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
Named = tuple[str, nn.Module]
"""A module and what it is called in its model."""
SIDE = 224
"""Of the image that is shown to the model, in pixels: it has no content, so it costs nothing."""
OPENING = ("pooling", "dropout", "pixelshuffle")
"""Modules of torch.nn that belong to the block after them."""
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)  # pyright: ignore


def block_modules(blocks: Sequence[Block], seed: int | None) -> list[nn.Module]:
    """Blocks of one network as modules, all from one construction; see :func:`construct`.

    Raises UnusableNetwork also where one of them is no longer the block that was read.
    """
    source = blocks[0].source
    made, found = dict(enumerate(construct(source, seed), start=1)), []
    for block in blocks:
        name, module = made.get(block.index, ("missing", nn.Identity()))
        with guarded(f"network {source.name}"):
            here = digest(source, module)
        if here != block.digest:
            raise _unusable(
                source,
                f"block {block.index}, {name} here, is not what the run was made with "
                f"({block.name}, {block.digest[:12]}). Is this another version of torchvision, or "
                "of what the file imports?",
            )
        found.append(module)
    return found


def construct(source: Origin, seed: int | None) -> list[Named]:
    """The blocks of a network on the CPU, each with its name there, in training mode.

    ``seed`` is that of torch's draws, which give the same weights on every machine; None, for
    weights to be loaded, draws nothing. Raises UnusableNetwork where it cannot be made or cut.
    """
    draws = _NoDraws() if seed is None else nullcontext()
    with torch.random.fork_rng(devices=[]), draws, guarded(f"network {source.name}"):
        torch.default_generator.manual_seed(seed or 0)
        if not source.file:
            return _cut(_torchvision(source), source.name)
        file = Path(source.folder, source.file).absolute()
        home = Path(source.home or source.folder, source.file).absolute()
        with at_home(file.parent, home.parent, source.read):
            made = _of_file(source, file)
        source.read.discard(file.name)
        return made


def digest(source: Origin, module: nn.Module) -> str:
    """sha256 hex digest of a block's code and structure, without its weights."""
    state = [[n, list(t.shape), str(t.dtype)] for n, t in module.state_dict().items()]
    said = {
        "name": source.name,
        "arguments": sorted(source.arguments),
        "code": source.digest or _code_of(module),
        "structure": ADDRESS.sub("", str(module)),
        "state": state,
    }
    beside = Path(source.folder, source.file or "").parent
    texts = {name: beside / name for name in sorted(source.read) if name.endswith(".py")}
    if texts:
        said["beside"] = {n: sha256(p.read_bytes()).hexdigest() for n, p in texts.items()}
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _code_of(module: nn.Module) -> list[str]:
    """Source of every class in a module that is not torch's own, without comments and layout."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")]
    sources = [textwrap.dedent(inspect.getsource(kind)) for kind in own]
    return sorted(ast.unparse(ast.parse(text)) for text in sources)


def _unusable(source: Origin, text: str) -> UnusableNetwork:
    return UnusableNetwork(f"network {source.name}: {text}")


def _torchvision(source: Origin) -> nn.Module:
    from torchvision import models

    name, known = source.name.removeprefix("torchvision:"), models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f". Did you mean torchvision:{near[0]}?" if near else ""
        raise _unusable(source, f"torchvision has no such classifier{hint}")
    return models.get_model(name, weights=None, **dict(source.arguments))


def _of_file(source: Origin, file: Path) -> list[Named]:
    path, _, name = source.name.rpartition(":")
    code = source.code or ""
    module = f"strata_network_{sha256(code.encode()).hexdigest()[:12]}"
    found = getattr(executed(module, code, file), name, None)
    if found is None:
        raise _unusable(source, f"{path} has no {name}")
    if callable(found) and not isinstance(found, nn.Module):
        found = found(**dict(source.arguments))
    elif source.arguments:
        raise _unusable(source, f"{name} is no function, and takes no arguments")
    kind = type(found).__name__
    if not isinstance(found, (list, tuple, nn.Sequential, nn.ModuleList)) or not len(found):
        raise _unusable(source, f"{name} must be or return a list of blocks, got {kind}")
    for number, part in enumerate(found, start=1):
        if not isinstance(part, nn.Module):
            kind = type(part).__name__
            raise _unusable(source, f"block {number} is a {kind}, not a module")
        lazy = next((p for p in part.modules() if isinstance(p, LazyModuleMixin)), None)
        if lazy is not None:
            kind = type(lazy).__name__
            raise _unusable(source, f"block {number} has a {kind}: say how many channels it sees")
    return [(f"{name}[{n}] ({type(part).__name__})", part) for n, part in enumerate(found)]


class _NoDraws(TorchFunctionMode):
    """What would be drawn is 0: drawing is most of the time that a large network takes.

    ``uniform_`` and ``normal_`` are functions of nn.init and methods of tensors.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ not in ("uniform_", "normal_"):
            return func(*args, **kwargs)
        with torch.no_grad():
            return (args[0] if args else kwargs["tensor"]).zero_()


# ---- cutting ------------------------------------------------------------------------------------


def _cut(model: nn.Module, name: str) -> list[Named]:
    """The blocks of a model for images of three channels, each with its name and class.

    Raises UnusableNetwork, with the model's ``name`` and the module, where it is no chain.
    """
    blocks: list[list[Named]] = []
    opening: list[Named] = []
    for path, part in _trunk(model, name):
        begins = _weighted(part) and not isinstance(part, NORMS)
        if type(part).__module__ in {f"torch.nn.modules.{kind}" for kind in OPENING}:
            opening.append((path, part))
        elif begins or not blocks:
            blocks.append([*opening, (path, part)])
            opening = []
        else:
            (opening or blocks[-1]).append((path, part))
    found: list[Named] = []
    for parts in blocks:
        path, main = next((one for one in parts if _weighted(one[1])), parts[0])
        module = main if len(parts) == 1 else nn.Sequential(*(part for _, part in parts))
        found.append((f"{path} ({type(main).__name__})", module))
    return found


def _weighted(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _trunk(model: nn.Module, name: str) -> list[Named]:
    """The modules from the image to the last map."""
    calls: list[tuple[str, nn.Module, tuple[Any, ...], Any]] = []
    model.eval()
    with faked(model, (1, 3, SIDE, SIDE)) as (state, last):
        hooks = [
            part.register_forward_hook(lambda *call, path=path: calls.append((path, *call)))
            for path, part in _units(model)
        ]
        try:
            functional_call(model, state, (last,))
        finally:
            for hook in hooks:
                hook.remove()
    model.train()
    parts: list[Named] = []
    for path, module, inputs, output in calls:
        is_map = isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1
        if not inputs or inputs[0] is not last or not is_map:
            break
        parts.append((path, module))
        last = output
    stray = (
        f"{path} ({type(module).__name__})"
        for path, module, _, output in calls[len(parts) :]
        if _weighted(module) and not _is_flat(output)
    )
    where = next(stray, None if parts else "its first part")
    if where:
        after = f" ({parts[-1][0]})" if parts else ""
        raise UnusableNetwork(
            f"network {name} cannot be cut into blocks: {where} does not see the map that the part "
            f"before it gave{after}, or gives none. Name a Python file with blocks of your own"
        )
    return parts


def _is_flat(output: Any) -> bool:
    """One value of every feature or class."""
    return isinstance(output, Tensor) and output.numel() == output.shape[:2].numel()


def _units(module: nn.Module, path: str = "") -> Iterator[Named]:
    """Modules that are not opened up, in the order of their definition. Lists are: nobody calls
    them."""
    for name, child in module.named_children():
        if type(child).forward in (nn.Sequential.forward, nn.Module.forward):
            yield from _units(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child
