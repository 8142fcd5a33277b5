"""Loss and accuracy where every token has a label: means over tokens, and over rows of these."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from strata.stages.errors import DataError
from strata.stages.solve import evaluate
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import Solver

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(7, 5, 11)).astype(np.float32)
Y = RNG.integers(0, 11, (7, 5))
ONCE = SGDSchedule("step", 1, 8, 0.1, 0.0, 0.0)


def test_metrics_are_those_of_all_tokens() -> None:
    flat, labels = Z.reshape(-1, 11), Y.ravel()
    for k in (1, 5):
        assert evaluate.top_k(Z, Y, k) == pytest.approx(evaluate.top_k(flat, labels, k), rel=1e-12)
    assert evaluate.losses(Z, Y).mean() == pytest.approx(evaluate.losses(flat, labels).mean())
    np.testing.assert_array_equal(evaluate.confusion(Z, Y), evaluate.confusion(flat, labels))
    np.testing.assert_allclose(evaluate.softmax(Z).sum(-1), 1)
    assert evaluate.ensemble([Z, Z]).shape == Z.shape
    assert evaluate.losses(Z, Y).shape == evaluate.hits(Z, Y, 1).shape == (7,)


@pytest.mark.parametrize("kept", [True, False])
def test_judged_in_parts(monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", Z.nbytes - (not kept))
    parts = [evaluate.Judged.of(Z[a:b], Y[a:b], 7) for a, b in ((0, 3), (3, 7))]
    whole = evaluate.Judged.joined(parts)
    expected = {"loss": evaluate.losses(Z, Y).mean(), **evaluate.accuracies(Z, Y)}
    assert whole.figures("cross-entropy", Y) == pytest.approx(expected, rel=1e-12)
    assert (whole.logits is not None) == kept
    if kept:
        np.testing.assert_array_equal(whole.logits, Z)


def solver(classes: int = 11) -> Solver[nn.Module]:
    network = nn.Linear(3, classes, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        values = torch.linspace(-1, 1, network.weight.numel()).view_as(network.weight)
        network.weight.copy_(values)
        network.bias.zero_()
    return Solver(network.train(), ONCE, torch.device("cpu"), torch.float32)


def test_a_step_is_on_the_mean_over_tokens() -> None:
    x = torch.from_numpy(RNG.normal(size=(8, 5, 3)).astype(np.float32))
    y = torch.from_numpy(RNG.integers(0, 11, (8, 5)))
    one, other = solver(), solver()
    one.step(x, y)
    done = one.finish_epoch()
    logits = other.problem(x)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    with torch.no_grad():
        for parameter in other.problem.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    for mine, theirs in zip(one.problem.parameters(), other.problem.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert done["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert done["top1"] == pytest.approx((logits.argmax(-1) == y).double().mean().item())


def test_other_numbers_of_tokens_are_one_line() -> None:
    x, y = torch.zeros(8, 5, 3), torch.zeros(8, 4, dtype=torch.int64)
    with pytest.raises(
        DataError, match=r"labels of shape \[4\], and its classifier gives .* \[5\]"
    ):
        solver().step(x, y)
