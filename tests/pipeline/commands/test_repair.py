"""verify --repair gives back the bytes that were there, and computes no more than that takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runs import Place
from spoil import (
    BYTES,
    SHARD,
    STRUCTURE,
    TEXT,
    Spoil,
    early_flip,
    flip,
    in_level,
    intent,
    named,
    params,
    swapped,
)
from together import together

from strata.store.files.publish import unseal


@pytest.mark.parametrize("spoil", params(STRUCTURE | BYTES))
def test_repair_gives_back_every_byte(place: Place, sound: Place, spoil: Spoil) -> None:
    paths = spoil(place)
    said = place.do("verify", "--deep")
    assert said.rc == 10
    lines = [line for line in said.out.splitlines() if line.startswith("damaged: ")]
    assert sorted(line.split(": ")[1] for line in lines) == sorted(map(str, paths))
    repaired = place.do("verify", "--deep", "--repair", "--json")
    assert repaired.json["damaged"] == repaired.json["partial"] == []
    assert repaired.json["mended"]
    assert place.files() == sound.files()
    assert place.weights() == sound.weights()
    assert place.overview().evaluation() == sound.overview().evaluation()
    assert not list(place.root.rglob(".tmp-*"))


# ---- how much it does, and what it leaves alone -------------------------------------------------


def test_repair_of_what_is_sound_does_nothing(place: Place) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.root.rglob("*")}
    assert place.do("verify", "--deep", "--repair").rc == 0
    assert {path: path.stat().st_mtime_ns for path in place.root.rglob("*")} == before


def test_only_the_damaged_shard_is_computed(place: Place) -> None:
    (path,) = in_level(SHARD, early_flip)(place)
    others = [p for p in place.store.glob("x_*/*/x/c.*") if p != path]
    before = [(p.stat().st_ino, p.stat().st_mtime_ns) for p in others]
    said = place.do("verify", "--deep", "--repair")
    first, last = unseal(path.parents[1] / "receipts/000002.json")["rows"]
    assert f"wrote x_1 train.plain: {last - first} of 1,437 rows" in said.err
    assert said.err.count("wrote ") == 1
    assert f"mended x_1 train.plain: {SHARD} (the same values as before)" in said.out
    assert [(p.stat().st_ino, p.stat().st_mtime_ns) for p in others] == before
    (aside,) = (place.store / "quarantine").iterdir()
    assert aside.name.startswith(f"{path.parents[2].name}.train.plain.x.c.2.0.0.0.")


def test_a_receipt_alone_costs_no_computing(place: Place) -> None:
    in_level("receipts/000002.json", flip)(place)
    said = place.do("verify", "--deep", "--repair")
    assert "wrote x_1 train.plain: 0 of 1,437 rows" in said.err


def test_one_layer_is_looked_at_and_mended(place: Place) -> None:
    (one,) = in_level(SHARD, Path.unlink)(place)
    (two,) = in_level("x/c.0.0.0.0", Path.unlink, 2, "test")(place)
    assert named(place.do("verify", "--layer", 2, "--json")) == [str(two)]
    assert place.do("verify", "--layer", 0).rc == 0
    assert place.do("verify", "--layer", 2, "--repair").rc == 0
    assert two.exists()
    assert not one.exists()
    assert named(place.do("verify", "--json")) == [str(one)]


def test_levels_of_another_run_are_named_and_left(place: Place) -> None:
    """Only that run can compute them; what is only misplaced is put back for it, too."""
    other = Place(place.root, "other", seed=1)
    assert other.do("materialize", "--layer", 1).rc == 0
    (foreign,) = set(place.store.glob("x_1-*")) - {
        place.store / f"x_1-{place.overview().existing().nodes()[1].fingerprint[:12]}"
    }
    flip(foreign / "test/x/c.0.0.0.0")
    said = place.do("verify", "--deep", "--repair", "--json")
    assert said.rc == 10
    assert named(said) == [str(foreign / "test/x/c.0.0.0.0")]
    assert other.do("verify", "--deep", "--repair").rc == 0


def test_a_run_with_other_shards_mends_a_level_that_it_shares(place: Place, sound: Place) -> None:
    (place.root / "tiny.toml").write_text(TEXT.replace("shard_mb = 1", "shard_mb = 2"))
    other = Place(place.root, "other")
    assert other.do("train", "--layer", 2).rc == 0
    in_level(SHARD, early_flip)(place)
    assert other.do("verify", "--deep", "--repair").rc == 0
    assert place.files() == sound.files()


def test_without_a_run_nothing_is_repaired_and_no_run_is_made(place: Place) -> None:
    in_level(SHARD, Path.unlink)(place)
    nobody = Place(place.root, "nobody")
    assert nobody.do("verify").rc == 10
    said = nobody.do("verify", "--repair")
    assert said.rc == 8
    assert not nobody.run.exists()


def test_other_images_do_not_repair_the_old_ones(place: Place, tmp_path: Path) -> None:
    in_level("x/c.0.0.0.0", early_flip, 0, "train")(place)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8), np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "o.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    source = f"npz:{tmp_path / 'o.npz'}"
    said = place.do("verify", "--deep", "--repair", "--data", source)
    assert said.rc == 8
    assert "digest" in said.error


# ---- repairs that end early ---------------------------------------------------------------------

KILLS = (1, 2, 3, 4, 6, 9, 13, 18, 24, 31, 39, 48, 60, 80, 100)


@pytest.mark.slow
def test_a_killed_repair_is_repeated(sound: Place, tmp_path: Path) -> None:
    """Whatever call of the store was its last: misplaced directories, shards, receipts, x/zarr.json
    and intents are mended by the same command."""
    places = [sound.copy(tmp_path / str(n)) for n in KILLS]
    for place in places:
        swapped((1, "test"), (2, "test"))(place)
        in_level(SHARD, early_flip)(place)
        in_level("receipts/000000.json", flip)(place)
        in_level("x/zarr.json", flip, 2)(place)
        in_level("label/c.0", flip, 0, "test")(place)
        intent(flip)(place)
    words = [("verify", *place.options, "--deep", "--repair") for place in places]
    first = together(*words, kill_at=KILLS)
    assert {said.rc for said in first[:-3]} == {-9}, [said.err for said in first]
    for place, n in zip(places, KILLS, strict=True):
        again = place.do("verify", "--deep", "--repair")
        assert again.rc == 0, (n, again.err)
        assert place.files() == sound.files(), n
