"""`strata.solve`: a head on cached features, to the bit wherever it was stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from photos import Rows, linear
from torch import Tensor, nn

import strata
from strata.pipeline.api.features import LevelFeatures
from strata.pipeline.errors import OptionRange, RecipeError
from strata.stages.errors import DataError, Diverged
from strata.stages.solve.solve import Solver

HOW: dict[str, Any] = {"device": "cpu", "progress": False, "precision": "float32"}


def features(store: Path, seed: int = 0, count: int = 400, labels: Any = None) -> LevelFeatures:
    data = Rows(count, seed=seed)
    with torch.no_grad():
        data.y = linear(6, 3, seed=9)(data.x).argmax(1).tolist() if labels is None else labels
    told: Any = {"precision": "float32", "device": "cpu", "progress": False}
    return strata.cache(nn.Identity(), data, store, **told)


@pytest.fixture(scope="module")
def x(tmp_path_factory: pytest.TempPathFactory) -> LevelFeatures:
    return features(tmp_path_factory.mktemp("x"))


def weights(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def dropping() -> nn.Module:
    return nn.Sequential(linear(6, 8, seed=1), nn.Dropout(0.3), nn.ReLU(), linear(8, 3, seed=2))


def test_a_head_is_trained_in_place(x: LevelFeatures, tmp_path: Path) -> None:
    head, test = linear(6, 3), features(tmp_path, seed=1, count=200)
    history = strata.solve(head, x, test=test, epochs=8, batch=50, lr=0.3, **HOW)
    assert [line["epoch"] for line in history] == [*range(1, 9)]
    assert history[-1]["loss"] < history[0]["loss"] / 2
    assert history[-1]["top1"] > 0.9
    assert history[-1]["test_top1"] > 0.9
    assert not head.training
    with torch.no_grad():
        right = (head(test[:]).argmax(1) == test.labels).double().mean()
    assert float(right) == history[-1]["test_top1"]


def test_the_defaults_train_and_no_test_is_none(x: LevelFeatures) -> None:
    history = strata.solve(linear(6, 3), x, **HOW)
    assert len(history) == 10
    assert [line["test_top1"] for line in history] == [None] * 10


def test_steps_are_those_of_sgd_on_the_feeds_batches(x: LevelFeatures) -> None:
    head, plain = linear(6, 3), linear(6, 3)
    how: Any = {"kind": "step", "momentum": 0.9, "weight_decay": 0.01}
    strata.solve(head, x, epochs=2, batch=100, lr=0.1, seed=5, **how, **HOW)
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    with x.feed(100, seed=5) as feed:
        for epoch in range(2):
            for values, y in feed.epoch(epoch):
                optimiser.zero_grad()
                nn.functional.cross_entropy(plain(values), y).backward()
                optimiser.step()
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(head), weights(plain), strict=True)
    )


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    found = nn.functional.cross_entropy(logits, labels, reduction="none")
    return (1 - (-found).exp()) ** 2 * found


def test_numbers_are_learned_and_a_loss_may_be_a_function(tmp_path: Path) -> None:
    data = Rows(400)
    wanted = (data.x @ torch.randn(6, 2, generator=torch.Generator().manual_seed(0))).tolist()
    numbers = features(tmp_path / "numbers", labels=wanted)
    how: Any = {"epochs": 8, "batch": 50, "lr": 0.1, **HOW}
    history = strata.solve(linear(6, 2), numbers, loss="mse", test=numbers, **how)
    assert history[-1]["test_loss"] < history[0]["test_loss"] / 4
    assert history[-1]["top1"] is history[-1]["test_top1"] is None
    with pytest.raises(DataError, match="no labels int64 from 0, which cross-entropy is for"):
        strata.solve(linear(6, 2), numbers, **how)
    with pytest.raises(RecipeError, match="'loss' is 'mso'"):
        strata.solve(linear(6, 2), numbers, loss="mso", **how)
    classes = features(tmp_path / "classes")
    history = strata.solve(linear(6, 3), classes, loss=focal, test=classes, **how)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["test_top1"] > 0.9


def test_a_seed_is_a_result(x: LevelFeatures) -> None:
    found = []
    for seed in (0, 0, 1):
        head = dropping()
        strata.solve(head, x, epochs=2, batch=64, seed=seed, **HOW)
        found.append(weights(head))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_the_stop_button_ends_after_the_step_at_work(
    x: LevelFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, real = list[int](), Solver.train_on

    def counting(*given: Any) -> None:
        real(*given)
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Solver, "train_on", counting)
    with pytest.raises(KeyboardInterrupt):
        strata.solve(dropping(), x, batch=50, **HOW)
    assert len(steps) == 3


def test_what_cannot_be_is_refused(x: LevelFeatures, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'schedule.epoch'. Did you mean 'epochs'"):
        strata.solve(linear(6, 3), x, epoch=3, **HOW)
    with pytest.raises(RecipeError, match=r"'schedule.lr' is -1.0; it must be above 0"):
        strata.solve(linear(6, 3), x, lr=-1.0, **HOW)
    with pytest.raises(OptionRange, match="keep is 'best'; from Python it may be 'last'"):
        strata.solve(linear(6, 3), x, keep="best", **HOW)
    with pytest.raises(DataError, match="has no labels int64 from 0"):
        strata.solve(linear(), features(tmp_path, count=5, labels=[0.5] * 5), **HOW)
    with pytest.raises(DataError, match="has no labels int64 from 0"):
        strata.solve(linear(), features(tmp_path, count=5, labels=[None] * 5), **HOW)
    with pytest.raises(Diverged, match="the loss is not finite"):
        strata.solve(linear(6, 3), x, lr=1e38, kind="step", **HOW)
