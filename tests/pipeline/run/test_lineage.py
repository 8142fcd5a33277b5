"""Fingerprints: whatever changes the values changes the name, and nothing else does."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from runs import tiny

from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.run import lineage

DATA = "d" * 64
WEIGHTS = ["a" * 64, "b" * 64, "c" * 64]


def recipe(**changes: object) -> Recipe:
    return parse(tiny(**changes), "tiny")


def chain(
    r: Recipe,
    seed: int,
    compute: str,
    data: str,
    weights: Sequence[str],
    scales: Mapping[int, str] | None = None,
) -> list[lineage.Node]:
    """x_0 … x_n for n layers; ``scales`` has a digest for the depths that have one."""
    nodes = [lineage.images_node(r, data)]
    for j, digest in enumerate(weights, 1):
        of_depth = (scales or {}).get(j)
        nodes.append(lineage.feature_node(r, seed, compute, nodes[-1], digest, of_depth))
    return nodes


def names(
    r: Recipe,
    *,
    seed: int = 0,
    compute: str = "float32",
    data: str = DATA,
    weights: Sequence[str] = WEIGHTS,
    scales: Mapping[int, str] | None = None,
) -> list[str]:
    return [node.fingerprint for node in chain(r, seed, compute, data, weights, scales)]


BASE = names(recipe())


def changed_text(old: str, new: str, times: int = -1) -> Recipe:
    text = tiny()
    assert old in text
    return parse(text.replace(old, new, times), "tiny")


@pytest.mark.parametrize(
    ("got", "first"),
    [
        pytest.param(names(recipe(), data="e" * 64), 0, id="another image byte"),
        pytest.param(names(changed_text("size = 8", "size = 12")), 0, id="image size"),
        pytest.param(names(changed_text("mean = [0.3]", "mean = [0.30001]")), 1, id="mean"),
        pytest.param(names(changed_text("std = [0.4]", "std = [0.39999]")), 1, id="std"),
        pytest.param(names(changed_text("pad = 2", "pad = 4")), 1, id="padding"),
        pytest.param(names(recipe(), weights=["f" * 64, *WEIGHTS[1:]]), 1, id="weights of layer 1"),
        pytest.param(names(recipe(), weights=[*WEIGHTS[:2], "f" * 64]), 3, id="weights of layer 3"),
        pytest.param(names(recipe(precision="float32")), 1, id="stored precision"),
        pytest.param(names(recipe(), scales={2: "f" * 64}), 2, id="scales of x_2"),
        pytest.param(names(recipe(), compute="bfloat16"), 1, id="compute dtype"),
        pytest.param(names(changed_text("block = 64", "block = 32")), 1, id="rows per pass"),
        pytest.param(names(recipe(views="4")), 1, id="fixed views for the canvas"),
        pytest.param(names(recipe(downsample="[2]")), 2, id="where P is"),
        pytest.param(
            names(changed_text("batch_norm", 'pool = "max"\nbatch_norm', 1)), 2, id="what P is"
        ),
    ],
)
def test_what_changes_the_values_renames_that_depth_and_all_above(
    got: list[str], first: int
) -> None:
    assert got[:first] == BASE[:first]
    assert all(a != b for a, b in zip(got[first:], BASE[first:], strict=True))


@pytest.mark.parametrize(
    "r",
    [
        pytest.param(recipe(epochs=50), id="epochs"),
        pytest.param(recipe(keep="best"), id="kept iterate"),
        pytest.param(recipe(flip="false"), id="flip, in canvas mode"),
        pytest.param(changed_text("shard_mb = 1", "shard_mb = 2"), id="bytes per shard"),
        pytest.param(changed_text('"digits"', '"npz:elsewhere"'), id="where the images lie"),
        pytest.param(changed_text("batch = 64", "batch = 32"), id="batch"),
    ],
)
def test_what_cannot_change_the_values_does_not_rename(r: Recipe) -> None:
    assert names(r) == BASE


def test_the_seed_names_fixed_views_and_not_canvases() -> None:
    """The seed reaches a canvas through the weights alone; a fixed view also by its draws."""
    assert names(recipe(), seed=1) == BASE
    fixed = recipe(views="4")
    assert names(fixed, seed=1)[1:] != names(fixed)[1:]


def test_a_view_can_be_added_without_renaming_the_others() -> None:
    assert names(recipe(views="4")) == names(recipe(views="8"))


def test_two_recipes_that_agree_up_to_a_depth_share_it() -> None:
    deeper = names(recipe(layers=3, downsample="[1]"))
    shallow = names(recipe(layers=2, downsample="[1]"), weights=WEIGHTS[:2])
    assert deeper[:3] == shallow


def test_a_code_version_is_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "FEATURES_VERSION", lineage.FEATURES_VERSION + 1)
    got = names(recipe())
    assert got[0] == BASE[0]
    assert all(a != b for a, b in zip(got[1:], BASE[1:], strict=True))


def test_the_intent_says_what_the_name_was_made_from() -> None:
    node = chain(recipe(), 0, "float32", DATA, WEIGHTS)[1]
    assert node.intent["weights"] == WEIGHTS[0]
    assert node.intent["preprocessing"]["mean"] == [0.3]
    assert replace(node).fingerprint == BASE[1]


def test_what_a_layer_does_not_need_is_not_in_its_name() -> None:
    """Keys that came later would rename every level there is."""
    pooled = changed_text("batch_norm", 'pool = "max"\nbatch_norm', 1)
    before, after = (
        chain(r, 0, "float32", DATA, WEIGHTS)[2].intent["layer"] for r in (recipe(), pooled)
    )
    assert [*before] == ["index", "channels", "width", "downsamplings", "batch_norm", "bias"]
    assert after == before | {"pool": "max"}
