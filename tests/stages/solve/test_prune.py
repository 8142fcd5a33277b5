"""Removing filters: what is left computes what the whole did without them; Taylor, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strata.stages.network.network import Layer, Problem, build_problem
from strata.stages.network.spec import AuxiliarySpec, LayerSpec
from strata.stages.solve.prune import narrowed, strongest, taylor

CPU = torch.device("cpu")
KEPT = torch.tensor([0, 2, 3, 6])
WIDTH, SIDE, CLASSES = 8, 8, 5


def layer_of(
    *, times: int = 0, norm: bool = True, bias: bool = True, pool: str = "invertible"
) -> LayerSpec:
    return LayerSpec(2, 3, WIDTH, times, norm, bias, pool)


def classifier(k: int, *, half: bool = False) -> AuxiliarySpec:
    return AuxiliarySpec(WIDTH, k, 6 if k > 1 else 0, CLASSES, True, True, half)


VGG_END = AuxiliarySpec(WIDTH, 2, 0, CLASSES, True, True, hidden=(7,), side=SIDE // 2)
CASES = [
    pytest.param(layer_of(), classifier(1), id="linear: columns channel by channel"),
    pytest.param(layer_of(norm=False), classifier(1), id="no batch norm"),
    pytest.param(layer_of(bias=False), classifier(3), id="no bias, two convolutions"),
    pytest.param(layer_of(times=1), classifier(3), id="after a P"),
    pytest.param(layer_of(times=1, pool="max"), classifier(2, half=True), id="max pooled, halved"),
    pytest.param(layer_of(), VGG_END, id="fully connected"),
]


def images(n: int, seed: int = 0, side: int = SIDE) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def labels(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


def solved(layer: LayerSpec, auxiliary: AuxiliarySpec) -> Problem:
    """One whose batch norms have seen something, and shift and scale every channel otherwise."""
    problem = build_problem(layer, auxiliary, 3).train()
    generator = torch.Generator().manual_seed(4)
    for part in problem.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(part.bias, -0.5, 0.5, generator=generator)
    with torch.no_grad():
        problem(images(16, seed=1, side=SIDE * 2**layer.downsamplings))
    return problem.eval()


def small(
    layer: LayerSpec, auxiliary: AuxiliarySpec, count: int
) -> tuple[LayerSpec, AuxiliarySpec]:
    return replace(layer, width=count), replace(auxiliary, channels=count)


class Silenced(nn.Module):
    """A layer whose other channels are 0: they are there, and do nothing."""

    def __init__(self, layer: Layer, kept: Tensor) -> None:
        super().__init__()
        self.layer, self.kept = layer, kept

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        mask = torch.zeros(y.shape[1])
        mask[self.kept] = 1
        return y * mask[:, None, None]


@pytest.mark.parametrize(("layer", "auxiliary"), CASES)
def test_removed_is_as_if_silent(layer: LayerSpec, auxiliary: AuxiliarySpec) -> None:
    problem = solved(layer, auxiliary)
    less = narrowed(problem, *small(layer, auxiliary, len(KEPT)), KEPT)
    x = images(12, side=SIDE * 2**layer.downsamplings)
    with torch.no_grad():
        assert isinstance(problem.layer, Layer)
        silent = problem.auxiliary(Silenced(problem.layer, KEPT)(x))
        torch.testing.assert_close(less.layer(x), problem.layer(x)[:, KEPT])
        torch.testing.assert_close(less(x), silent)
        assert not torch.allclose(less(x), problem(x), atol=1e-3), "the others had a part in it"
    smaller = replace(layer, width=len(KEPT))
    assert sum(p.numel() for p in less.layer.parameters()) == smaller.parameters
    assert not less.training


def test_the_order_of_linear_columns_matters() -> None:
    """Were they pixel by pixel, the linear map would see other features; no shape tells."""
    layer, auxiliary = layer_of(), classifier(1)
    problem = solved(layer, auxiliary)
    less = narrowed(problem, *small(layer, auxiliary, len(KEPT)), KEPT)
    weight = problem.auxiliary.get_parameter("linear.weight")
    assert isinstance(weight, Tensor)
    wanted = torch.cat([weight[:, 4 * c : 4 * c + 4] for c in KEPT.tolist()], 1)
    assert torch.equal(less.auxiliary.state_dict()["linear.weight"], wanted)


def test_what_is_narrowed_shares_nothing_and_trains_as_the_problem_did() -> None:
    layer, auxiliary = layer_of(), classifier(3)
    problem = solved(layer, auxiliary).train()
    before = {name: t.clone() for name, t in problem.state_dict().items()}
    less = narrowed(problem, *small(layer, auxiliary, len(KEPT)), KEPT)
    assert less.training
    nn.functional.cross_entropy(less(images(8)), labels(8)).backward()
    with torch.no_grad():
        for p in less.parameters():
            assert p.grad is not None
            p.sub_(p.grad)
    assert all(torch.equal(before[name], t) for name, t in problem.state_dict().items())


# ---- the criterion ------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "auxiliary"), CASES)
def test_scores_are_molchanovs(layer: LayerSpec, auxiliary: AuxiliarySpec) -> None:
    """Eq. 8, an example at a time and by a gate on every channel: ∂loss/∂gate is the sum over
    pixels of x_j · ∂loss/∂x_j."""
    problem, n, side = solved(layer, auxiliary), 6, SIDE * 2**layer.downsamplings
    x, y = images(n, seed=2, side=side), labels(n)
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for i in range(n):
        gate = torch.ones(WIDTH, requires_grad=True)
        maps = problem.layer(x[i : i + 1]).detach()
        loss = nn.functional.cross_entropy(
            problem.auxiliary(maps * gate[:, None, None]), y[i : i + 1]
        )
        (slope,) = torch.autograd.grad(loss, gate)
        total += (slope / maps[0, 0].numel()).abs().double()
    scores = taylor(problem, [(x, y)], CPU, torch.float32)
    torch.testing.assert_close(scores, total / total.norm(), rtol=1e-4, atol=1e-6)
    assert float(scores.norm()) == pytest.approx(1)


def test_scores_do_not_depend_on_batches_and_leave_the_problem_alone() -> None:
    problem = solved(layer_of(), classifier(3)).train()
    before = {name: t.clone() for name, t in problem.state_dict().items()}
    x, y = images(12), labels(12)
    whole = taylor(problem, [(x, y)], CPU, torch.float32)
    parts = taylor(problem, zip(x.split(5), y.split(5), strict=True), CPU, torch.float32)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-7)
    assert problem.training
    assert all(torch.equal(before[name], t) for name, t in problem.state_dict().items())
    assert all(p.grad is None for p in problem.parameters())


def test_a_filter_that_does_nothing_has_score_0() -> None:
    problem = solved(layer_of(norm=False), classifier(3))
    with torch.no_grad():
        convolution: Any = problem.layer.convolution
        convolution.weight[5] = 0
        convolution.bias[5] = -1
    scores = taylor(problem, [(images(8), labels(8))], CPU, torch.float32)
    assert scores[5] == 0
    assert 5 not in strongest(scores, WIDTH - 1)
    for dead in problem.layer.parameters():
        nn.init.constant_(dead, -1.0 if dead.dim() == 1 else 0.0)
    nothing = taylor(problem, [(images(8), labels(8))], CPU, torch.float32)
    assert torch.equal(nothing, torch.zeros(WIDTH, dtype=torch.float64))


def test_half_precision_ranks_as_float32_does() -> None:
    problem, batches = solved(layer_of(), classifier(3)), [(images(32), labels(32))]
    exact = taylor(problem, batches, CPU, torch.float32)
    torch.testing.assert_close(
        taylor(problem, batches, CPU, torch.bfloat16), exact, rtol=0.1, atol=0.02
    )


def test_the_strongest_are_in_order_and_of_equals_the_first() -> None:
    scores = torch.tensor([0.1, 0.5, 0.5, 0.0, 0.5, 0.9])
    assert strongest(scores, 3).tolist() == [1, 2, 5]
    assert strongest(torch.zeros(5), 2).tolist() == [0, 1]
    assert strongest(scores, 6).tolist() == list(range(6))
