"""``--cache``: what is written on the way changes time and disk, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import Result, depths, recipe
from root import MACHINES
from runs import inside, tiny

from strata.pipeline.errors import BudgetError, NotThereYet
from strata.pipeline.options import Options
from strata.pipeline.plan.caching import caching
from strata.pipeline.plan.machine import load
from strata.pipeline.plan.plan import make_plan
from strata.pipeline.recipe.builtin import load as load_recipe
from strata.pipeline.recipe.recipe import parse

FAST_CORES = {"forward": 1e18, "disk_write": 1e6, "disk_read": 1e6}
SLOW_CORES = {"forward": 1e3}


def machine(place: Path, name: str, **rates: float) -> Path:
    """The laptop's file with other rates."""
    lines = (MACHINES / "laptop.toml").read_text("utf-8").splitlines()
    kept = [line for line in lines if line.split(" ")[0] not in rates]
    path = place / f"{name}.toml"
    path.write_text("\n".join([*kept, *(f"{k} = {v!r}" for k, v in rates.items())]), "utf-8")
    assert load(path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recipe three times: every depth cached, none, and those worth it."""
    cwd = tmp_path_factory.mktemp("caching")
    recipe(cwd, network__layers=3)
    for name, how in {
        "always": ("--cache", "always"),
        "never": ("--cache", "never"),
        "fast": ("--cache", "auto", "--machine", machine(cwd, "fast", **FAST_CORES)),
        "slow": ("--cache", "auto", "--machine", machine(cwd, "slow", **SLOW_CORES)),
    }.items():
        done = run(cwd, name, *how)
        assert done.rc == 0, done.err
    return cwd


def run(cwd: Path, name: str, *how: object) -> Result:
    where = ("--run", cwd / f"run-{name}", "--store", cwd / f"store-{name}")
    return inside(cwd, "run", "tiny.toml", *where, *how)


def weights(cwd: Path, name: str) -> list[bytes]:
    paths = sorted((cwd / f"run-{name}").glob("layer_*/weights.safetensors"))
    return [path.read_bytes() for path in paths]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("always", ["x_0", "x_1", "x_2"]),
        ("never", ["x_0"]),
        ("fast", ["x_0"]),
        ("slow", ["x_0", "x_1", "x_2"]),
    ],
)
def test_the_weights_are_the_same_whatever_is_cached(
    runs: Path, name: str, written: list[str]
) -> None:
    assert depths(runs / f"store-{name}") == written
    assert len(weights(runs, name)) == 3
    assert weights(runs, name) == weights(runs, "always")


def test_what_was_not_written_can_be_asked_for(runs: Path) -> None:
    where = ("--run", runs / "run-never", "--store", runs / "store-never")
    done = inside(runs, "materialize", "tiny.toml", "--layer", 2, "--cache", "never", *where)
    assert done.rc == 0, done.err
    assert depths(runs / "store-never") == ["x_0", "x_2"]
    again = run(runs, "never", "--cache", "never")
    assert "nothing to do" in again.out


def test_auto_wants_to_know_the_machine(tmp_path: Path) -> None:
    recipe(tmp_path)
    refused = run(tmp_path, "auto", "--cache", "auto")
    assert refused.rc == 8
    assert "Run `calibrate`, or give --machine FILE" in refused.error
    assert not (tmp_path / "store-auto").exists()


# ---- budgets ------------------------------------------------------------------------------------


def asked(cache: str, budget: float | None, **more: Any) -> Options:
    there = MACHINES / "card-8gb.toml"
    return Options(**{"cache": cache, "disk_budget": budget, "machine": there, **more})


def test_a_budget_is_kept_in_every_mode() -> None:
    k1 = load_recipe("cifar10-k1")[1]
    plan = make_plan(k1)
    images = plan.depths[0].bytes
    for cache in ("always", "never", "auto"):
        with pytest.raises(BudgetError) as caught:
            caching(k1, plan, asked(cache, 1e6))
        assert "1.0 MB" in str(caught.value)
    assert caching(k1, plan, asked("never", images)).depths == ()
    roomy, tight = (caching(k1, plan, asked("auto", b)) for b in (None, 80e9))
    assert roomy.depths == {2, 3, 4}
    assert not roomy.evict
    assert tight.depths == {3, 4}
    assert not tight.evict  # 68 GB beside x_0
    assert caching(k1, plan, asked("auto", 145e9)).evict


def test_what_was_chosen_is_said() -> None:
    k1 = load_recipe("cifar10-k1")[1]
    plan = make_plan(k1)
    assert caching(k1, plan, asked("never", None)).said == ()
    (said,) = caching(k1, plan, asked("auto", None)).said
    assert "x_2, x_3, x_4" in said
    assert caching(k1, plan, asked("always", None, machine=None)).said == ()


def test_without_a_machine_there_is_nothing_to_weigh() -> None:
    small = parse(tiny(), "tiny")
    with pytest.raises(NotThereYet, match="nothing is known"):
        caching(small, make_plan(small), asked("auto", None, machine=None, store=Path("none")))


def test_figures_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    """Those of another version, say: whoever needs them is told, and nobody else."""
    recipe(tmp_path)
    path = tmp_path / "features/machine.toml"
    path.parent.mkdir()
    path.write_text('packed = "float32"', "utf-8")
    refused = inside(tmp_path, "train", "tiny.toml", "--layer", 1, "--cache", "auto")
    assert refused.rc == 8
    assert "unknown key 'packed'" in refused.error
    assert "Run `calibrate`" in refused.error
    assert "Run `calibrate`" in inside(tmp_path, "plan", "tiny.toml").out
