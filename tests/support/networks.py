"""Recipes that name a network: the tiny recipe of house.py with blocks in place of its table."""

from __future__ import annotations

from pathlib import Path

from root import ROOT
from runs import tiny

RESIDUAL = (ROOT / "pipeline/recipe/builtin/residual.py").read_text()
NAME = '{ name = "residual.py:blocks", arguments = { width = 8 } }'


def named(network: str = NAME, **changes: object) -> str:
    """TOML of a tiny recipe.

    Args:
        network: as TOML has it: a string in quotes, or a table with a name.
    """
    head, rest = tiny(**changes).split("[network]")
    return f"network = {network}\n{head}[auxiliary]{rest.split('[auxiliary]')[1]}"


def beside(place: Path, code: str = RESIDUAL, file: str = "residual.py") -> Path:
    """A directory with the Python file that a recipe there may name."""
    place.mkdir(exist_ok=True, parents=True)
    (place / file).write_text(code)
    return place
