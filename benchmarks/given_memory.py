"""A network that does not fit, given and materialised block by block under a cap: see given.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from given_recipe import GIVEN
from measuring import strata
from safetensors.torch import save_file

GROUP = Path("/sys/fs/cgroup/memory/strata-given")
CAP_BYTES = 400_000_000
BLOCKS = 10
CHAIN = """from torch import nn


def blocks():
    return [nn.Sequential(nn.Linear({n}, {n}), nn.ReLU()) for _ in range({blocks})]
"""
RECIPE = """
[data]
source = "npz:vectors.npz"
shape = [{n}]
dtype = "float32"
classes = 2
train = {train}
test = {test}

[network]
name = "chain.py:blocks"
{given}

[auxiliary]
k = 1

[schedule]
kind = "one-cycle"
epochs = 1
batch = 64
lr = 0.05
precision = "float32"
"""


def memory(place: Path, quick: bool) -> dict[str, Any]:
    """Ten blocks, each materialised by a command of its own in a control group (version 1, root)
    that kills what takes more than its cap; pages of files count, and are reclaimed. The cap is
    what the same commands take for blocks of 1 MB, which is Python and torch, and CAP_BYTES."""
    small = max(chain(place / "small", 500, 4_000_000_000).values())
    most = chain(place / "large", 1000 if quick else 5000, small + CAP_BYTES)
    nbytes = (place / "large/chain.safetensors").stat().st_size
    facts = {"blocks": BLOCKS, "network_bytes": nbytes, "process_bytes": small}
    return {**facts, "cap_bytes": CAP_BYTES, "most_bytes": most}


def chain(place: Path, n: int, cap: int) -> dict[str, int]:
    """Most bytes of the commands that write x_1, x_2, …; the levels below go."""
    place.mkdir()
    rng, counts = np.random.default_rng(0), {"train": 512, "test": 64}
    arrays = {}
    for split, rows in counts.items():
        arrays[f"x_{split}"] = rng.standard_normal((rows, n), np.float32)
        arrays[f"y_{split}"] = rng.integers(2, size=rows)
    np.savez(place / "vectors.npz", **arrays)
    (place / "chain.py").write_text(CHAIN.format(n=n, blocks=BLOCKS), "utf-8")
    state = {}
    for j in range(BLOCKS):
        state[f"{j}.0.weight"] = torch.from_numpy(rng.standard_normal((n, n), np.float32)) / n**0.5
        state[f"{j}.0.bias"] = torch.zeros(n)
    save_file(state, place / "chain.safetensors")
    text = RECIPE.format(n=n, given=GIVEN.format("chain.safetensors", '"all"'), **counts)
    (place / "chain.toml").write_text(text, "utf-8")
    found = {}
    for j in range(1, BLOCKS + 1):
        strata(place, "materialize", "chain.toml", "--layer", j, enter=capped(cap))
        found[f"x_{j}"] = int((GROUP / "memory.max_usage_in_bytes").read_text("ascii"))
        if j > 1:
            strata(place, "evict", "chain.toml", "--layer", j - 1)
    return found


def capped(nbytes: int) -> Callable[[], None]:
    """A function by which a process enters a fresh group."""
    if GROUP.exists():
        GROUP.rmdir()
    GROUP.mkdir()
    (GROUP / "memory.limit_in_bytes").write_text(str(nbytes), "ascii")

    def enter() -> None:
        (GROUP / "cgroup.procs").write_text(str(os.getpid()), "ascii")

    return enter
