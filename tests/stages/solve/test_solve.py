"""The solver: the paper's schedule, exact resumption, Prop. 3.1's best iterate, divergence."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from epochs import run_epoch
from torch import Tensor, nn

from strata.stages.errors import Diverged
from strata.stages.network.network import build_problem
from strata.stages.network.spec import AuxiliarySpec, LayerSpec
from strata.stages.solve.ranks import Ranks
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import Solver, logits_of
from strata.store.read.order import key_of

CPU = torch.device("cpu")
X = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 10, (96,), generator=torch.Generator().manual_seed(1))


def schedule(**changes: object) -> SGDSchedule:
    fields = {
        "kind": "one-cycle",
        "epochs": 3,
        "batch": 16,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
    return SGDSchedule(**{**fields, **changes})  # pyright: ignore


def solver(plan: SGDSchedule, seed: int = 0, *, drops: bool = False) -> Solver:
    layer, aux = LayerSpec(1, 3, 8, 0, True, False), AuxiliarySpec(8, 2, 8, 10, True, False)
    problem, draws = build_problem(layer, aux, seed), None
    if drops:
        problem.layer = nn.Sequential(problem.layer, nn.Dropout(0.3))
        draws = lambda *step: key_of("test", *step) % 2**63  # noqa: E731
    return Solver(problem, plan, CPU, torch.float32, draws=draws)


def batches(epoch: int, start: int = 0, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    order = np.random.default_rng(epoch).permutation(len(X))
    parts = [order[i : i + size] for i in range(0, len(X), size)][start:]
    return [(X[part], Y[part]) for part in parts]


def run(s: Solver, epochs: range, **options: int) -> list[dict[str, float]]:
    return [run_epoch(s, batches(e, **options), 6) for e in epochs]


def test_the_papers_schedule_drops_by_a_fifth_every_15_epochs() -> None:
    """Sec. 4: 0.1, decays of 0.2 every 15 epochs, 50 epochs."""
    s = schedule(kind="step", epochs=50, decay=0.2, every=15)
    rates = [s.rate(epoch * 390, 390) for epoch in range(50)]
    expected = [0.1] * 15 + [0.02] * 15 + [0.004] * 15 + [0.0008] * 5
    assert rates == pytest.approx(expected)
    assert s.rate(15 * 390 - 1, 390) == pytest.approx(0.1)


def test_one_cycle_rises_to_the_rate_and_falls_to_nearly_nothing() -> None:
    s = schedule(epochs=10, warmup=0.3)
    rates = [s.rate(step, 10) for step in range(100)]
    assert max(rates) == pytest.approx(0.1)
    assert rates.index(max(rates)) == 29
    assert rates == sorted(rates[:30]) + sorted(rates[30:], reverse=True)
    assert 0 < rates[-1] < 0.002


def test_it_learns() -> None:
    losses = [line["loss"] for line in run(solver(schedule(epochs=30)), range(30))]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("stop_at", [1, 2, 5])
@pytest.mark.parametrize(("keep", "drops"), [("last", False), ("best", False), ("last", True)])
def test_resuming_between_any_two_batches_ends_at_the_same_bits(
    stop_at: int, keep: str, drops: bool
) -> None:
    """Weights, momentum, running means, epoch sums and best iterate all survive; what dropout draws
    follows from the step. conftest.py looks at torch's generator."""
    plan = schedule(keep=keep)
    whole = solver(plan, drops=drops)
    expected = []
    for epoch in range(3):
        expected += run(whole, range(epoch, epoch + 1))
        whole.consider(1.0 / (epoch + 1))

    first = solver(plan, drops=drops)
    run(first, range(1))
    first.consider(1.0)
    first.problem.train()
    for x, y in batches(1)[:stop_at]:
        first.train_on(x, y, 6)
    state, note = first.tensors(), json.loads(json.dumps(first.snapshot()))

    second = solver(plan, seed=99, drops=drops)
    second.restore(state, note["progress"], note["scaler"])
    got = [run_epoch(second, batches(1, start=stop_at), 6)]
    second.consider(0.5)
    got += run(second, range(2, 3))
    second.consider(1 / 3)
    assert got == expected[1:]
    for name, tensor in whole.finish().state_dict().items():
        assert torch.equal(tensor, second.finish().state_dict()[name]), name


def test_every_step_draws_for_itself() -> None:
    """Also for every rank; the same step draws the same."""
    found = []
    for step in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 0, 0)):
        one = solver(schedule(), drops=True)
        one.progress.epoch, one.progress.batch = step[:2]
        one.ranks = Ranks(step[2], 1)
        one.problem.train()
        with one._seeded():
            found.append(one.problem(X[:16]).detach())
    assert torch.equal(found[0], found.pop())
    assert all(not torch.equal(a, b) for a, b in combinations(found, 2))


def test_accumulation_takes_the_step_of_the_whole_batch() -> None:
    """Without batch norm, four micro-batches give the gradient of their union."""
    layer, aux = LayerSpec(1, 3, 8, 0, False, True), AuxiliarySpec(8, 2, 8, 10, False, True)
    results = []
    for accumulate in (1, 4):
        plan = schedule(accumulate=accumulate)
        s = Solver(build_problem(layer, aux, 0), plan, CPU, torch.float32)
        run(s, range(2))
        results.append(s.problem.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-5)


def test_the_best_iterate_never_ends_above_the_start() -> None:
    """Prop. 3.1's technical requirement, on a rate that makes the last iterate worse."""
    s = solver(schedule(keep="best", lr=5.0, kind="step"))

    def risk() -> float:
        logits = logits_of(s.problem, [X], CPU, torch.float32)
        return torch.nn.functional.cross_entropy(logits, Y).item()

    start = risk()
    s.consider(start)
    for epoch in range(3):
        run(s, range(epoch, epoch + 1))
        s.consider(risk())
    last = risk()
    s.finish()
    assert risk() <= start
    assert risk() == s.progress.best_risk
    assert last > risk()


def test_a_loss_that_is_not_finite_stops_with_epoch_and_last_good_loss() -> None:
    s = solver(schedule(kind="step", lr=0.01))
    run(s, range(1))
    good = s.progress.last_good
    poisoned = batches(1)
    poisoned[2][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(Diverged, match="epoch 2") as caught:
        run_epoch(s, poisoned[2:], 6)
    assert caught.value.last_good == good


def test_logits_are_taken_in_eval_mode_and_training_goes_on_after() -> None:
    s = solver(schedule())
    s.problem.train()
    before = {n: b.clone() for n, b in s.problem.named_buffers()}
    one = logits_of(s.problem, [X[:10], X[10:]], CPU, torch.float32)
    assert s.problem.training
    assert all(torch.equal(b, before[n]) for n, b in s.problem.named_buffers())
    torch.testing.assert_close(one, logits_of(s.problem, [X], CPU, torch.float32))


def test_bfloat16_learns_what_float32_learns() -> None:
    """Mixed precision: float32 weights and loss, bfloat16 convolutions."""
    curves = []
    for compute in (torch.float32, torch.bfloat16):
        layer, aux = LayerSpec(1, 3, 8, 0, True, False), AuxiliarySpec(8, 2, 8, 10, True, False)
        s = Solver(build_problem(layer, aux, 0), schedule(epochs=15), CPU, compute)
        curves.append([line["loss"] for line in run(s, range(15))])
        assert all(p.dtype == torch.float32 for p in s.problem.parameters())
    assert curves[0] != curves[1]
    assert curves[1][-1] < 0.5 * curves[1][0]
    assert curves[1][0] == pytest.approx(curves[0][0], rel=0.02)
