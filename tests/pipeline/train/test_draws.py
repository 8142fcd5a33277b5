"""Dropout and stochastic depth in what is trained: weights do not depend on the cache, nor on how
often a run was stopped. conftest.py looks at torch's generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from networks import beside, named
from runs import open_run, stopped_after

from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm
from strata.pipeline.train.train import solve

CODE = """
import torch
from torch import nn
from torchvision.ops import StochasticDepth

class Drops(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.same = nn.Conv2d(inputs, outputs, 1)
        self.drop, self.depth = nn.Dropout(0.3), StochasticDepth(0.3, "row")
    def forward(self, x):
        return torch.relu(self.same(x) + self.depth(self.drop(self.conv(x))))

def blocks(): return [Drops(1, 4), Drops(4, 8)]
"""
NAMES = "weights", "auxiliary", "train", "test"


def opened(place: Path, **changes: object) -> Session:
    return open_run(beside(place, CODE), named('"residual.py:blocks"', epochs=2, **changes))


def found(session: Session) -> list[Any]:
    records = [session.run.layer(j) or {} for j in (1, 2)]
    return [{name: record[name] for name in NAMES} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    session = opened(tmp_path_factory.mktemp("whole") / "place")
    assert all(layer.draws for layer in session.run.recipe.layers)
    algorithm.make(session, solve=2)
    return found(session)


def test_cache_equals_recompute(tmp_path: Path, whole: list[Any]) -> None:
    session = opened(tmp_path / "recomputed")
    for j in (1, 2):
        solve(session, j, cached=False)
    assert found(session) == whole


@pytest.mark.parametrize("after", [1, 5])
def test_a_run_that_was_stopped_ends_at_the_same_weights(
    tmp_path: Path, whole: list[Any], after: int
) -> None:
    session = opened(tmp_path / "stopped")
    stopped_after(session, after, lambda: algorithm.make(session, solve=2))
    assert session.run.solved() == 0
    algorithm.make(opened(tmp_path / "stopped"), solve=2)
    assert found(session) == whole
