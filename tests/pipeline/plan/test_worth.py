"""What is chosen for a recipe, within budgets of disk and memory, against every chain there is."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from root import MACHINES
from runs import here, tiny
from sizes import examples

from strata.pipeline.plan.choose import X0, CachedDepth, Chain, cheapest_chain, evicted
from strata.pipeline.plan.costs import PROFILES, RecipeCosts
from strata.pipeline.plan.machine import Machine, load
from strata.pipeline.plan.memory import CACHE_SHARE, DEVICE_SHARE, MEMORY_SHARE
from strata.pipeline.plan.worth import PRECISIONS, VIEWS, weigh
from strata.pipeline.recipe.builtin import load as load_recipe
from strata.pipeline.recipe.recipe import Recipe, parse

LAPTOP = load(MACHINES / "laptop.toml")


def open_recipe(**changes: object) -> Recipe:
    """Four layers, with the profile left open."""
    return parse(tiny(**{"layers": 4, **changes}) + 'profile = "auto"\n', "tiny")


@st.composite
def drawn_costs(draw: st.DrawFn) -> RecipeCosts:
    """Any rates, any memory, and any device, of a recipe that leaves the profile open."""
    fast = st.sampled_from([10.0**n for n in range(4, 10)])
    names = [name for name, value in asdict(LAPTOP).items() if isinstance(value, float)]
    rates: dict[str, Any] = {name: draw(fast) for name in names}
    rates |= {name: draw(st.sampled_from([1.0, 1.5, 3.0])) for name in ("ratio_lz4", "ratio_zstd")}
    rates |= {name: draw(st.sampled_from([1e-4, 1e-1])) for name in names if "publish" in name}
    rates["device_memory"] = draw(st.sampled_from([None, 1e5, 1e6, 1e9]))
    machine = replace(LAPTOP, **rates, device=draw(st.sampled_from(["cpu", "cuda"])))
    recipe = open_recipe(
        layers=draw(st.integers(1, 4)),
        downsample="[]",
        views=draw(st.sampled_from(['"canvas"', "2", "4"])),
        precision=draw(st.sampled_from(["float32", "uint4"])),
    )
    return RecipeCosts(recipe, machine, 1437, 360, draw(st.sampled_from([1, 7])))


def chains(layers: int) -> Iterator[tuple[CachedDepth, ...]]:
    """Every decision at every depth."""
    for decisions in itertools.product((None, *PROFILES), repeat=max(0, layers - 1)):
        yield tuple(CachedDepth(d, form) for d, form in enumerate(decisions, start=1) if form)


def simulated(costs: RecipeCosts, chain: tuple[CachedDepth, ...], disk: float) -> float:
    """Seconds of a run that goes layer by layer, and keeps what is read next and nothing else."""
    planned, held, seconds = {node.depth: node for node in chain}, X0, 0.0
    for j in range(1, costs.table.layers + 1):
        seconds += costs.problems * costs.solve(held, j)
        if node := planned.get(j):
            used = {X0, held, node}
            if sum(map(costs.nbytes, used)) > disk:
                return math.inf
            seconds += costs.write(held, node)
            held = node
    return seconds if costs.nbytes(X0) <= disk else math.inf


@settings(max_examples=examples(60), deadline=None)
@given(drawn_costs(), st.one_of(st.just(math.inf), st.integers(0, 30_000_000)))
def test_no_chain_of_profiles_is_cheaper(costs: RecipeCosts, disk: float) -> None:
    best = cheapest_chain(costs.table, disk=disk)
    least = min(simulated(costs, chain, disk) for chain in chains(costs.table.layers))
    assert best.seconds == pytest.approx(least)
    assert simulated(costs, best.chain, disk) == pytest.approx(least)
    worth = weigh(costs, disk)
    assert worth.seconds["best"] == pytest.approx(least)
    assert [d.form for d in worth.depths if d.form] == [node.form for node in best.chain]
    for depth in worth.depths:
        others = [
            c for c in chains(costs.table.layers) if _caches(c, depth.depth) != bool(depth.form)
        ]
        other = min((simulated(costs, chain, disk) for chain in others), default=math.inf)
        assert depth.otherwise == pytest.approx(other)


def _caches(chain: tuple[CachedDepth, ...], depth: int) -> bool:
    return any(node.depth == depth for node in chain)


@settings(max_examples=examples(100), deadline=None)
@given(drawn_costs(), st.sampled_from(PROFILES))
def test_rows_lie_where_there_is_room(costs: RecipeCosts, form: str) -> None:
    """The bounds by hand; more room is never slower on a GPU, and never on any if it is the
    memory's and rows are raw."""
    node = CachedDepth(1, form)
    views = {"canvas": 2}.get(str(costs.recipe.augment.views)) or int(costs.recipe.augment.views)
    values = math.prod(costs.recipe.shape(1, 12 if costs.recipe.augment.views == "canvas" else 8))
    nbytes = views * 1437 * values * (4 if costs.recipe.cache.precision == "float32" else 0.5)
    share = CACHE_SHARE if form == "raw" else MEMORY_SHARE
    if nbytes <= DEVICE_SHARE * (costs.machine.device_memory or 0):
        expected = "device"
    else:
        expected = "memory" if nbytes <= share * costs.machine.memory else "disk"
    assert costs.tier_of(node).tier == expected
    roomy = replace(costs, machine=replace(costs.machine, memory=1e30))
    if form == "raw" and costs.table.layers > 1:
        assert roomy.solve(node, 2) <= costs.solve(node, 2) * (1 + 1e-9)


