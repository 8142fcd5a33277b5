"""How often a test repeats what it repeats: less in the small profile of ``make test`` than in the
full one of ``make test-all`` (``pytest --full``). The tests are the same."""

from __future__ import annotations

_full = False


def choose(full: bool) -> None:
    """Called by conftest before any test module is imported."""
    global _full
    _full = full


def sized(small: int, full: int) -> int:
    return full if _full else small


def examples(full: int) -> int:
    """Examples of a hypothesis test."""
    return sized(max(5, full // 5), full)
