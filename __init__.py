"""Strata trains deep CNNs one layer at a time, each from the cached features of the layers below.

The public names; everything else serves the commands of ``strata`` (or ``python cli.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strata.pipeline.feed.level_feed import feed
    from strata.store.feature_store import open_level

__all__ = ["feed", "open_level"]
__version__ = "0.1.0"

_HOMES = {"feed": "strata.pipeline.feed.level_feed", "open_level": "strata.store.feature_store"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: ``strata --help`` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'strata' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
