"""Recipes whose x_0 is no images: [data] shape, dtype and targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import texts
from networks import beside

from strata.pipeline.errors import BudgetError, RecipeError
from strata.pipeline.plan.plan import check_budget, make_plan
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.builtin import load, names
from strata.pipeline.recipe.recipe import Recipe, parse

TEXT = texts.RECIPE.format(
    depth=2, tokens=32, folder="here", train=320, test=64, epochs=1, precision="float16"
)


def read(text: str, folder: Path) -> Recipe:
    return parse(text, "tiny", beside(folder, texts.CODE, "transformer.py"))


def test_a_recipe_of_tokens(tmp_path: Path) -> None:
    recipe = read(TEXT, tmp_path)
    assert [recipe.shape(j, 1) for j in range(3)] == [(32,), (32, 32), (32, 32)]
    assert augmentation.mode(recipe) == "fixed"
    assert augmentation.levels_at(recipe, 1) == [("train", "clean"), ("test", "clean")]
    assert [spec.each for spec in recipe.auxiliaries] == [True, True]
    science = recipe.science()
    assert "augment" not in science
    assert {k: science["data"][k] for k in ("shape", "dtype", "targets")} == {
        "shape": (32,),
        "dtype": "int32",
        "targets": "token",
    }


def test_a_budget_for_tokens_is_refused_with_their_shape(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="levels of 32×32 in float16"):
        check_budget(make_plan(read(TEXT, tmp_path)), 1)


def test_recipes_of_images_stay_what_they_are() -> None:
    """Runs made before there were such keys are still of their recipe."""
    later = {"shape", "dtype", "targets"}
    assert not [n for n in names() if later & load(n)[1].science()["data"].keys()]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[auxiliary]", "[augment]\ncrop = 8\n[auxiliary]", ["'augment.crop' is for images"]),
        ("[auxiliary]", '[augment]\nviews = "canvas"\n[auxiliary]', ["'augment.views' is for"]),
        ("test = 64", "test = 64\nchannels = 1", ["'data.channels' is for images", "'data.shape'"]),
        ("test = 64", "test = 64\nmean = [1.0]\nstd = [1.0]", ["'data.mean'", "int32"]),
        ('dtype = "int32"', 'dtype = "int64"', ["'data.dtype' is 'int64'. Did you mean 'uint16'?"]),
        ("shape = [32]", "shape = []", ["'data.dtype' is 'int32'", "needs 'data.shape'"]),
        ("shape = [32]", "shape = [1, 1, 1, 1, 1]", ["1 to 4 numbers"]),
        ("shape = [32]", "shape = [0]", ["'data.shape' is [0]"]),
        ('targets = "token"', 'targets = "tokens"', ["Did you mean 'token'?"]),
        ("shape = [32]\n", "", ["needs 'data.shape'"]),
    ],
)
def test_refused(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in TEXT
    with pytest.raises(RecipeError) as refused:
        read(TEXT.replace(old, new), tmp_path)
    said = str(refused.value)
    assert "\n" not in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("shape", "mean", "words"),
    [
        ("[32]", "", "are for maps (channel, y, x): name a network"),
        ("[3, 10, 8]", "", "a side of 'data.shape' is 10 pixels, which 4"),
        ("[3, 8, 8]", "mean = [1.0, 2.0]\nstd = [1.0, 1.0]", "both must have none, 1 or 3"),
        ("[3, 8, 8]", "mean = [1.0]\nstd = [0.0]", "each must be above 0"),
    ],
)
def test_layers_of_a_table_are_for_maps(shape: str, mean: str, words: str) -> None:
    head, rest = TEXT.split("[data]")[1].split("[auxiliary]")
    text = f"[network]\nlayers = 3\nwidth = 8\ndownsample = [1, 2]\n[data]{head}[auxiliary]{rest}"
    text = text.replace("shape = [32]", f"shape = {shape}\n{mean}").replace('"token"', '"sample"')
    with pytest.raises(RecipeError) as refused:
        parse(text.replace('"int32"', '"float32"'), "tiny")
    assert words in str(refused.value)


def test_float_maps_for_layers_of_a_table() -> None:
    head, rest = TEXT.split("[data]")[1].split("[auxiliary]")
    text = f"[network]\nlayers = 2\nwidth = 8\ndownsample = [1]\n[data]{head}[auxiliary]{rest}"
    text = text.replace("[32]", "[3, 12, 8]").replace('"token"', '"sample"')
    recipe = parse(text.replace('"int32"', '"float16"'), "tiny")
    assert [recipe.shape(j, 1) for j in range(3)] == [(3, 12, 8), (8, 12, 8), (16, 6, 4)]
