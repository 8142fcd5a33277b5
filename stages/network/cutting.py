"""Cutting a model into a chain of blocks that can be trained one by one.

The parts of a model are read off from a forward pass: its modules in the order in which they are
called, as long as each sees what the one before it gave. ``Sequential`` is opened up; any other
module (a residual block, a dense block) stays whole. Then a block is

    pooling that lies before it · a part with weights · norms and activations that follow it

so pooling opens the next block, as P does in a layer (Sec. 4.3, VGG). From the first part on that
is shown or gives no map any more, a model is its own classifier; that is left out, since every
block has an auxiliary classifier instead. So is pooling that closes the last block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from strata.stages.errors import UnusableNetwork
from strata.stages.faking import faked

Named = tuple[str, nn.Module]
"""A module and what it is called in its model."""
SIDE = 224
"""Of the image that is shown to the model, in pixels: it has no content, so it costs nothing."""
OPENING = ("pooling", "dropout", "pixelshuffle")
"""Modules of torch.nn that belong to the block after them."""
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)  # pyright: ignore


def cut(model: nn.Module, name: str) -> list[Named]:
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
    return [_joined(parts) for parts in blocks]


def _weighted(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _joined(parts: Sequence[Named]) -> Named:
    path, main = next((one for one in parts if _weighted(one[1])), parts[0])
    module = main if len(parts) == 1 else nn.Sequential(*(part for _, part in parts))
    return f"{path} ({type(main).__name__})", module


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
        if not inputs or inputs[0] is not last or not _is_map(output):
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


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1


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
