"""Losses and the metrics that belong to them: what is minimised, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from epochs import run_epoch
from sklearn import metrics as judges
from torch import Tensor, nn
from torch.nn import functional as F

from strata.stages.errors import DataError, UnusableNetwork
from strata.stages.network.blocks import Origin
from strata.stages.solve import evaluate
from strata.stages.solve.loss import SampleLoss, check_targets, loss_of
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import Solver

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
Z = torch.from_numpy(RNG.normal(size=(40, 6)).astype(np.float32))
CLASSES = torch.from_numpy(RNG.integers(0, 6, 40))
MANY = torch.from_numpy((RNG.random((40, 6)) < 0.3).astype(np.float32))
NUMBERS = torch.from_numpy(RNG.normal(size=(40, 6)).astype(np.float32))


def own(function: Callable[[Tensor, Tensor], Any]) -> SampleLoss:
    return SampleLoss("own", function, "loss mine.py:loss")


# ---- losses -------------------------------------------------------------------------------------


def test_losses_are_torchs() -> None:
    bce, mse = F.binary_cross_entropy_with_logits(Z, MANY), F.mse_loss(Z, NUMBERS)
    torch.testing.assert_close(SampleLoss("bce").total(Z, MANY) / 40, bce)
    torch.testing.assert_close(SampleLoss("mse").total(Z, NUMBERS) / 40, mse)
    smooth = F.cross_entropy(Z, CLASSES, label_smoothing=0.1)
    torch.testing.assert_close(SampleLoss().total(Z, CLASSES, 0.1) / 40, smooth)
    focal = own(lambda z, y: F.cross_entropy(z, y, reduction="none") ** 2)
    expected = F.cross_entropy(Z, CLASSES, reduction="none").square().sum()
    torch.testing.assert_close(focal.total(Z, CLASSES), expected)


def test_one_number_needs_no_axis() -> None:
    expected = F.mse_loss(Z[:, 0], NUMBERS[:, 0], reduction="none")
    torch.testing.assert_close(SampleLoss("mse").each(Z[:, :1], NUMBERS[:, 0]), expected)


@pytest.mark.parametrize(("kind", "labels"), [("bce", MANY), ("mse", NUMBERS), ("own", CLASSES)])
def test_judged_losses_are_those_of_the_steps(kind: str, labels: Tensor) -> None:
    loss = (
        own(lambda z, y: F.cross_entropy(z, y, reduction="none"))
        if kind == "own"
        else SampleLoss(kind)
    )
    found = loss.of_arrays(Z.numpy(), labels.numpy())
    assert (found.dtype, found.shape) == (np.float64, (40,))
    np.testing.assert_allclose(found, loss.each(Z, labels).numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda z, y: F.cross_entropy(z, y), r"gives \[\] for 40 samples; .*\[40\]: leave its red"),
        (lambda z, y: 1.0, "gives float for 40 samples"),
        (lambda z, y: F.cross_entropy(z.detach(), y, reduction="none"), "no gradient"),
        (lambda z, y: z @ y, "loss mine.py:loss: "),
    ],
)
def test_what_is_no_loss_is_refused(function: Any, said: str) -> None:
    with pytest.raises(UnusableNetwork, match=said):
        own(function).total(Z.clone().requires_grad_(), CLASSES)


def test_a_function_of_a_file(tmp_path: Any) -> None:
    code = "import torch\ndef loss(z, y): return (z - y).abs().mean(1)\nno = 3"
    place: dict[str, Any] = {"code": code, "folder": str(tmp_path)}
    loss = loss_of(Origin("mine.py:loss", **place))
    torch.testing.assert_close(loss.each(Z, MANY), (Z - MANY).abs().mean(1))
    with pytest.raises(UnusableNetwork, match=r"loss mine.py:no: mine.py has no function no"):
        loss_of(Origin("mine.py:no", **place))
    (tmp_path / "helper.py").write_text("x = 1")
    two = Origin("two.py:loss", code="import helper\ndef loss(z, y): ...", folder=str(tmp_path))
    with pytest.raises(UnusableNetwork, match=r"two.py reads helper.py beside it"):
        loss_of(two)


@pytest.mark.parametrize(
    ("kind", "labels", "outputs", "said"),
    [
        ("cross-entropy", NUMBERS, 6, "'cross-entropy', and the labels are numbers, 6 for each"),
        ("bce", CLASSES, 6, "is 'bce', and the labels are class labels: cross-entropy is of"),
        ("bce", MANY, 5, "set 'data.classes', which is 5, to 6"),
        ("bce", NUMBERS, 6, "from -[0-9.]+ to [0-9.]+: those of bce are in 0 … 1"),
        ("mse", NUMBERS[:, 0], 6, "set 'data.classes', which is 6, to 1"),
    ],
)
def test_labels_must_suit(kind: str, labels: Tensor, outputs: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_targets(kind, kind, labels.numpy(), outputs)


def test_labels_that_suit() -> None:
    for kind, labels in (("cross-entropy", CLASSES), ("bce", MANY), ("mse", NUMBERS)):
        check_targets(kind, kind, labels.numpy(), 6)
    check_targets("mine.py:loss", "own", NUMBERS.numpy(), 3)


# ---- metrics ------------------------------------------------------------------------------------


def test_metrics_are_scikit_learns() -> None:
    none = {"top1": None, "top5": None}
    z, many, numbers = Z.numpy(), MANY.numpy(), NUMBERS.numpy()
    found = evaluate.metrics("bce", z, many)
    expected = judges.average_precision_score(many, z, average="macro")
    assert found == none | {"map": pytest.approx(expected)}
    assert evaluate.metrics("mse", z, numbers) == none | {
        "r2": pytest.approx(judges.r2_score(numbers, z)),
        "rmse": pytest.approx(judges.mean_squared_error(numbers, z) ** 0.5),
    }
    assert evaluate.metrics("own", z, numbers) == none
    assert evaluate.metrics("own", z, CLASSES.numpy()) == evaluate.accuracies(z, CLASSES.numpy())


def test_metrics_that_mean_nothing_are_none() -> None:
    z = Z.numpy()
    empty = MANY.numpy() * np.array([1, 1, 1, 0, 0, 0], np.float32)  # classes that no sample has
    some = judges.average_precision_score(empty[:, :3], z[:, :3], average="macro")
    assert evaluate.metrics("bce", z, empty)["map"] == pytest.approx(some)
    assert evaluate.metrics("bce", z, np.zeros_like(z))["map"] is None
    assert evaluate.metrics("mse", z, np.ones_like(z))["r2"] is None
    assert "map" not in evaluate.metrics("bce", np.full_like(z, np.nan), empty)


def test_probabilities_by_loss() -> None:
    z = Z.numpy()
    np.testing.assert_allclose(evaluate.probabilities("bce", z), torch.sigmoid(Z), rtol=1e-5)
    np.testing.assert_array_equal(evaluate.probabilities("mse", z), z)
    assert evaluate.probabilities("bce", np.array([[-1e4, 1e4]])).tolist() == [[0.0, 1.0]]


def test_figures_for_people() -> None:
    assert evaluate.said({"top1": 0.9327, "loss": 0.2}) == "93.27 %"
    assert evaluate.said({"top1": None, "map": 0.712, "loss": 0.2}) == "mAP 71.20 %"
    assert evaluate.said({"top1": None, "r2": -0.5, "rmse": 2.0, "loss": 4.0}) == "R² -0.5000"
    assert evaluate.said({"top1": None, "loss": 4.0}) == "loss 4.0000"
    better = [{"loss": 1.0}, {"loss": 2.0}]
    assert sorted(better, key=evaluate.rank) == better[::-1]
    assert evaluate.rank({"top1": None, "r2": 0.5, "loss": 1.0}) == 0.5


# ---- solved -------------------------------------------------------------------------------------


def solver(kind: str, outputs: int) -> Solver[nn.Module]:
    plan = SGDSchedule("cosine", 40, 16, 0.05, warmup=0.1, optimizer="adamw")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = nn.Linear(8, outputs)
    return Solver(network, plan, CPU, torch.float32, loss=SampleLoss(kind))


@pytest.mark.parametrize(("kind", "axes"), [("bce", 2), ("mse", 2), ("mse", 1)])
def test_it_learns(kind: str, axes: int) -> None:
    x = torch.from_numpy(RNG.normal(size=(64, 8)).astype(np.float32))
    y = x[:, :3] - 2 * x[:, 3:6]
    y = (y > 0).float() if kind == "bce" else y if axes == 2 else y[:, 0]
    one = solver(kind, 3 if axes == 2 else 1)
    batches = list(zip(x.split(16), y.split(16), strict=True))
    lines = [run_epoch(one, batches, 4) for _ in range(40)]
    assert all(line["top1"] is None for line in lines)
    assert lines[-1]["loss"] < 0.4 * lines[0]["loss"]
    z = one.finish()(x).detach().numpy()
    found = evaluate.metrics(kind, z, y.numpy())
    assert found["map" if kind == "bce" else "r2"] == pytest.approx(1, abs=0.05)


def test_labels_of_another_width_are_refused() -> None:
    with pytest.raises(DataError, match=r"mse wants as many numbers .*\[3\], and labels are .*\[2"):
        solver("mse", 3).step(torch.zeros(4, 8), torch.zeros(4, 2))
