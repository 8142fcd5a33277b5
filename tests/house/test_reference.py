"""docs/reference.md is what the classes that check recipes say."""

import tomllib

import reference
from root import ROOT

from strata.pipeline.recipe.builtin import FOLDER, names

PAGE = (ROOT / "docs/reference.md").read_text("utf-8")


def test_the_reference_is_current() -> None:
    advice = "PYTHONPATH=typings python tests/support/reference.py > docs/reference.md"
    assert reference.page() == PAGE, advice


def test_every_key_has_a_meaning() -> None:
    bare = [
        f"{table}.{key}"
        for table, kind in reference.tables()
        for key, _, _, meaning in reference.rows_of(kind)
        if not meaning.endswith(".")
    ]
    assert bare == []


def test_every_key_of_every_recipe_is_there() -> None:
    for name in names():
        found = tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))
        for table, values in found.items():
            keys = [f"{table}.{key}" for key in values] if isinstance(values, dict) else []
            for key in keys or [f'{table} = "NAME"']:
                assert f"`{key}`" in PAGE, f"{name}: {key}"
