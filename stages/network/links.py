"""The links of a chain, and the blocks that they are joined to.

    pooling that lies before it · a part with weights · norms and activations that follow it

Pooling opens the next block, as P does in a layer (Sec. 4.3, VGG).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Named = tuple[str, nn.Module]
"""A module and what it is called in its model."""
OPENING = tuple(f"torch.nn.modules.{kind}" for kind in ("pooling", "dropout", "pixelshuffle"))
"""Modules of torch.nn that belong to the block after them."""
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)  # pyright: ignore
ROWS = 2
"""Samples that a model is shown while it is cut."""


@dataclass(frozen=True)
class Part:
    """A link of the chain: a module, its path in the model, and its class."""

    path: str
    module: nn.Module
    kind: str
    begins: bool
    """It has weights that a block is for."""
    opens: bool
    """It belongs to the block after it."""


def part_of(path: str, module: nn.Module, *, norms: bool = False) -> Part:
    """A module as a link of its own. ``norms`` begin blocks as what they normalise does."""
    begins = size(module) > 0 and (norms or not isinstance(module, NORMS))
    opens = type(module).__module__ in OPENING
    return Part(path, module, type(module).__name__, begins, opens)


def joined(parts: Sequence[Part], *, whole: bool = False) -> list[Named]:
    """Blocks of the links of a chain, each with its name and class. What would open a block after
    the last one is left out, or, with ``whole``, belongs to the last."""
    blocks, opening = list[list[Part]](), list[Part]()
    for part in parts:
        if part.begins or (not blocks and size(part.module)):
            blocks.append([*opening, part])
            opening = []
        else:
            (opening if part.opens or opening or not blocks else blocks[-1]).append(part)
    if whole and blocks:
        blocks[-1] += opening
    found: list[Named] = []
    for block in blocks or [opening]:
        main = next((one for one in block if size(one.module)), block[0])
        module = main.module if len(block) == 1 else nn.Sequential(*(one.module for one in block))
        found.append((f"{main.path} ({main.kind})", module))
    return found


def size(module: nn.Module) -> int:
    """Number of its weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def has_places(value: Any) -> bool:
    """Is it more than one value of every feature? Integers are tokens."""
    if not isinstance(value, Tensor):
        return False
    return not value.is_floating_point() or value.numel() != value.shape[:2].numel()


def loses_places(value: Any, before: Any) -> bool:
    return has_places(before) and not has_places(value)
