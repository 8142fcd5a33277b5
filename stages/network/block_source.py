"""Blocks of a network that a Python file, torchvision or timm makes: modules, one after another.

A file gives a list of blocks, or a model, which is cut as those of torchvision and timm are
(cutting.py). In a list, what has no weights joins the block before it.

A constructor draws its weights from torch's own generator. As long as it runs, that generator goes
on from a given seed, and afterwards from where it was; where weights are loaded later, it is not
asked at all: modules are then made without content, and get zeros, block by block, where they are
wanted.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from strata.stages.errors import UnusableNetwork
from strata.stages.foreign import at_home, executed, guarded
from strata.stages.network.blocks import Block, Origin
from strata.stages.network.cutting import cut
from strata.stages.network.links import Named, joined, part_of
from strata.stages.network.spec import Shape

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
SIDE = 224
"""Of the image that is shown to a model, in pixels, if it takes that: it has no content, so it
costs nothing, and there are places left up to the model's classifier."""
NO_CONTENT = ".*meta parameter in the current model, which is a no-op.*"
"""What torch warns of where weights are loaded into modules without content."""


def block_modules(blocks: Sequence[Block], seed: int | None) -> list[nn.Module]:
    """Blocks of one network as modules, all from one construction; see :func:`construct`.

    Raises UnusableNetwork also where one of them is no longer the block that was read.
    """
    source = blocks[0].source
    made, found = dict(enumerate(construct(source, seed, *blocks[0].x_0), start=1)), []
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
        found.append(module._apply(_with_content))
    return found


def _with_content(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor


def head_module(head: Block, seed: int | None) -> nn.Module:
    """A classifier that a Python file makes; see :func:`construct_head`.

    Raises UnusableNetwork also where it is no longer the one that was read.
    """
    module = construct_head(head.source, head.takes, head.width, seed)
    if digest(head.source, module) != head.digest:
        raise _unusable(head.source, "it is not the classifier that the run was made with")
    return module._apply(_with_content)


def construct_head(source: Origin, shape: Shape, classes: int, seed: int | None) -> nn.Module:
    """The module that a file's function makes of the shape of x_j and the number of classes. Seed
    and errors as in :func:`construct`."""
    file = Path(source.folder, source.file or "").absolute()
    with torch.random.fork_rng(devices=[]), guarded(f"network {source.name}"):
        torch.default_generator.manual_seed(seed or 0)
        with at_home(file.parent, file.parent, source.read):
            found = _made(source, file, seed, shape, classes)
        source.read.discard(file.name)
    if isinstance(found, nn.ModuleList):
        raise _unusable(source, "it must return one module, not a list")
    return found


def construct(
    source: Origin,
    seed: int | None,
    shape: Shape = (3, SIDE, SIDE),
    dtype: str = "float32",
    *,
    names: dict[int, str] | None = None,
) -> list[Named]:
    """The blocks of a network on the CPU, each with its name there, in training mode.

    Args:
        seed: of torch's draws, which give the same weights on every machine. None, for weights to
            be loaded, draws nothing: parameters and buffers are on the device ``meta``, if the
            constructor can be run so.
        shape, dtype: of x_0, as :func:`read_blocks` has them; a model is cut for them.
        names: takes the names of all tensors in the whole model, or in the list of blocks, by id.

    Raises UnusableNetwork where it cannot be made or cut.
    """
    with torch.random.fork_rng(devices=[]), guarded(f"network {source.name}"):
        torch.default_generator.manual_seed(seed or 0)
        file = Path(source.folder, source.file).absolute() if source.file else None
        home = Path(source.home or source.folder, source.file or "").absolute()
        place = at_home(file.parent, home.parent, source.read) if file else nullcontext()
        with place:
            found = _made(source, file, seed)
        if file:
            source.read.discard(file.name)
        if names is not None:
            names |= {id(t): n for n, t in found.state_dict(keep_vars=True).items()}
        if isinstance(found, nn.ModuleList):
            called = source.name.rpartition(":")[2]
            parts = [part_of(f"{called}[{n}]", one, norms=True) for n, one in enumerate(found)]
            return joined(parts, whole=True)
        seen = torch.int32 if dtype == "int32" else torch.float32
        shown = [(shape[0], SIDE, SIDE)] if len(shape) == 3 else []
        for one in shown:
            with suppress(Exception):
                return cut(found, f"network {source.name}", one, seen)
        return cut(found, f"network {source.name}", shape, seen)


def _made(source: Origin, file: Path | None, seed: int | None, *given: Any) -> nn.Module:
    """A model, or a list of blocks; ``given`` goes before the arguments of a file's function."""
    make = partial(_of_file, source, file, *given) if file else partial(_of_package, source)
    if seed is None:
        # What cannot be done without content (a number read from a tensor), is done with some.
        with suppress(Exception), torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("error", NO_CONTENT)
            return make()
    with _NoDraws() if seed is None else nullcontext():
        return make()


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
    others = "torch", "builtins", "strata"
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in others]
    sources = [textwrap.dedent(inspect.getsource(kind)) for kind in own]
    return sorted(ast.unparse(ast.parse(text)) for text in sources)


def _unusable(source: Origin, text: str) -> UnusableNetwork:
    return UnusableNetwork(f"network {source.name}: {text}")


def _of_package(source: Origin) -> nn.Module:
    if source.name.startswith("timm:"):
        return _timm(source)
    from torchvision import models

    name, known = source.name.removeprefix("torchvision:"), models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f". Did you mean torchvision:{near[0]}?" if near else ""
        raise _unusable(source, f"torchvision has no such classifier{hint}")
    return models.get_model(name, weights=None, **dict(source.arguments))


def _timm(source: Origin) -> nn.Module:
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        advice = "pip install 'strata[timm]'"
        raise _unusable(source, f"timm cannot be imported ({error}): {advice}") from None
    name = source.name.removeprefix("timm:")
    return timm.create_model(name, pretrained=False, **dict(source.arguments))


def _of_file(source: Origin, file: Path, *given: Any) -> Any:
    path, _, name = source.name.rpartition(":")
    code = source.code or ""
    module = f"strata_network_{sha256(code.encode()).hexdigest()[:12]}"
    found: Any = getattr(executed(module, code, file), name, None)
    if found is None:
        raise _unusable(source, f"{path} has no {name}")
    if callable(found) and not isinstance(found, nn.Module):
        found = found(*given, **dict(source.arguments))
    elif source.arguments:
        raise _unusable(source, f"{name} is no function, and takes no arguments")
    kind = type(found).__name__
    is_list = isinstance(found, (list, tuple, nn.ModuleList))
    if not (len(found) if is_list else isinstance(found, nn.Module)):
        raise _unusable(
            source, f"{name} must be or return a list of blocks, or a model, got {kind}"
        )
    for number, part in enumerate(found if is_list else [found], start=1):
        what = f"block {number}" if is_list else name
        if not isinstance(part, nn.Module):
            raise _unusable(source, f"{what} is a {type(part).__name__}, not a module")
        lazy = next((p for p in part.modules() if isinstance(p, LazyModuleMixin)), None)
        if lazy is not None:
            kind = type(lazy).__name__
            raise _unusable(source, f"{what} has a {kind}: say how many channels it sees")
    return nn.ModuleList(found) if is_list else found


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
