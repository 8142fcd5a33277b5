"""The built-in recipes, and recipes in files. One TOML file here is one recipe."""

from __future__ import annotations

from pathlib import Path

from strata.pipeline.errors import RecipeError
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.recipe.strict import did_you_mean, read_text

DEFAULT = "digits"
FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The built-in recipes, default first."""
    found = (path.stem for path in FOLDER.glob("*.toml"))
    return sorted(found, key=lambda name: (name != DEFAULT, name))


def text_of(recipe: str) -> tuple[str, str, Path]:
    """Name and TOML text of a built-in recipe, or of a path to a TOML file, and the folder where a
    Python file lies that it names.

    Raises:
        RecipeError: there is neither, and suggests the nearest name; or it cannot be read.
    """
    if recipe in names():
        return recipe, (FOLDER / f"{recipe}.toml").read_text("utf-8"), FOLDER
    path = Path(recipe)
    if path.suffix == ".toml":
        return path.stem, read_text(path), path.parent
    raise RecipeError(
        f"unknown recipe {recipe!r}{did_you_mean(recipe, names())} (a file must end in .toml)"
    )


def load(recipe: str) -> tuple[str, Recipe]:
    """Name and recipe, from a built-in name or a path."""
    name, text, folder = text_of(recipe)
    return name, parse(text, recipe, folder)
