"""Weights on disk: safetensors, whole and durable, with a digest of names, shapes and bytes.

A run begins with some where its recipe names them, or has layers that are given:

    RUN/initial/layer_3.safetensors   block 3: as it is given, or is trained from
                initial.json          written last: digests of all of them

They are the run's own: the file that they are from may be moved or removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from strata.pipeline.errors import NotThereYet, RecipeError
from strata.pipeline.progress import Reporter
from strata.pipeline.recipe.named_network import NamedNetwork
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import record
from strata.pipeline.run.record import INITIAL
from strata.pipeline.run.rundir import NOTE, Run
from strata.stages.network.given import State, published_state, read_state, split_state
from strata.store.errors import LevelDamaged, refusals
from strata.store.files.publish import make_directory, replace
from strata.store.fingerprint import digest_arrays
from strata.store.read.order import key_of


def write(path: Path, tensors: Mapping[str, Tensor], note: Any = None) -> None:
    """Write tensors, and a JSON value in the file's header, replacing the file in one step."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {NOTE: json.dumps(note)} if note is not None else None
    make_directory(path.parent)
    replace(path.parent, path.name, save(plain, metadata))


def read(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors on the CPU and the note.

    Raises:
        NotThereYet: there is no such file.
        LevelDamaged: it is not a safetensors file.
        StoreRefused: it cannot be read; safetensors gives no number of the error.
    """
    if not path.exists():
        raise NotThereYet(f"{path} is missing")
    try:
        with refusals(path), safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            note = (file.metadata() or {}).get(NOTE)
    except SafetensorError as error:
        raise LevelDamaged(f"{path} is damaged: {error}") from None
    return tensors, json.loads(note) if note else None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes: the same for equal weights, however saved."""
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    return digest_arrays(arrays)


def read_checked(path: Path, expected: str) -> dict[str, Tensor]:
    """Tensors whose digest must be ``expected``. Raises LevelDamaged if it is not."""
    tensors, _ = read(path)
    found = digest(tensors)
    if found != expected:
        raise LevelDamaged(f"{path} has digest {found[:12]}, its record says {expected[:12]}")
    return tensors


# ---- weights that a run begins with --------------------------------------------------------------


def begin_with(
    recipe: Recipe, seed: int, report: Reporter, *, download: bool
) -> tuple[Recipe, list[State]]:
    """The recipe with the digest of its weights, and the state of every layer that has one: of all
    with ``network.weights``, else of those that are given, as their constructor makes them.

    Raises:
        RecipeError: there is no such file.
        UnusableNetwork: it holds no weights, or they do not fit.
    """
    network, blocks = recipe.network, recipe.layers
    if not isinstance(network, NamedNetwork) or not (network.weights or recipe.given):
        return recipe, []
    state, title = _named(network, download=download), f"weights {network.weights}"
    drawn = key_of("initial weights", seed, 0) % 2**63
    states, left_out = split_state(blocks, state, title, drawn)  # pyright: ignore
    if state is None:
        return recipe, states[: recipe.given]
    if left_out:
        few = ", ".join([*left_out[:3], *["…"] * (len(left_out) > 3)])
        report.say(f"{title}: {len(left_out)} left out, which no block has: {few}")
    network = changed(network, weights_digest=_digest_of_file(state), known=blocks)
    return changed(recipe, network=network), states


def _named(network: NamedNetwork, *, download: bool = False) -> State | None:
    path = network.file_of_weights
    if path is None:
        how = network.name, network.weights
        return published_state(*how, download=download) if network.weights else None
    if not path.is_file():
        raise RecipeError(f"'network.weights' names {path}, and there is no such file")
    return read_state(path)


def _digest_of_file(state: State) -> str:
    """Digest of names, dtypes, shapes and bytes: the same however they are saved."""
    named = {f"{n} {t.dtype} {list(t.shape)}": bytes_of(t) for n, t in state.items()}
    return digest_arrays(named)


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The values of a tensor of any dtype as they lie in memory when its axes are in their order,
    uint8 (n,)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digest_of(network: NamedNetwork) -> str:
    """Digest of the weights that a network names. What torchvision publishes under a name does not
    change. Raises as :func:`begin_with`."""
    if network.file_of_weights is None:
        return network.weights
    return _digest_of_file(_named(network) or {})


def keep_initial(directory: Path, states: list[State]) -> None:
    """Write states into a run's directory."""
    for j, state in enumerate(states, start=1):
        write(_path(directory, j), state)
    if states:
        body = {"layers": [digest(state) for state in states]}
        record.vouch(directory / INITIAL, body)


def restore_initial(run: Run, report: Reporter, *, download: bool) -> None:
    """Read again what the run has lost. Raises LevelDamaged: the file holds other weights now."""
    network, known = run.recipe.network, record.whole(run.directory / INITIAL)
    if known or not isinstance(network, NamedNetwork) or not (network.weights or run.recipe.given):
        return
    recipe, states = begin_with(run.recipe, run.seed, report, download=download)
    if recipe.science() != run.recipe.science():
        raise LevelDamaged(
            f"{run.directory / INITIAL} is damaged, and {network.file_of_weights} holds other "
            "weights than those that the run began with: put them back"
        )
    keep_initial(run.directory, states)


def initial_state(run: Run, j: int) -> State | None:
    """Weights and buffers that layer j begins with; None: it is drawn.

    Raises:
        NotThereYet, LevelDamaged: the run has lost them.
    """
    network = run.recipe.network
    whole = isinstance(network, NamedNetwork) and network.weights
    if not whole and j > run.recipe.given:
        return None
    return read_checked(*initial_file(run, j))


def initial_file(run: Run, j: int) -> tuple[Path, str]:
    """The file of the weights that layer j begins with, and their digest. Raises NotThereYet."""
    if (known := record.read(run.directory / INITIAL)) is None:
        raise NotThereYet(f"{run.directory / INITIAL} is missing: `verify --repair` makes it again")
    return _path(run.directory, j), known["layers"][j - 1]


def _path(directory: Path, j: int) -> Path:
    return (directory / INITIAL).parent / f"layer_{j}.safetensors"
