"""AdamW, the cosine, label smoothing and mixup: steps by hand, and the same bits after a stop."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from epochs import run_epoch
from torch import Tensor, nn
from torch.nn import functional as F

from strata.stages.errors import DataError
from strata.stages.solve.mixup import mixed
from strata.stages.solve.ranks import Ranks
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import Solver
from strata.store.read.order import key_of

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
X = torch.from_numpy(RNG.normal(size=(64, 8)).astype(np.float32))
Y = torch.from_numpy(RNG.integers(0, 5, 64))


def drawn(*step: int) -> int:
    return key_of("test", *step) % 2**63


def solver(**changes: Any) -> Solver[nn.Module]:
    fields: dict[str, Any] = {"kind": "cosine", "epochs": 3, "batch": 16, "lr": 0.05, "warmup": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        norm = nn.BatchNorm1d(16)
        network = nn.Sequential(nn.Linear(8, 16, bias=False), norm, nn.ReLU(), nn.Linear(16, 5))
    return Solver(network, SGDSchedule(**fields | changes), CPU, torch.float32, draws=drawn)


def batches(epoch: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    order = np.random.default_rng(epoch).permutation(64)
    return [(X[part], Y[part]) for part in order.reshape(4, 16)][start:]


def test_the_cosine_rises_to_the_rate_and_falls_to_nearly_nothing() -> None:
    plan = SGDSchedule("cosine", 10, 16, 0.1, warmup=0.3)
    rates = [plan.rate(step, 10) for step in range(100)]
    np.testing.assert_allclose(rates[:30], 0.1 * np.arange(1, 31) / 30)
    np.testing.assert_allclose(rates[29:], 0.05 * (1 + np.cos(np.pi * np.arange(71) / 71)))
    assert 0 < rates[-1] < 1e-4
    none = SGDSchedule("cosine", 10, 16, 0.1, warmup=0.0)
    assert [none.rate(0, 10), none.rate(50, 10)] == pytest.approx([0.1, 0.05], abs=1e-3)


def test_adamw_takes_the_steps_of_torch() -> None:
    one, other = solver(optimizer="adamw", momentum=0.8, weight_decay=0.1), solver()
    theirs = torch.optim.AdamW(
        other.problem.parameters(), betas=(0.8, 0.999), weight_decay=0.1, foreach=False
    )
    other.problem.train()
    for step, (x, y) in enumerate(batches(0)):
        theirs.param_groups[0]["lr"] = one.schedule.rate(step, 4)
        F.cross_entropy(other.problem(x), y).backward()
        theirs.step()
        theirs.zero_grad()
    run_epoch(one, batches(0), 4)
    for name, tensor in other.problem.state_dict().items():
        torch.testing.assert_close(one.problem.state_dict()[name], tensor, msg=name)


CHOICES = (
    {"optimizer": "adamw", "weight_decay": 0.05},
    {"mixup": 0.4},
    {"optimizer": "adamw", "mixup": 0.2, "label_smoothing": 0.1, "accumulate": 2, "keep": "best"},
)


@pytest.mark.parametrize("stop_at", [1, 4])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_resuming_ends_at_the_same_bits(choice: dict[str, Any], stop_at: int) -> None:
    whole = solver(**choice)
    expected = [run_epoch(whole, batches(e), 4) for e in range(3)]
    first = solver(**choice)
    run_epoch(first, batches(0), 4)
    for x, y in batches(1)[:stop_at]:
        first.train_on(x, y, 4)
    first.settle()
    state = {n: t.clone() for n, t in first.tensors().items()}
    note = json.loads(json.dumps(first.snapshot()))

    second = solver(**choice)
    second.restore(state, note["progress"], note["scaler"])
    assert [
        run_epoch(second, batches(1, stop_at), 4),
        run_epoch(second, batches(2), 4),
    ] == expected[1:]
    assert whole.tensors().keys() == second.tensors().keys()
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


def test_every_choice_changes_the_weights() -> None:
    found = []
    for choice in ({}, *CHOICES, {"label_smoothing": 0.1}, {"mixup": 0.5}):
        one = solver(**choice)
        run_epoch(one, batches(0), 4)
        found.append(one.problem.state_dict()["0.weight"])
    assert len({tensor.numpy().tobytes() for tensor in found}) == len(found)


# ---- mixup --------------------------------------------------------------------------------------


def test_a_step_is_on_the_mixture_of_rows_and_of_losses() -> None:
    one, other = solver(mixup=0.4), solver()
    one.problem.train()
    other.problem.train()
    one.train_on(X[:16], Y[:16], 4)
    draw = np.random.default_rng(drawn(0, 0, -1))
    share, order = draw.beta(0.4, 0.4), draw.permutation(16)
    logits = other.problem(share * X[:16] + (1 - share) * X[:16][order])
    loss = share * F.cross_entropy(logits, Y[:16])
    loss += (1 - share) * F.cross_entropy(logits, Y[:16][order])
    assert one.progress.loss_sum / 16 == pytest.approx(loss.item(), rel=1e-5)
    right = logits.argmax(1)
    hits = share * (right == Y[:16]).sum() + (1 - share) * (right == Y[:16][order]).sum()
    assert one.progress.correct == pytest.approx(hits.item())


def test_every_step_is_mixed_for_itself() -> None:
    shares = [
        mixed(X[:16], Y[:16], 0.4, np.random.default_rng(drawn(*step, -1)), Ranks())[2]
        for step in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert shares[0] == shares.pop()
    assert len(set(shares)) == 3


def test_mixtures_keep_dtype_and_layout() -> None:
    x = torch.ones(4, 3, 2, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    found, _, _ = mixed(x, Y[:4], 0.4, np.random.default_rng(0), Ranks())
    assert (found.dtype, found.stride()) == (x.dtype, x.stride())


def test_tokens_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match=r"mixes numbers, and the rows here are torch.int32 tokens"):
        mixed(X.int(), Y, 0.4, np.random.default_rng(0), Ranks())
