"""Which tier is chosen, by bytes, and what is said about it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from rows_of import views

from strata.pipeline.errors import BudgetError, exit_code
from strata.pipeline.feed.delivery import Delivery
from strata.pipeline.plan.memory import TierChoice, choose_tier
from strata.pipeline.run.device import ReadOptions, _group_memory, available_memory
from strata.store.level.layout import Geometry

GB = 10**9


def chosen(asked: str, nbytes: float, *, packed: bool, device: float, memory: float) -> TierChoice:
    return choose_tier(
        asked,
        "x_1",
        int(nbytes * GB),
        packed=packed,
        device_free=int(device * GB),
        memory_free=int(memory * GB),
    )


@pytest.mark.parametrize(
    ("nbytes", "packed", "device", "memory", "tier"),
    [
        pytest.param(5, False, 10, 20, "device", id="fits in 60 % of the GPU"),
        pytest.param(7, False, 10, 20, "memory", id="does not"),
        pytest.param(7, False, 0, 10, "memory", id="raw fits in 70 % of memory"),
        pytest.param(7, True, 0, 10, "disk", id="unpacked it does not fit in 50 %"),
        pytest.param(5, True, 0, 10, "memory", id="unpacked it does"),
        pytest.param(8, False, 0, 10, "disk", id="raw does not fit either"),
    ],
)
def test_the_fastest_tier_with_room(
    nbytes: float, packed: bool, device: float, memory: float, tier: str
) -> None:
    found = chosen("auto", nbytes, packed=packed, device=device, memory=memory)
    assert found.tier == tier
    assert f"is {nbytes}.0 GB" in found.reason


def test_a_tier_that_is_asked_for_is_taken_or_refused_with_both_numbers() -> None:
    assert chosen("disk", 1, packed=False, device=10, memory=10).tier == "disk"
    assert chosen("memory", 1, packed=False, device=10, memory=10).tier == "memory"
    with pytest.raises(BudgetError, match=r"--tier memory: x_1 raw is 8\.0 GB, 10\.0 GB of") as at:
        chosen("memory", 8, packed=False, device=0, memory=10)
    assert exit_code(at.value) == 5
    with pytest.raises(BudgetError, match=r"--tier device: .* 0 B of GPU memory are free"):
        chosen("device", 8, packed=False, device=0, memory=10)


def test_rows_that_are_read_once_are_not_put_on_the_gpu(tmp_path: Path) -> None:
    """`--tier device` is about a problem's features; writing a level reads what is below once."""
    levels = views(tmp_path, Geometry(5, (1, 2, 3), "uint8", 2, 4, "raw"), 1)
    machine = ReadOptions(torch.device("cpu"), tier="device")
    with Delivery(levels, machine, once=True) as delivery:
        assert delivery.choice.tier == "memory"
    with pytest.raises(BudgetError, match="--tier device"):
        Delivery(levels, machine)


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    """Its page cache can be taken back, so it is free."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 100\nactive_file 150\n")
    assert _group_memory(tmp_path) == 1000 - 700 + 250
    (tmp_path / "memory.max").write_text("max\n")
    assert _group_memory(tmp_path) == sys.maxsize
    assert _group_memory(tmp_path / "none") == sys.maxsize
    assert 0 < available_memory() < sys.maxsize
