"""A level made otherwise is never reused, and explain names the field that says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Result
from runs import Place, made, tiny
from spoil import TEXT

from strata.pipeline.run import lineage, record, weights
from strata.pipeline.run.rundir import Run
from strata.store.level.layout import depth_directory


def run_of(place: Place) -> Run:
    return place.overview().existing()


def explained(place: Place, j: int) -> list[tuple[str, str, list[str]]]:
    """Level, state and reasons."""
    found = place.do("explain", "--layer", j, "--json").json
    return [(entry["level"], entry["state"], entry["why"]) for entry in found]


def reasons(place: Place, j: int) -> list[str]:
    """Why none of x_j is to be used: the fields, which must be the same for all of its levels."""
    found = explained(place, j)
    assert {state for _, state, _ in found} == {"stale"}
    assert "complete" not in {level["state"] for level in levels(place, j)}
    (first, *others) = ([line for line in why if ": was " in line] for _, _, why in found)
    assert all(lines == first for lines in others)
    return first


def levels(place: Place, j: int) -> list[dict[str, Any]]:
    found = place.do("status", "--json").json
    return found["layers"][j - 1]["levels"] if j else found["images"]


def change_one_weight_by_one_ulp(run: Run, j: int) -> None:
    """As if layer j had been trained a trifle differently."""
    path = run.layer_directory(j) / "weights.safetensors"
    tensors, _ = weights.read(path)
    kernel = tensors["convolution.weight"].view(-1)
    kernel[0] = torch.nextafter(kernel[0], torch.tensor(torch.inf))
    weights.write(path, tensors)
    run.write_layer(j, {**(run.layer(j) or {}), "weights": weights.digest(tensors)})


# ---- what makes a level another one -------------------------------------------------------------


def test_one_ulp_in_one_weight(place: Place) -> None:
    was = run_of(place).layer(1)["weights"]  # pyright: ignore
    change_one_weight_by_one_ulp(run_of(place), 1)
    now = run_of(place).layer(1)["weights"]  # pyright: ignore
    field = f'x_1 weights: was "{was}", is "{now}"'
    assert reasons(place, 1) == [field]
    assert explained(place, 2) == [("layer 2", "stale", ["it was solved on another x_1:", field])]
    before = place.files()
    assert place.do("materialize", "--layer", 2).rc == 0
    assert explained(place, 2) == [
        ("x_2 train.plain", "complete", []),
        ("x_2 test", "complete", []),
    ]
    assert before.items() <= place.files().items(), "what was there is left as it was"


def test_one_ulp_in_the_last_layer(place: Place) -> None:
    change_one_weight_by_one_ulp(run_of(place), 2)
    (field,) = reasons(place, 2)
    assert field.startswith("x_2 weights: was ")
    assert states_of(place, 1) == {"complete"}


def states_of(place: Place, j: int) -> set[str]:
    return {state for _, state, _ in explained(place, j)}


def test_one_digit_of_a_constant(place: Place) -> None:
    """The run's weights with another mean: nothing else differs."""
    text = TEXT.replace("mean = [0.3]", "mean = [0.4]")
    other = retold(place, text)
    assert reasons(other, 1) == ["x_1 preprocessing.mean: was [0.3], is [0.4]"]
    ((_, state, why),) = explained(other, 2)
    assert (state, why[1:]) == ("stale", ["x_1 preprocessing.mean: was [0.3], is [0.4]"])


def retold(place: Place, text: str, **facts: Any) -> Place:
    """The same run, as if it had been made from another recipe or seed."""
    from strata.pipeline.recipe.recipe import parse

    run = run_of(place)
    (place.root / "tiny.toml").write_text(text)
    (place.run / "recipe.toml").write_text(text)
    science = parse(text, run.name).science()
    record.write(place.run / "run.json", {**run.facts, "science": science, **facts})
    return Place(place.root, place.run_name, facts.get("seed", 0))


