"""Counting tensors on a CPU: what lives is counted once, what is gone is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from strata.stages.memory import watched

CPU = torch.device("cpu")
MB = 1 << 20


def test_only_what_lives_at_the_same_time_adds_up() -> None:
    with watched(CPU) as peak:
        for _ in range(3):
            torch.zeros(MB, dtype=torch.uint8)
    assert peak.nbytes == MB
    with watched(CPU) as peak:
        both = [torch.zeros(MB, dtype=torch.uint8) for _ in range(3)]
    assert len(both) == 3
    assert peak.nbytes == 3 * MB


def test_views_and_what_was_there_before_are_counted_once() -> None:
    before, unseen = torch.zeros(MB, dtype=torch.uint8), torch.zeros(MB, dtype=torch.uint8)
    with watched(CPU, {"unseen": unseen}.values()) as peak:
        before[: MB // 2].add_(1)
        before.view(2, -1).add_(1)
    assert peak.nbytes == 2 * MB


@pytest.mark.global_rng
def test_what_backward_needs_is_seen() -> None:
    """Two activations and their gradients, weights and theirs: at least what is saved."""
    net = nn.Sequential(nn.Linear(64, 4096, bias=False), nn.ReLU(), nn.Linear(4096, 1, bias=False))
    x = torch.zeros(256, 64)
    with watched(CPU) as forward, torch.no_grad():
        net(x).sum()
    with watched(CPU) as training:
        net(x).sum().backward()
    one = 256 * 4096 * 4
    assert 2 * one <= forward.nbytes < 3 * one
    assert 3 * one < training.nbytes < 4 * one
