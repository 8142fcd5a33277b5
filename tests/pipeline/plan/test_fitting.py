"""``--gpu-memory``: steps are divided until they fit; what cannot is refused with both numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from footprints import stepped
from runs import here, tiny

from strata.pipeline.errors import BudgetError
from strata.pipeline.plan import memory
from strata.pipeline.progress import parse_size, size
from strata.pipeline.recipe.builtin import load
from strata.stages.network.network import build_problem
from strata.store.files.publish import unseal

CPU = memory.Device("float32", cuda=False)
K1 = load("cifar10-k1")[1]


def peak(j: int, micro_batches: int) -> int:
    found = memory.peak(K1, j, CPU, micro_batches)
    assert found is not None
    return found


def test_the_fewest_micro_batches_that_fit() -> None:
    whole = max(peak(j, 1) for j in range(1, 6))
    assert memory.fit(K1, CPU, whole) == (1,) * 5
    accumulate = memory.fit(K1, CPU, 500_000_000)
    for j, count in enumerate(accumulate, start=1):
        assert peak(j, count) <= 500_000_000
        assert count == 1 or peak(j, count // 2) > 500_000_000
    assert len(set(accumulate)) > 1, "every layer has its own"


def test_half_precision_leaves_more_rows() -> None:
    half = memory.Device("bfloat16", cuda=True)
    some = zip(memory.fit(K1, half, 600_000_000), memory.fit(K1, CPU, 600_000_000), strict=True)
    assert all(few <= many for few, many in some)


def test_what_cannot_fit_is_refused_with_both_numbers() -> None:
    least = peak(4, 128)
    assert peak(3, 128) < 100_000_000 < least
    with pytest.raises(BudgetError) as caught:
        memory.fit(K1, CPU, 100_000_000)
    assert size(least) in str(caught.value)
    assert "100.0 MB" in str(caught.value)


def do(place: Path, command: str, *more: object):
    (place / "tiny.toml").write_text(tiny(layers=2), "utf-8")
    where = ("--run", place / "run", "--store", place / "store")
    return here(command, place / "tiny.toml", *where, *more)


def test_a_run_keeps_to_what_it_was_divided_into(tmp_path: Path) -> None:
    told = do(tmp_path, "plan", "--gpu-memory", "300kB")
    assert "16 of 64 rows at a time" in told.out
    done = do(tmp_path, "run", "--gpu-memory", "300kB")
    assert done.rc == 0
    assert unseal(tmp_path / "run" / "run.json")["accumulate"] == [4, 4]
    for j in (1, 2):
        record = unseal(tmp_path / f"run/layer_{j}/layer.json")
        assert record["peak_memory_bytes"] <= parse_size("300kB")
    weights = (tmp_path / "run/layer_2/weights.safetensors").read_bytes()
    assert do(tmp_path, "clean", "--layer", 2, "--yes").rc == 0
    assert do(tmp_path, "run").rc == 0, "without the option the run is divided as before"
    assert (tmp_path / "run/layer_2/weights.safetensors").read_bytes() == weights


def test_a_run_that_was_made_larger_is_refused(tmp_path: Path) -> None:
    assert do(tmp_path, "train", "--layer", 1).rc == 0
    refused = do(tmp_path, "train", "--layer", 2, "--gpu-memory", "300kB")
    assert refused.rc == 5
    assert "64 rows at a time" in refused.error
    assert "300.0 kB" in refused.error
    assert "--run" in refused.error


def test_nothing_is_begun_that_cannot_fit(tmp_path: Path) -> None:
    for command in (("plan",), ("run",)):
        refused = do(tmp_path, *command, "--gpu-memory", "1kB")
        assert refused.rc == 5
        assert "with one row at a time" in refused.error
    assert not (tmp_path / "run").exists()


def test_a_step_that_takes_more_than_was_thought_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "peak", lambda *_: 1)
    refused = do(tmp_path, "train", "--layer", 1, "--gpu-memory", "100kB")
    assert refused.rc == 5
    assert "a step of layer 1 took" in refused.error


@pytest.mark.parametrize(("name", "batch"), [("cifar10-small", 32), ("cifar10-k1", 4)])
@pytest.mark.parametrize(
    "choice",
    [{"optimizer": "adamw"}, {"mixup": 0.2}, {"optimizer": "adamw", "mixup": 0.2, "keep": "best"}],
    ids=str,
)
def test_a_step_of_other_choices_takes_what_was_planned(
    name: str, batch: int, choice: dict[str, Any]
) -> None:
    """Whether activations count most or weights."""
    _, recipe = load(name)
    recipe = replace(recipe, schedule=replace(recipe.schedule, batch=batch, **choice))
    for j, specs in enumerate(recipe.problems[:2], start=1):
        shape = recipe.shape(j - 1, recipe.augment.crop)
        steps = {key: value for key, value in choice.items() if key != "keep"}
        problem = build_problem(*specs, 0)
        best = sum(p.nbytes for p in problem.parameters()) * ("keep" in choice)
        measured = best + stepped(problem, shape, batch, 1, torch.float32, **steps)
        assert memory.peak(recipe, j, CPU, 1) == pytest.approx(measured, rel=0.04), f"layer {j}"
