"""Recipes: strict, frozen, and the paper's where they say so."""

import dataclasses

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import parse
from pipeline.recipes import load, names, text_of

DIGITS = text_of("digits")[1]


def changed(old: str, new: str) -> str:
    assert old in DIGITS
    return DIGITS.replace(old, new)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(
            changed("epochs =", "epoch ="),
            ["unknown key 'schedule.epoch'", "Did you mean 'epochs'?"],
            id="misspelt key",
        ),
        pytest.param("[nework]\n" + DIGITS, ["'nework'", "'network'"], id="misspelt table"),
        pytest.param(
            changed("classes = 10", 'classes = "ten"'),
            ["'data.classes' must be an integer", "'ten'"],
            id="wrong type",
        ),
        pytest.param(
            changed("batch_norm = true", "batch_norm = 1"),
            ["true or false", "1"],
            id="int for bool",
        ),
        pytest.param(
            changed("classes = 10", "classes = true"), ["'data.classes'", "True"], id="bool for int"
        ),
        pytest.param(
            changed("downsample = [1]", 'downsample = ["1"]'),
            ["'network.downsample[0]'"],
            id="wrong type in a list",
        ),
        pytest.param(changed("lr = 0.1\n", ""), ["missing key 'schedule.lr'"], id="missing key"),
        pytest.param(
            changed("downsample = [1]", "downsample = [3]"),
            ["x_3", "x_1 … x_2"],
            id="downsample after the last layer",
        ),
        pytest.param(
            changed("crop = 8 ", "crop = 13 "), ["'augment.crop' is 13", "12"], id="crop too large"
        ),
        pytest.param(
            changed("crop = 8 ", "crop = 7 "), ["7 pixels", "does not divide"], id="crop is odd"
        ),
        pytest.param(
            changed('views = "canvas"', "views = 1"),
            ["same draw", "allow_single_view"],
            id="a single random view",
        ),
        pytest.param(
            changed('views = "canvas"', 'views = "canvass"'),
            ["Did you mean 'canvas'?"],
            id="unknown mode",
        ),
        pytest.param(
            changed('kind = "one-cycle"', 'kind = "onecycle"'),
            ["Did you mean 'one-cycle'?"],
            id="unknown schedule",
        ),
        pytest.param(
            DIGITS + '[cache]\nprecision = "unit8"\n', ["Did you mean 'uint8'?"], id="precision"
        ),
        pytest.param(
            DIGITS + "[cache]\npercentile = 0.0\n", ["'cache.percentile' is 0.0"], id="percentile"
        ),
        pytest.param(
            DIGITS + "[cache]\npercentile = 100.5\n", ["at most 100"], id="percentile above 100"
        ),
        pytest.param(changed("mean = [0.306]", "mean = [0.3, 0.3]"), ["2 values"], id="mean"),
        pytest.param("[data\n", ["recipe test:"], id="not TOML"),
    ],
)
def test_what_cannot_be_is_refused_with_its_path(text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "test")
    for word in words:
        assert word in str(caught.value)


def test_a_single_random_view_is_given_to_those_who_ask() -> None:
    recipe = parse(changed('views = "canvas"', "views = 1\nallow_single_view = true"), "test")
    assert recipe.augment.views == 1


def test_a_single_view_without_randomness_needs_no_asking() -> None:
    text = changed('views = "canvas"', "views = 1").replace("pad = 2", "pad = 0")
    assert not parse(text, "test").is_random


def test_recipes_are_frozen() -> None:
    _, recipe = load("digits")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.network.layers = 4  # pyright: ignore


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'cifar10-k1'"):
        load("cifar-k1")


def test_digits_is_the_default_and_all_five_are_there() -> None:
    assert names() == ["digits", "cifar10-k1", "cifar10-k2", "cifar10-k3", "cifar10-small"]


@pytest.mark.parametrize(
    ("name", "layers", "width", "downsample", "k", "aux", "norm", "last", "ensemble"),
    [
        pytest.param("cifar10-k1", 5, 256, (2, 3), 1, 0, False, 88.3, 88.4, id="k = 1"),
        pytest.param("cifar10-k2", 4, 128, (2,), 2, 256, True, 90.4, 90.7, id="k = 2"),
        pytest.param("cifar10-k3", 4, 128, (2,), 3, 256, True, 91.7, 92.8, id="k = 3"),
    ],
)
def test_the_papers_settings(
    name: str,
    layers: int,
    width: int,
    downsample: tuple[int, ...],
    k: int,
    aux: int,
    norm: bool,
    last: float,
    ensemble: float,
) -> None:
    """Sec. 4, 4.1, 4.3 and Table 2."""
    _, r = load(name)
    assert (r.network.layers, r.network.width, r.network.downsample) == (layers, width, downsample)
    assert (r.auxiliary.k, r.auxiliary.width) == (k, aux)
    assert (r.network.batch_norm, r.network.bias) == (norm, True)
    s = r.schedule
    assert (s.kind, s.epochs, s.batch, s.lr, s.momentum) == ("step", 50, 128, 0.1, 0.9)
    assert (s.decay, s.every) == (0.2, 15)
    assert (r.claim.last, r.claim.ensemble) == (last, ensemble)
