"""Weights that somebody else trained: a file's tensors, and which block each of them belongs to.

Keys are those of the whole model, as torchvision, timm or the file's function makes it; of a list
of blocks, those of the list (``0.weight``); or the file is what ``baseline`` wrote. The model is
made without content and cut as ever: a block's tensors are then known by the names that they have
in the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from strata.stages.errors import UnusableNetwork
from strata.stages.foreign import first_line
from strata.stages.network.block_source import construct
from strata.stages.network.blocks import Block

State = dict[str, Tensor]
INSIDE = "state_dict", "model"
"""Keys under which trainers keep a model's state dict."""
NAMED = 3
"""Keys that a message names; it counts the others."""


def read_state(path: Path) -> State:
    """The tensors of a state dict, mapped from the file where they can be: .safetensors, or .pth
    and .pt without code. Raises UnusableNetwork where it is none."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = _unpickled(path)
    except OSError:
        raise
    except UnpicklingError as error:
        raise UnusableNetwork(
            f"weights {path} is no state dict, or has more in it than tensors, and code of others "
            "is not run: torch.save(model.state_dict(), …) writes one"
        ) from error
    except Exception as error:  # of a pickle or header, whatever it holds
        raise UnusableNetwork(f"weights {path} cannot be read: {first_line(error)}") from error
    for name in INSIDE:
        found = found.get(name, found) if isinstance(found, Mapping) else {}
    found = {name: t for name, t in dict(found).items() if isinstance(t, Tensor)}
    if not found:
        inside = " or ".join(map(repr, INSIDE))
        raise UnusableNetwork(f"weights {path} has no tensors by name, also not under {inside}")
    return found


def _unpickled(path: Path) -> Any:
    how: Any = {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(path, mmap=True, **how)
    except RuntimeError:  # written as torch did before 1.6: not to be mapped
        return torch.load(path, **how)


def published_state(network: str, weights: str, *, download: bool) -> State:
    """The state dict that torchvision publishes for one of its networks.

    Raises UnusableNetwork where there is none of that name, or it is not on this machine and must
    not be fetched.
    """
    from torchvision import models

    title, which = f"weights {weights}", weights.partition(":")[2]
    package, _, name = network.partition(":")
    if package != "torchvision":
        raise UnusableNetwork(f"{title}: they are of torchvision's networks, not of {network}")
    known = models.get_model_weights(name)
    if which not in known.__members__:
        raise UnusableNetwork(f"{title}: {network} has {', '.join(known.__members__) or 'none'}")
    file = Path(torch.hub.get_dir(), "checkpoints", known[which].url.rpartition("/")[2])
    if not (file.exists() or download):
        raise UnusableNetwork(
            f"{title} are not on this machine ({file}): add --download to fetch {known[which].url}"
        )
    with torch.random.fork_rng(devices=[]):
        return models.get_model(name, weights=known[which]).state_dict()


def split_state(
    blocks: Sequence[Block], state: State | None, title: str, seed: int = 0
) -> tuple[list[State], list[str]]:
    """The state of every block, and keys that no block has (a classifier's).

    Args:
        state: of the whole model; None: as its constructor draws or loads it, from the ``seed``.
        title: of the weights, for messages.

    Raises:
        UnusableNetwork: names what is missing, what is too much, and what has another shape.
    """
    names = dict[int, str]()
    source = blocks[0].source
    made = construct(source, seed if state is None else None, *blocks[0].x_0, names=names)
    if state is None:
        return [module.state_dict() for _, module in made], []
    if all(name.startswith("module.") for name in state):  # as DistributedDataParallel names them
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    wanted = [_keys(module, names) for _, module in made]
    if {name.partition(".")[0] for name in state} == {"layers", "auxiliary"}:
        state = _of_baseline(wanted, state)
    tensors = {name: tensor for keys in wanted for name, tensor in keys.values()}
    _check(state, tensors, f"{title} do not fit {source.name}")
    found = [{own: _of(name, t, state) for own, (name, t) in keys.items()} for keys in wanted]
    return found, sorted(state.keys() - tensors.keys())


def _keys(module: nn.Module, names: Mapping[int, str]) -> dict[str, tuple[str, Tensor]]:
    """A block's tensors by their keys, each with its name in the model."""
    state = module.state_dict(keep_vars=True)
    return {own: (names[id(tensor)], tensor) for own, tensor in state.items()}


def _of_baseline(wanted: Sequence[Mapping[str, tuple[str, Tensor]]], state: State) -> State:
    """What ``baseline`` trained, by its names in the model; it is kept block by block."""
    found = {name: t for name, t in state.items() if name.startswith("auxiliary.")}
    for i, keys in enumerate(wanted):
        known = ((f"layers.{i}.{own}", name) for own, (name, _) in keys.items())
        found |= {name: state[own] for own, name in known if own in state}
    return found


def _of(name: str, wanted: Tensor, state: State) -> Tensor:
    if name not in state:  # a batch norm's count, which old files have not
        return torch.zeros_like(wanted, device="cpu")
    return state[name].to(wanted.dtype)


def _check(state: State, wanted: State, title: str) -> None:
    missing = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]
    roots = {name.partition(".")[0] for name in wanted}
    others = [(name, name.partition(".")[0]) for name in state if name not in wanted]
    more = [name for name, root in others if root in roots or root.isdigit()]
    other = [
        f"{name} is {_said(state[name])} there, and {_said(tensor)} in the network"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    kinds = (missing, "missing"), (more, "unexpected"), (other, "of other shapes")
    said = [f"{len(some)} {kind} ({_first(some)})" for some, kind in kinds if some]
    if said:
        raise UnusableNetwork(f"{title}: {'; '.join(said)}")


def _first(names: Collection[str]) -> str:
    """The first few, and that there are more."""
    return ", ".join([*list(names)[:NAMED], *["…"] * (len(names) > NAMED)])


def _said(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"
