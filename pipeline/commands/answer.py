"""What a command found, for machines and for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The result of a command."""

    value: Any
    """For machines, as JSON."""
    shown: tuple[Any, ...]
    """For people: tables and lines."""
    error: Exception | None = None
    """Raised once the rest was said."""
