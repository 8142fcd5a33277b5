"""Modules as chains of plain parts: all that the network is made of, and what is no chain."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from strata.stages.errors import StageError
from strata.stages.network.chain import Part, chain
from strata.stages.network.network import build_problem
from strata.stages.network.spec import AuxiliarySpec, LayerSpec


def plain(parts: list[Part]) -> nn.Sequential:
    """The chain, built of torch's own modules."""
    made = []
    for part in parts:
        with torch.device("meta"):
            module = getattr(nn, part.kind)(**part.arguments)
        module.load_state_dict(part.state, assign=True)
        made.append(module)
    return nn.Sequential(*made).eval()


@pytest.mark.parametrize(
    ("k", "downsamplings", "batch_norm", "bias"),
    [*itertools.product([1, 3], [0, 2], [True, False], [True, False])],
)
def test_a_layer_and_its_classifier_are_chains(
    k: int, downsamplings: int, batch_norm: bool, bias: bool
) -> None:
    layer = LayerSpec(1, 2, 4, downsamplings, batch_norm, bias)
    auxiliary = AuxiliarySpec(4, k, 6, 5, batch_norm, bias)
    problem = build_problem(layer, auxiliary, 0).eval()
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    y = problem.layer(x)
    assert torch.equal(plain(chain(problem.layer, (2, 8, 8)))(x), y)
    again = plain(chain(problem.auxiliary, tuple(y.shape[1:])))
    assert torch.equal(again(y), problem.auxiliary(y))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


class Forks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.ReLU(), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        self.one(x)
        return self.other(x)


@pytest.mark.parametrize(
    ("module", "why"),
    [(Residual(), "add"), (Forks(), "no chain: other"), (nn.Sequential(nn.GELU()), "GELU")],
)
def test_what_is_no_chain_of_known_parts_is_refused(module: nn.Module, why: str) -> None:
    with pytest.raises(StageError, match=why):
        chain(module.eval(), (2, 4, 4))