def test_auto_takes_at_every_depth_the_profile_that_is_cheapest() -> None:
    """A slow disk and little memory: packed; a fast one: raw. Never dearer than any one of them."""
    small = replace(LAPTOP, memory=1e6, forward=1e3)
    for disk, form in ((1e4, "zstd"), (1e12, "raw")):
        machine = replace(small, disk_read=disk, disk_write=disk)
        costs = RecipeCosts(open_recipe(views="2"), machine, 1437, 360)
        worth = weigh(costs)
        assert {d.form for d in worth.depths} == {form}
        assert worth.seconds["best"] == pytest.approx(worth.profiles[form])
        assert worth.seconds["best"] == pytest.approx(min(worth.profiles.values()))
    assert RecipeCosts(open_recipe(), LAPTOP, 10, 10, loader="ffcv").forms == ("raw",)


def test_a_tier_that_was_asked_for_and_has_no_room_is_no_way() -> None:
    found = RecipeCosts(open_recipe(), replace(LAPTOP, memory=1e6), 1437, 360, tier="memory")
    assert found.solve(CachedDepth(1, "raw"), 2) == math.inf
    assert replace(found, tier="disk").solve(CachedDepth(1, "raw"), 2) < math.inf
    roomy = replace(found, machine=replace(found.machine, memory=3e6))
    assert {d.reason for d in weigh(roomy).depths} == {"--tier memory has no room for it"}


# ---- what is said -------------------------------------------------------------------------------


def k1(machine: Machine, **how: Any) -> RecipeCosts:
    recipe = load_recipe("cifar10-k1")[1]
    return RecipeCosts(recipe, machine, recipe.data.train, recipe.data.test, **how)


def test_every_depth_has_its_reason() -> None:
    card = load(MACHINES / "card-8gb.toml")
    free, tight = weigh(k1(card)), weigh(k1(card), 80e9)
    assert free.depths[0].reason.startswith("computing ")
    assert free.depths[1].reason.startswith("reading ")
    assert all(d.reason.endswith(" per epoch") for d in free.depths)
    assert tight.depths[1].form is None
    assert tight.depths[1].reason == "over the budget of 80.0 GB"
    recipe = k1(card).recipe
    fresh = replace(k1(card), recipe=replace(recipe, augment=replace(recipe.augment, views=0)))
    assert {d.reason for d in weigh(fresh).depths} == {"fresh draws cannot be cached"}
    dear = weigh(k1(replace(card, disk_write=1e3)))
    assert "but writing takes" in dear.depths[3].reason


def test_a_level_leaves_once_the_next_is_written_where_not_all_fit() -> None:
    costs = k1(load(MACHINES / "card-8gb.toml"))
    best = cheapest_chain(costs.table)
    nodes = [X0, *best.chain]
    whole = sum(map(costs.nbytes, nodes))
    assert evicted(costs.table, best, whole) == {}
    assert evicted(costs.table, best, whole - 1) == {2: 3, 3: 4}
    assert [d.until for d in weigh(costs, whole - 1).depths] == [None, 3, 4, None]
    assert evicted(costs.table, Chain(0.0, ()), 0) == {}


def test_other_ways_are_shown_and_never_taken() -> None:
    costs = k1(LAPTOP)
    worth = weigh(costs)
    assert [(way.views, way.precision) for way in worth.other_ways] == list(
        itertools.product(VIEWS, PRECISIONS)
    )
    own = next(w for w in worth.other_ways if (w.views, w.precision) == ("canvas", "float16"))
    assert own.seconds == worth.seconds["best"]
    assert own.nbytes == sum(d.nbytes for d in worth.depths)
    by_precision = [w.nbytes for w in worth.other_ways if w.views == "canvas"]
    assert by_precision[0] == pytest.approx(2 * by_precision[1], rel=1e-3)
    three = replace(
        costs, recipe=replace(costs.recipe, augment=replace(costs.recipe.augment, views=3))
    )
    assert {way.views for way in weigh(three).other_ways} == {3, *VIEWS}


def test_plan_says_it_to_people_and_to_machines(tmp_path: Path) -> None:
    ask = ("plan", "cifar10-k1", "--machine", MACHINES / "card-8gb.toml", "--store", tmp_path)
    ask = (*ask, "--run", tmp_path / "run")
    for budget, words in {
        "145GB": ("once x_3", "is written", "stays", "other ways to cache", " *"),
        "80GB": ("over the budget",),
    }.items():
        shown = here(*ask, "--disk-budget", budget).out
        for said in words:
            assert said in shown, said
    found = json.loads(here(*ask, "--gpu-memory", "2GB", "--json").out)["economics"]
    assert {way["precision"] for way in found["other_ways"]} == set(PRECISIONS)
    depth = found["depths"][2]
    assert depth["tier"] in ("disk", "memory")
    assert depth["reason"]
    assert depth["until"] is None