@pytest.mark.parametrize("field", ["FEATURES_VERSION", "IMAGES_VERSION"])
def test_a_version_of_the_code(place: Place, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    depth = 0 if field == "IMAGES_VERSION" else 1
    monkeypatch.setattr(lineage, field, 2)
    line = f"x_{depth} code: was 1, is 2"
    assert reasons(place, depth) == [line]
    ((_, state, why),) = explained(place, 2)
    assert (state, why[1:]) == ("stale", [line])
    if depth == 0:
        assert explained(place, 1) == [("layer 1", "stale", [why[0].replace("x_1", "x_0"), line])]


def test_another_seed_of_fixed_views(tmp_path: Path) -> None:
    text = tiny(views="2", layers=1, downsample="[]", epochs=1)
    place = made(tmp_path / "place", 1, text)
    other = Place(place.root, "other", seed=1)
    assert other.do("train", "--layer", 1).rc == 0
    seed, trained = reasons(other, 1)
    assert seed == "x_1 preprocessing.seed: was 0, is 1"
    assert trained.startswith("x_1 weights: was ")
    assert len(explained(other, 1)) == 3, "two views, and the test images"
    same_weights = retold(place, text, seed=1)
    assert reasons(same_weights, 1) == [seed]


def test_in_canvas_mode_the_seed_names_nothing_but_by_the_weights(place: Place) -> None:
    assert states_of(retold(place, TEXT, seed=1), 1) == {"complete"}


def npz(path: Path, images: np.ndarray) -> str:
    labels = np.arange(len(images)) % 10
    np.savez(path, x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    return f"npz:{path}"


def test_one_byte_of_one_image(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(
        tiny(flip="false", layers=1, downsample="[]", epochs=1)
        .replace("1437", "100")
        .replace("360", "10")
    )
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8), dtype=np.uint8)
    one, two = Place(tmp_path, "one"), Place(tmp_path, "two")
    assert one.do("materialize", "--layer", 1, "--data", npz(tmp_path / "1.npz", images)).rc == 0
    images[17, 3, 3] ^= 1
    assert two.do("train", "--layer", 1, "--data", npz(tmp_path / "2.npz", images)).rc == 0
    was, now = (run_of(place).data()["digest"] for place in (one, two))  # pyright: ignore
    data, trained = reasons(two, 1)
    assert data == f'x_0 data: was "{was}", is "{now}"'
    assert trained.startswith("x_1 weights: ")
    shutil.rmtree(depth_directory(two.store, 0, run_of(two).nodes()[0].fingerprint))
    assert reasons(two, 0) == [data]
    assert explained(one, 0) == [("x_0 train", "complete", []), ("x_0 test", "complete", [])]


def test_a_level_below_was_written_with_other_values(place: Place) -> None:
    """As another device would; the name is the same."""
    run, store = run_of(place), place.overview().store
    key, geometry = key_of(place, 1, "train.plain")
    level = store.open(key).let_go()
    rows, was, parent = level.read(0, len(level)), level.content_root, level.parent
    rows[5, 0, 0, 0] += np.float16(1)
    store.remove_level(key)
    writer = store.writer(key, geometry, run.lineage(1))
    with writer.locked():
        for shard in writer.missing():
            writer.put(shard, rows[slice(*geometry.shard_range(shard))])
        now = writer.commit(parent).content_root
    train, test = explained(place, 2)
    assert train == (
        "x_2 train.plain",
        "stale",
        [
            "x_1 train.plain was written again with other values:",
            f'content_root: was "{was}", is "{now}"',
        ],
    )
    assert test == ("x_2 test", "complete", [])
    said = place.do("materialize", "--layer", 2)
    assert "wrote x_2 train.plain: 1,437 of 1,437 rows" in said.err
    assert states_of(place, 2) == {"complete"}


def key_of(place: Place, depth: int, name: str):
    from strata.pipeline.run.levels import keys_at
    from strata.store.level.level import geometry_of, read_commit

    key = next(key for key in keys_at(run_of(place), depth) if key.name == name)
    return key, geometry_of(read_commit(key.directory(place.store), key))


# ---- absent, partial, damaged -------------------------------------------------------------------


def test_what_is_complete_needs_no_reason(sound: Place) -> None:
    said = sound.do("explain", "--layer", 1)
    levels = ["x_1 train.plain: complete", "x_1 test: complete"]
    assert said.out.splitlines() == [*levels, f"looked in the store {sound.store}"]
    said = sound.do("explain", "--layer", 1, "--json")
    assert {one["store"] for one in said.json} == {str(sound.store)}


def partial(place: Place) -> None:
    (place.level(2, "train.plain") / "COMMIT.json").unlink()


def damaged(place: Place) -> None:
    path = place.level(2, "train.plain") / "COMMIT.json"
    path.write_bytes(path.read_bytes()[:-9])


def removed(place: Place) -> None:
    shutil.rmtree(place.level(2, "train.plain"))


def never_written(place: Place) -> None:
    shutil.rmtree(place.level(2, "train.plain"))
    (place.run / "layer_2/features.json").unlink()


def unsolved(place: Place) -> None:
    (place.run / "layer_2/layer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "state", "words"),
    [
        (partial, "partial", "1,437 rows are written"),
        (damaged, "damaged", "COMMIT.json is damaged"),
        (removed, "absent", "it was written, and removed since; `materialize` makes it again"),
        (never_written, "absent", "it was never written"),
        (unsolved, "absent", "it is not solved, so x_2 has no name yet"),
    ],
)
def test_a_level_that_is_not_there(
    place: Place, spoil: Callable[[Place], None], state: str, words: str
) -> None:
    spoil(place)
    (name, found, why), *others = explained(place, 2)
    assert (name, found) == ("layer 2" if spoil is unsolved else "x_2 train.plain", state)
    assert len(why) == 1
    assert words in why[0]
    assert others == ([] if spoil is unsolved else [("x_2 test", "complete", [])])
    text = place.do("explain", "--layer", 2).out.splitlines()
    assert text[:2] == [f"{name}: {state}", f"  {why[0]}"]


def test_removed_is_said_whatever_else_the_store_holds(place: Place) -> None:
    """Another run's x_1 is no reason why ours is gone."""
    assert Place(place.root, "other", seed=1).do("materialize", "--layer", 1).rc == 0
    key, _ = key_of(place, 1, "test")
    place.overview().store.remove(1, key.fingerprint)
    assert [state for _, state, _ in explained(place, 1)] == ["absent", "absent"]
    assert all("removed since" in why[0] for _, _, why in explained(place, 1))


def test_images_that_were_never_read(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "tiny.toml").write_text(TEXT)
    assert place.do("explain", "--layer", 1).rc == 8
    source = f"npz:{tmp_path / 'none.npz'}"
    assert place.do("train", "--layer", 1, "--data", source).rc == 4
    assert explained(place, 1) == [("x_0", "absent", ["the images were not read yet"])]


def test_a_layer_that_does_not_exist(sound: Place) -> None:
    assert sound.do("explain", "--layer", 3).rc == 2
    assert sound.do("explain", "--layer", -1).rc == 2


# ---- what must not matter -----------------------------------------------------------------------

Move = Callable[[Place], Place]


def other_directory(place: Place) -> Place:
    place.run.rename(place.root / "elsewhere")
    return Place(place.root, "elsewhere")


def other_store(place: Place) -> Place:
    target = place.root.with_name("other place")
    return Place(Path(shutil.move(place.root, target)))


def other_comments(place: Place) -> Place:
    (place.root / "tiny.toml").write_text(f"# said otherwise\n{TEXT}\n# at the end\n")
    return place


def other_shards(place: Place) -> Place:
    """Of another run: a run keeps its own recipe."""
    (place.root / "tiny.toml").write_text(TEXT.replace("shard_mb = 1", "shard_mb = 2"))
    other = Place(place.root, "other")
    assert other.do("train", "--layer", 2).rc == 0
    return other


@pytest.fixture(params=[other_directory, other_store, other_comments, other_shards])
def moved(place: Place, request: pytest.FixtureRequest) -> Place:
    return request.param(place)


def test_what_made_no_value_makes_no_other_level(moved: Place) -> None:
    before = {path: path.stat().st_mtime_ns for path in moved.store.glob("x_*/**/*")}
    for j in (0, 1, 2):
        assert states_of(moved, j) == {"complete"}
        assert all(not why for _, _, why in explained(moved, j))
    said: Result = moved.do("materialize", "--layer", 2, "--json")
    assert json.loads(said.out)["done"] == []
    assert {path: path.stat().st_mtime_ns for path in moved.store.glob("x_*/**/*")} == before
