"""Strata trains deep networks one layer at a time, each from the cached features of those below.

The public names; everything else serves the commands of ``strata`` (or ``python cli.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strata.pipeline.api.cache import cache
    from strata.pipeline.api.features import Features
    from strata.pipeline.api.runs import Run, open_run, run
    from strata.pipeline.api.solve import solve
    from strata.pipeline.feed.level_feed import feed
    from strata.store.feature_store import open_level

__all__ = ["Features", "Run", "cache", "feed", "open_level", "open_run", "run", "solve"]
__version__ = "0.1.0"

_HOMES = {
    "Features": "strata.pipeline.api.features",
    "Run": "strata.pipeline.api.runs",
    "cache": "strata.pipeline.api.cache",
    "feed": "strata.pipeline.feed.level_feed",
    "open_level": "strata.store.feature_store",
    "open_run": "strata.pipeline.api.runs",
    "run": "strata.pipeline.api.runs",
    "solve": "strata.pipeline.api.solve",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: ``strata --help`` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'strata' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, for whoever completes them."""
    return [*__all__, "__version__"]
