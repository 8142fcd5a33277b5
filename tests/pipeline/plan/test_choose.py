"""The cheapest chain of cached levels, against every chain there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import examples

from strata.pipeline.plan.choose import X0, CachedDepth, Chain, Costs, cheapest_chain

FORMS = ("raw", "zstd")


def nodes(layers: int) -> list[CachedDepth]:
    cached = itertools.product(range(1, layers), FORMS)
    return [X0, *(CachedDepth(depth, form) for depth, form in cached)]


@st.composite
def drawn_costs(draw: st.DrawFn) -> Costs:
    layers = draw(st.integers(1, 4))
    number, there = st.integers(0, 20), nodes(layers)
    pairs = [(a, b) for a in there for b in there if a.depth < b.depth]
    problems = [(a, j) for a in there for j in range(a.depth + 1, layers + 1)]
    return Costs(
        layers,
        {node: draw(number) for node in there},
        {pair: draw(number) for pair in pairs},
        {problem: draw(number) for problem in problems},
        draw(st.sampled_from([1, 3])),
    )


def chains(layers: int) -> Iterator[tuple[CachedDepth, ...]]:
    """Every decision at every depth."""
    for decisions in itertools.product((None, *FORMS), repeat=max(0, layers - 1)):
        yield tuple(CachedDepth(d, form) for d, form in enumerate(decisions, start=1) if form)


def simulated(costs: Costs, chain: tuple[CachedDepth, ...], disk: float) -> float:
    """Seconds of a run that goes layer by layer, and keeps what is read next and nothing else."""
    planned, held, seconds = {node.depth: node for node in chain}, X0, 0.0
    used = costs.nbytes[held]
    if used > disk:
        return math.inf
    for j in range(1, costs.layers + 1):
        seconds += costs.problems * costs.solve[held, j]
        if j in planned:
            seconds += costs.write[held, planned[j]]
            both = used + costs.nbytes[planned[j]]
            if both > disk:
                return math.inf
            used = both - (costs.nbytes[held] if held.depth else 0)
            held = planned[j]
    return seconds


@settings(max_examples=examples(300), deadline=None)
@given(drawn_costs(), st.one_of(st.just(math.inf), st.integers(0, 60)))
def test_no_chain_is_cheaper(costs: Costs, disk: float) -> None:
    best = cheapest_chain(costs, disk=disk)
    assert best.seconds == min(simulated(costs, chain, disk) for chain in chains(costs.layers))
    assert best.seconds == simulated(costs, best.chain, disk)


@settings(max_examples=examples(200), deadline=None)
@given(drawn_costs(), st.one_of(st.just(math.inf), st.integers(0, 60)), st.data())
def test_the_other_decision_is_the_best_of_those(
    costs: Costs, disk: float, data: st.DataObject
) -> None:
    best = cheapest_chain(costs, disk=disk)
    depth = data.draw(st.integers(1, max(1, costs.layers - 1)))
    if best.seconds == math.inf or depth >= costs.layers:
        return
    how = "never" if best.form(depth) else "must"
    other = cheapest_chain(costs, disk=disk, **{how: frozenset([depth])})
    others = [
        simulated(costs, chain, disk)
        for chain in chains(costs.layers)
        if any(node.depth == depth for node in chain) == (best.form(depth) is None)
    ]
    assert other.seconds == min(others)
    assert other.seconds >= best.seconds


def test_a_level_may_leave_once_the_next_is_there() -> None:
    """Room for x_0 and two of three levels is enough."""
    chain = [CachedDepth(d, "raw") for d in (1, 2, 3)]
    there = nodes(4)
    costs = Costs(
        4,
        dict.fromkeys(there, 10),
        {(a, b): 1 for a in there for b in there if a.depth < b.depth},
        {(a, j): 100 * (j - a.depth) for a in there for j in range(a.depth + 1, 5)},
    )
    assert cheapest_chain(costs, disk=30) == Chain(403.0, tuple(chain))
    assert len(cheapest_chain(costs, disk=29).chain) == 1
    assert cheapest_chain(costs, disk=19).chain == ()


@pytest.mark.parametrize("disk", [0, 9])
def test_without_room_for_the_images_there_is_nothing(disk: int) -> None:
    costs = Costs(1, {X0: 10}, {}, {(X0, 1): 5})
    assert cheapest_chain(costs, disk=disk) == Chain(math.inf, ())
    assert cheapest_chain(costs, disk=10) == Chain(5.0, ())
