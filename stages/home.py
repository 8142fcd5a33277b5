"""Paths that begin with a home directory."""

from __future__ import annotations

import os
from pathlib import Path


def home(path: str) -> Path:
    """A path with ``~`` and ``~user`` in full. That of a user whom nobody knows is as it is, so
    that who opens it says that there is no such path."""
    return Path(os.path.expanduser(path))  # noqa: PTH111
