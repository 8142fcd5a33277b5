"""Gradients that go straight into the momentum: torch.optim.SGD's steps, in less memory."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strata.stages.errors import Diverged
from strata.stages.memory import watched
from strata.stages.network.convolving import PART, WHOLE
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import Solver

CPU = torch.device("cpu")
X = torch.randn(12, 480, 5, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 10, (12,), generator=torch.Generator().manual_seed(1))


def network(bias: bool = True) -> nn.Module:
    """A kernel that is added in parts (padded, with a stride), a matrix in one piece, and small
    parameters that torch.optim.SGD changes."""
    torch_state = torch.get_rng_state()
    torch.manual_seed(3)
    made = nn.Sequential(
        nn.Conv2d(480, 512, 3, stride=2, padding=1, bias=bias),
        nn.BatchNorm2d(512),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512 * 9, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    torch.set_rng_state(torch_state)
    sizes = [p.nbytes for p in made.parameters() if p.ndim > 1]
    assert sizes[0] > PART > sizes[1] > WHOLE > sizes[2]
    return made


def solver(made: nn.Module, *, straight: bool = True, **changes: Any) -> Solver:
    plan: dict[str, Any] = {"kind": "step", "epochs": 2, "batch": 12, "lr": 0.01, "momentum": 0.9}
    plan |= {"weight_decay": 5e-4, "accumulate": 3, **changes}
    return Solver(made.train(), SGDSchedule(**plan), CPU, torch.float32, straight=straight)


def weights(one: Solver) -> list[Tensor]:
    return [p.detach().clone() for p in one.problem.parameters()]


@pytest.mark.parametrize(
    ("accumulate", "momentum", "decay"), [*product([1, 3], [0.9, 0.0], [0.0, 1e-2])]
)
def test_the_steps_are_those_of_torch_but_for_the_order_of_sums(
    accumulate: int, momentum: float, decay: float
) -> None:
    changes = {"accumulate": accumulate, "momentum": momentum, "weight_decay": decay}
    made = network(bias=accumulate == 3)
    ours = solver(copy.deepcopy(made), **changes)
    theirs = solver(made, straight=False, **changes)
    before = weights(ours)
    for _ in range(3):
        ours.train_on(X, Y, 3)
        theirs.train_on(X, Y, 3)
    for old, one, other in zip(before, weights(ours), weights(theirs), strict=True):
        assert not torch.equal(old, one)
        # A bias before batch norm moves by nothing but rounding.
        assert (one - other).abs().max() <= 1e-4 * (other - old).abs().max() + 2e-9
    assert ours.progress.loss_sum == pytest.approx(theirs.progress.loss_sum, rel=1e-6)
    assert ours.progress.correct == theirs.progress.correct


def test_checkpointing_takes_the_same_steps() -> None:
    """It saves other tensors for backward than the parameters."""

    class Checkpointed(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inside, x, use_reentrant=False)  # pyright: ignore

    plain = network()
    del plain[1]  # pyright: ignore  # batch norm, which would count twice
    ours, theirs = solver(Checkpointed(copy.deepcopy(plain))), solver(plain)
    for _ in range(3):
        ours.train_on(X, Y, 3)
        theirs.train_on(X, Y, 3)
    assert all(map(torch.equal, weights(ours), weights(theirs)))
    assert len(ours.optimiser.state) == len(theirs.optimiser.state) == len(weights(ours))


def test_no_large_gradient_is_kept() -> None:
    def peak(straight: bool) -> int:
        one = solver(network(), straight=straight)
        one.train_on(X, Y, 3)
        with watched(CPU, one.tensors().values()) as found:
            one.step(X, Y)
        return found.nbytes

    kernel = 4 * 512 * 480 * 9
    assert peak(straight=False) - peak(straight=True) > 0.9 * kernel


def test_a_stop_between_two_steps_changes_no_bit() -> None:
    made = network()
    whole, first = solver(copy.deepcopy(made)), solver(copy.deepcopy(made))
    for _ in range(4):
        whole.train_on(X, Y, 4)
    for _ in range(2):
        first.train_on(X, Y, 4)
    first.settle()
    kept = {n: t.clone() for n, t in first.tensors().items()}
    again = solver(made)
    again.restore(kept, **first.snapshot())
    for _ in range(2):
        again.train_on(X, Y, 4)
    assert all(map(torch.equal, weights(again), weights(whole)))


def test_the_network_is_as_it_was_after_a_step() -> None:
    """Names of its state, and how it convolves, which export and digests go by."""
    made = network()
    names = [*made.state_dict()]
    one = solver(made)
    one.train_on(X, Y, 3)
    assert [*made.state_dict()] == names
    assert "_conv_forward" not in vars(made[0])  # pyright: ignore[reportIndexIssue]
    assert all(p.grad is None for p in made.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in made.parameters())


@pytest.mark.parametrize("changes", [{"nesterov": True}])
def test_a_step_that_wants_whole_gradients_is_torchs(changes: dict[str, Any]) -> None:
    assert type(solver(network(), **changes).optimiser) is torch.optim.SGD


# ---- steps that are read later, as on a GPU -----------------------------------------------------


def test_what_is_read_later_is_the_same() -> None:
    now, later = solver(network()), solver(network())
    later.lag = 3
    for _ in range(5):
        now.train_on(X, Y, 5)
        later.train_on(X, Y, 5)
    assert later.progress.samples == 2 * len(Y), "three of five are not read yet"
    assert now.finish_epoch()["loss"] == later.finish_epoch()["loss"]
    assert all(map(torch.equal, weights(now), weights(later)))


def test_a_loss_that_is_not_finite_is_met_before_anything_is_saved() -> None:
    one = solver(network())
    one.lag = 3
    one.train_on(X, Y, 5)
    one.train_on(X * torch.inf, Y, 5)
    with pytest.raises(Diverged):
        one.settle()


def test_weights_that_are_not_finite_are_met_before_they_are_saved() -> None:
    """A step whose loss is finite may have made them."""
    one = solver(network())
    one.train_on(X, Y, 5)
    one.settle()
    with torch.no_grad():
        one.problem.get_parameter("6.bias")[3] = -torch.inf
    with pytest.raises(Diverged) as caught:
        one.settle()
    assert caught.value.last_good == one.progress.last_good is not None


def test_divergence_is_met_so_many_steps_later_at_most() -> None:
    one = solver(network())
    one.lag = 3

    def go_on() -> None:
        while one.progress.batch < 9:
            one.train_on(X * torch.inf, Y, 9)

    with pytest.raises(Diverged):
        go_on()
    assert one.progress.batch == one.lag
