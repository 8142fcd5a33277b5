"""The store's promises hold wherever a process is stopped, and the trials can tell."""

import pytest
from crash import PROMISES, caught_after, run_trials
from mutants import MUTANTS
from sizes import sized

TRIALS = sized(300, 2000)
LIMIT = 2000
"""Trials within which a wrong protocol must be noticed."""
SEED = 2026


def test_no_crash_breaks_a_promise() -> None:
    counts = run_trials(TRIALS, SEED)
    assert {promise: counts[promise] for promise in PROMISES} == dict.fromkeys(PROMISES, 0)
    # The stops were there, too.
    assert counts["trials"] == TRIALS
    assert min(counts["power"], counts["kill"], counts["full"]) > TRIALS / 4


@pytest.fixture(scope="module")
def caught() -> dict[str, tuple[int, str] | None]:
    return {name: caught_after(mutant, SEED, limit=LIMIT) for name, mutant in MUTANTS.items()}


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_wrong_protocol_is_caught(caught: dict[str, tuple[int, str] | None], name: str) -> None:
    assert caught[name] is not None, MUTANTS[name].what


def test_every_promise_can_be_broken(caught: dict[str, tuple[int, str] | None]) -> None:
    assert {found[1] for found in caught.values() if found} == set(PROMISES)
