"""One of the variants as the layer; and the commands that are not told of sweeps know them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import Place
from sweeps import TEXT, sweep, variant

from strata.store.files.publish import unseal


@pytest.fixture
def place(base: Place, tmp_path: Path) -> Place:
    return base.copy(tmp_path / "place")


# ---- keeping one ---------------------------------------------------------------------------------


def record(place: Place) -> dict[str, Any]:
    return unseal(place.run / "layer_2/layer.json")


def test_a_kept_variant_is_what_train_would_have_left(base: Place, tmp_path: Path) -> None:
    """Weights, scales, logits and record; and the level above has the same bytes."""
    by_train, by_sweep = base.copy(tmp_path / "train"), base.copy(tmp_path / "sweep")
    assert by_train.do("materialize", "--layer", 2).rc == 0
    assert sweep(by_sweep, "lr=0.1,0.3", options=("--keep", "lr=0.1")).rc == 0
    assert by_sweep.weights() == by_train.weights()
    assert by_sweep.do("materialize", "--layer", 2).rc == 0
    assert by_sweep.files().keys() == by_train.files().keys()
    kept, solved_alone = record(by_sweep), record(by_train)
    assert kept["variant"] == {"name": "lr=0.1", "changes": {"schedule.lr": 0.1}}
    differ = {k for k in kept | solved_alone if kept.get(k) != solved_alone.get(k)}
    assert differ <= {"variant", "seconds", "outcome", "files"}, (
        "and memory is that of a solve alone"
    )
    assert set(kept) - {"variant"} == set(solved_alone)
    assert {n for n in kept["files"] if kept["files"][n] != solved_alone["files"][n]} == set()
    assert by_sweep.do("report").rc == 0
    assert by_sweep.do("verify", "--deep").rc == 0


def test_keeping_again_does_nothing(place: Place) -> None:
    assert sweep(place, "lr=0.1,0.3", options=("--keep", "best")).rc == 0
    again = sweep(place, "lr=0.1,0.3", options=("--keep", "best", "--json")).json
    assert again["done"] == []
    risks = {one["name"]: one["risk"] for one in again["variants"]}
    assert again["kept"] == min(risks, key=lambda name: risks[name])
    states = [layer["state"] for layer in place.do("status", "--json").json["layers"]]
    assert states == ["solved", "solved"]


def test_a_solved_layer_is_not_replaced(place: Place) -> None:
    assert place.do("train", "--layer", 2).rc == 0
    before = place.weights()
    refused = sweep(place, "lr=0.3", options=("--keep", "lr=0.3"))
    assert refused.rc == 8
    assert "clean --layer 2" in refused.error
    assert not (place.run / "sweep_2").exists(), "refused before anything was solved"
    assert sweep(place, "lr=0.3").rc == 0
    assert place.weights() == before, "a sweep leaves the layer alone"
    assert place.do("clean", "--layer", 2, "--yes").rc == 0
    kept = sweep(place, "lr=0.3", options=("--keep", "lr=0.3", "--json")).json
    assert kept["done"] == ["keep lr=0.3 as layer 2"], "what was swept was left"


def test_other_shapes_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TEXT)
    for keep in ("k=1", "best", "k=3"):
        refused = sweep(Place(tmp_path), "k=1,2", options=("--keep", keep))
        assert refused.rc == 2
        assert refused.error
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


# ---- the other commands know it ------------------------------------------------------------------


def test_clean_knows_what_was_swept(swept: Place, tmp_path: Path) -> None:
    place = swept.copy(tmp_path / "place")
    there = place.run / "sweep_2"
    assert place.do("clean", "--layer", 2, "--yes", "--json").json["removed"] == []
    only = place.do("clean", "--sweeps", "--dry-run", "--json").json
    assert only["would_remove"] == ["the sweep of layer 2"]
    assert only["bytes"] == sum(p.stat().st_size for p in there.rglob("*") if p.is_file())
    whole = place.do("clean", "--dry-run", "--json").json["would_remove"]
    assert whole[-1] == "the sweep of layer 2"
    assert place.do("clean", "--sweeps").rc == 1, "it asks first"
    assert there.exists()
    assert place.do("clean", "--sweeps", "--yes").rc == 0
    assert not there.exists()
    assert (place.run / "layer_1/weights.safetensors").exists()


@pytest.mark.parametrize("command", [("status",), ("verify", "--deep"), ("plan",), ("evaluate",)])
def test_looking_minds_no_sweep(swept: Place, command: tuple[str, ...]) -> None:
    assert swept.do(*command).rc == 0


def test_verify_names_a_damaged_variant_and_repair_removes_it(swept: Place, tmp_path: Path) -> None:
    place = swept.copy(tmp_path / "place")
    path = variant(place, "lr=0.1,epochs=1,keep=last,k=1") / "test_logits.npy"
    path.write_bytes(path.read_bytes()[:-1])
    found = place.do("verify")
    assert found.rc == 10
    assert str(path) in found.out
    mended = place.do("verify", "--repair")
    assert mended.rc == 0
    assert f"removed with its variant, for `sweep` or `final` to solve again: {path}" in mended.out
    assert len(list((place.run / "sweep_2").iterdir())) == 15


def test_a_damaged_layer_is_mended_from_the_variant_it_was(place: Place) -> None:
    assert sweep(place, "lr=0.3", options=("--keep", "lr=0.3")).rc == 0
    before = place.weights()
    (place.run / "layer_2/weights.safetensors").write_bytes(b"")
    assert place.do("verify", "--repair").rc == 0
    assert place.weights() == before
    assert record(place)["variant"]["name"] == "lr=0.3"


def test_variants_that_do_not_fit_together_are_refused(place: Place) -> None:
    cap = ("--gpu-memory", "3MB")
    assert sweep(place, "seed=0", options=cap).rc == 0
    many = "seed=" + ",".join(map(str, range(200)))
    refused = sweep(place, many, options=cap)
    assert refused.rc == 5
    assert "variants of layer 2 need" in refused.error
    assert "--gpu-memory is 3.0 MB. Vary fewer at a time" in refused.error


@pytest.mark.parametrize("text", ["schedule.batch=32", "schedule.lrr=1"])
def test_what_cannot_vary_is_a_usage_error(place: Place, text: str) -> None:
    refused = sweep(place, text)
    assert refused.rc == 2
    assert refused.error.startswith("Error: --vary ")
    assert sweep(place, "lr=0.1", j=3).rc == 2
