"""What may vary, what is refused and how it is told; names and settings of variants."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from runs import tiny

from strata.pipeline.errors import OptionRange
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.recipe.variants import SHORT, Variant, check_keep, variants

RECIPE = parse(tiny(), "tiny")
K1 = replace(RECIPE, auxiliary=replace(RECIPE.auxiliary, k=1, width=0))


def found(*vary: str, recipe: Recipe = RECIPE, j: int = 2, seed: int = 7) -> list[Variant]:
    return variants(recipe, j, vary, seed)


def names(*vary: str) -> list[str]:
    return [variant.name for variant in found(*vary)]


def test_the_product_of_the_lists() -> None:
    assert names("schedule.lr=0.05,0.1", "auxiliary.k=1,2", "seed=0") == [
        "lr=0.05,k=1,seed=0",
        "lr=0.05,k=2,seed=0",
        "lr=0.1,k=1,seed=0",
        "lr=0.1,k=2,seed=0",
    ]


def test_a_name_does_not_depend_on_how_it_was_asked_for() -> None:
    want = {"lr=0.1,k=2", "lr=0.2,k=2"}
    assert set(names("schedule.lr=0.1,0.2", "auxiliary.k=2")) == want
    assert set(names("k=2", "lr=2e-1, 0.10")) == want
    assert names("lr=0.1,0.10,1e-1") == ["lr=0.1"], "each variant once"


@pytest.mark.parametrize("key", SHORT)
def test_every_key_has_a_name_that_is_safe_as_a_directory(key: str) -> None:
    words = {"kind": "cosine", "keep": "best", "nesterov": "true", "optimizer": "adamw"}
    value = words.get(key.removeprefix("schedule."))
    half = key in ("schedule.warmup", "schedule.momentum", "schedule.label_smoothing")
    (variant,) = found(f"{key}={value or (0.5 if half else 1)}")
    assert re.fullmatch(r"[a-z_]+=[a-z0-9.+-]+", variant.name)
    assert list(variant.changes) == [key]
    json.dumps(variant.settings)


def test_without_changes_a_variant_is_the_recipe() -> None:
    (variant,) = found("lr=0.1")
    assert (variant.layer, variant.auxiliary) == (RECIPE.layers[1], RECIPE.auxiliaries[1])
    assert variant.schedule == RECIPE.schedule
    assert variant.seed == 7
    assert variant.fits(RECIPE)


def test_widths_are_those_of_layer_j_itself() -> None:
    """Layer 2 begins with P, so the recipe doubles both there: 16 and 16."""
    (variant,) = found("width=5", "auxiliary.width=3")
    assert variant.layer is not None
    assert (RECIPE.layers[1].width, RECIPE.auxiliaries[1].width) == (16, 16)
    assert (variant.layer.width, variant.auxiliary.channels, variant.auxiliary.width) == (5, 5, 3)
    assert variant.layer.channels == RECIPE.layers[1].channels, "the layers below stay"
    (alone,) = found("width=5")
    assert alone.auxiliary.width == 16


def test_with_k_1_a_width_of_c_is_no_other_problem() -> None:
    assert names("k=1,2", "aux_width=4,8") == ["k=1", "k=2,aux_width=4", "k=2,aux_width=8"]


def test_settings_say_what_decides_the_result_and_no_more() -> None:
    def settings(*vary: str) -> str:
        return json.dumps(found(*vary)[0].settings)

    seen = replace(RECIPE, schedule=replace(RECIPE.schedule, test_every=5))
    assert found("lr=0.1", recipe=seen)[0].settings == found("lr=0.1")[0].settings
    assert settings("lr=0.1") == settings("k=2") == settings("seed=7")
    different = [settings(f"{key}=3") for key in ("lr", "epochs", "k", "width", "seed", "every")]
    assert len({settings("lr=0.1"), *different}) == 7


REFUSED = [
    ("schedule.batch=32", "--vary schedule.batch: it would change the layers below, the batches"),
    ("network.layers=2", "may vary: schedule.lr,"),
    ("network.width=9", "may vary: "),
    ("cache.precision=float32", "copy the recipe"),
    ("augment.pad=1", "--vary augment.pad: it would change"),
    ("data.train=1", "--vary data.train: it would change"),
    ("schedule.precision=float32", "it would change"),
    ("network=1", "it would change"),
    ("schedule.lrr=1", "unknown key. Did you mean 'schedule.lr'?"),
    ("auxilary.k=1", "unknown key. Did you mean 'auxiliary.k'?"),
    ("nonsense=1", "unknown key; may vary: schedule.lr"),
    ("schedule.lr", "must be KEY=VALUE,VALUE,…"),
    ("schedule.lr=", "must be KEY=VALUE,VALUE,…"),
    ("schedule.lr=0.1,,0.2", "must be KEY=VALUE,VALUE,…"),
    ("schedule.lr=fast", "--vary schedule.lr: 'fast' must be a number"),
    ("schedule.lr=nan", "'schedule.lr' is nan; it must be finite"),
    ("schedule.epochs=10000000000", "'schedule.epochs' is 10000000000; it must be at most"),
    ("auxiliary.k=1001", "'auxiliary.k' is 1001; it must be at most 1,000"),
    ("schedule.lr=-1", "'schedule.lr' is -1.0; it must be above 0"),
    ("schedule.weight_decay=-1", "is -1.0; it must be 0 or more"),
    ("schedule.momentum=1", "it must be in [0, 1)"),
    ("schedule.kind=steps", "Did you mean 'step'?"),
    ("schedule.nesterov=yes", "'yes' must be true or false"),
    ("schedule.epochs=0", "0 must be 1 or more"),
    ("auxiliary.k=1.5", "'1.5' must be an integer"),
    ("seed=-1", "-1 must be 0 or more"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=[text for text, _ in REFUSED])
def test_what_cannot_be_varied_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(OptionRange) as error:
        found(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(OptionRange, match="given twice"):
        found("lr=0.1", "schedule.lr=0.2")


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(OptionRange, match="momentum"):
        found("nesterov=true", "momentum=0")


def test_a_recipe_without_a_width_for_c_asks_for_one() -> None:
    with pytest.raises(OptionRange, match=r"add --vary auxiliary\.width"):
        found("k=2", recipe=K1)
    assert found("k=2", "auxiliary.width=4", recipe=K1)[0].auxiliary.width == 4
    with pytest.raises(OptionRange, match="no C whose width"):
        found("auxiliary.width=4", recipe=K1)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("lr=0.1,k=1", "has other shapes than the recipe's layer 2: a recipe with that width or k"),
        ("best", "lr=0.1,k=1 has other shapes than the recipe's layer 2; --keep one by its name"),
        ("lr=0.1,k=22", "is no variant. Did you mean 'lr=0.1,k=2'?"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep: str, said: str) -> None:
    wanted = found("lr=0.1,0.2", "k=1,2")
    with pytest.raises(OptionRange, match=re.escape(said)):
        check_keep(RECIPE, 2, wanted, keep)


def test_a_variant_of_the_recipes_shapes_can_be_kept() -> None:
    check_keep(RECIPE, 2, found("lr=0.1,0.2", "k=1,2"), "lr=0.2,k=2")
    check_keep(RECIPE, 2, found("lr=0.1,0.2"), "best")
